"""A group hangs when nobody moves for long enough, and then whoever is behind is named."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from bmctl.job import Logs
from bmctl.processes import watchdog
from bmctl.processes.heartbeat import (
    PATIENCE,
    Heart,
    Sign,
    Watch,
    dump_stacks,
    find_stuck,
    group_timeout_s,
    innermost,
    is_waiting,
    process_state,
    read_sign,
)

FIRST = Sign(pid=1, step=7, beats=10, moved=3, alive=0, doing="training")
COLLECTIVE = """
Current thread 0x01 (most recent call first):
  File "/x/torch/distributed/distributed_c10d.py", line 3000 in all_reduce
  File "/x/bmctl/engine/training/loop.py", line 12 in _step
"""
BACKWARD = """
Thread 0x02 (most recent call first):
  File "/x/threading.py", line 331 in wait

Current thread 0x01 (most recent call first):
  File "/x/torch/autograd/graph.py", line 869 in _engine_run_backward
  File "/x/torch/_tensor.py", line 630 in backward
"""
READING = """
Current thread 0x01 (most recent call first):
  File "/x/bmctl/sources/folder.py", line 40 in read
  File "/x/bmctl/engine/training/loop.py", line 10 in _step
"""


class Clock:
    """Looks once a second, as a parent does."""

    def __init__(self, watch: Watch) -> None:
        self.watch, self.now, self.alive = watch, 0.0, 0

    def until_hung(self, signs: dict[int, Sign | None], *, lives: bool = True, others=None, limit: int = 1000) -> int:
        """Seconds of the same signs until the watch says so."""
        for second in range(limit):
            self.now, self.alive = self.now + 1, self.alive + lives
            seen = {rank: replace(sign, alive=self.alive) if sign else None for rank, sign in signs.items()}
            if self.watch.look(seen, others=others(second) if others else None, now=self.now):
                return second
        return limit


def test_a_group_that_does_not_move_hangs() -> None:
    assert Clock(Watch(20)).until_hung({0: FIRST, 1: FIRST}) == 20


def test_nobody_hangs_while_one_moves() -> None:
    """As while rank 0 validates."""
    clock = Clock(Watch(20))
    for beats in range(100):
        assert clock.until_hung({0: replace(FIRST, beats=beats), 1: FIRST}, limit=10) == 10


def test_nobody_hangs_while_one_of_another_machine_moves() -> None:
    clock = Clock(Watch(20))
    moving = lambda second: {1: replace(FIRST, beats=second)}  # noqa: E731
    assert clock.until_hung({0: FIRST}, others=moving, limit=200) == 200
    assert clock.until_hung({0: FIRST}, others=lambda _: {1: FIRST}) in (20, 21)


@pytest.mark.parametrize("fields", [{"moved": 0}, {"doing": "preparing"}, {"doing": "finishing: hashing"}])
def test_before_the_first_step_and_at_the_end_there_is_more_time(fields: dict) -> None:
    assert Clock(Watch(20)).until_hung({0: replace(FIRST, **fields)}) == 20 * PATIENCE


def test_even_then_the_interpreter_must_run() -> None:
    assert Clock(Watch(20)).until_hung({0: replace(FIRST, moved=0)}, lives=False) == 20


def test_a_process_that_never_begins() -> None:
    assert Clock(Watch(20)).until_hung({0: None}) == 20 * PATIENCE


def test_time_in_which_nobody_watched_does_not_count() -> None:
    """The machine slept, or Ctrl-Z stopped us all."""
    watch = Watch(20)
    assert not watch.look({0: FIRST}, now=0)
    assert not watch.look({0: FIRST}, now=100_000)
    assert not watch.look({0: FIRST}, now=100_001)


def test_a_process_that_was_started_again_begins_anew() -> None:
    clock = Clock(Watch(20))
    assert clock.until_hung({0: FIRST}, limit=15) == 15
    assert clock.until_hung({0: replace(FIRST, pid=2)}) == 20


def test_the_process_groups_own_timeout_is_later() -> None:
    assert group_timeout_s(20) > 20 * PATIENCE


# -- who ------------------------------------------------------------------------------------------------


def stuck(signs: dict[int, Sign], stacks: dict[int, str]) -> tuple[int | None, str]:
    clock = Clock(Watch(20))
    clock.until_hung(dict(signs))
    found = find_stuck(clock.watch, signs, stacks)
    return found.rank, found.text


ME = replace(FIRST, pid=os.getpid())


def test_the_lowest_step_is_behind() -> None:
    rank, text = stuck({0: ME, 1: replace(ME, step=6, doing="saving")}, {0: COLLECTIVE, 1: READING})
    assert rank == 1
    assert text == (
        "rank 1 has not moved for 20 s (launch.timeout_s): after step 6, saving; it is stuck in read (folder.py:40)"
    )


@pytest.mark.parametrize("waiting", [COLLECTIVE, BACKWARD])
def test_at_the_same_step_who_does_not_wait_is_behind(waiting: str) -> None:
    assert is_waiting(waiting)
    assert stuck({0: ME, 1: ME}, {0: waiting, 1: READING})[0] == 1
    assert stuck({0: ME, 1: ME}, {0: READING, 1: waiting})[0] == 0


def test_all_here_wait_for_another_machine() -> None:
    rank, text = stuck({0: ME, 1: ME}, {0: COLLECTIVE, 1: COLLECTIVE})
    assert rank is None
    assert "waits for another process" in text


def test_innermost_is_in_words() -> None:
    assert innermost(BACKWARD) == "_engine_run_backward (graph.py:869)"
    assert innermost("") == ""


# -- with real processes ----------------------------------------------------------------------------------

CHILD = """
import sys, time
from pathlib import Path
from bmctl.processes.heartbeat import beating, dump_on_signal

dump_on_signal()
def brood():
    time.sleep(100)
with beating(Path(sys.argv[1])) as heart:
    heart.beat(4, "training")
    heart.beat(5, "evaluating ä" + 100 * "x")
    print("begun", flush=True)
    brood()
"""


def test_a_process_beats_dumps_and_is_seen_to_be_stopped(tmp_path: Path) -> None:
    beat, log = tmp_path / "logs" / "rank-0.beat", tmp_path / "rank-0.log"
    with log.open("w") as file:
        child = subprocess.Popen([sys.executable, "-c", CHILD, str(beat)], stdout=subprocess.PIPE, stderr=file)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == b"begun\n"
        sign = read_sign(beat, pid=child.pid)
        assert sign is not None
        assert (sign.step, sign.beats, sign.moved) == (5, 3, 1)
        assert sign.doing.startswith("evaluating ä")
        assert read_sign(beat, pid=child.pid + 1) is None
        wait_until(lambda: read_sign(beat).alive > sign.alive)
        stack = dump_stacks({0: child.pid}, lambda _: log, wait_s=20)[0]
        assert innermost(stack).startswith("brood (")
        child.send_signal(signal.SIGSTOP)
        wait_until(lambda: process_state(child.pid) == "T")
        assert "it is stopped (SIGSTOP)" in stuck({0: sign}, {})[1]
    finally:
        child.kill()
        child.wait()
        child.stdout.close()


def test_what_other_machines_wrote_is_seen_too(tmp_path: Path) -> None:
    logs = Logs(tmp_path)
    for rank in (0, 3):
        Heart(logs.beat(rank)).beat(rank, "training")
    (logs.folder / "rank-x.beat").write_bytes(logs.beat(0).read_bytes())
    (logs.folder / "rank-4.beat").touch()
    found = watchdog._others(logs, {0: read_sign(logs.beat(0))})
    assert {rank: sign.step for rank, sign in found.items()} == {3: 3}


def wait_until(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_what_is_not_a_beat_is_none(tmp_path: Path) -> None:
    assert read_sign(tmp_path / "gone") is None
    (tmp_path / "short").write_bytes(b"x")
    assert read_sign(tmp_path / "short") is None
