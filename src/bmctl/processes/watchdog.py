"""Who acts when a group does not move: the parent of the workers, or, where there is none, each process itself."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from types import FrameType

from bmctl.errors import WorkerError
from bmctl.job import Logs
from bmctl.processes.heartbeat import Heart, Sign, Watch, dump_stacks, find_stuck, read_sign
from bmctl.processes.signals import Stop

LOOK_S = 0.2
INTERRUPT_S = 5.0
"""How long a process may take to notice that it is to end."""


class Overseer:
    """Watches the processes of one machine from their parent."""

    def __init__(self, logs: Logs, *, timeout_s: float) -> None:
        self._logs, self._timeout_s = logs, timeout_s
        self._watch, self._workers = Watch(timeout_s), dict[int, int]()

    def look(self, workers: Mapping[int, int]) -> WorkerError | None:
        """What to tell if the group hangs; its stacks are in its logs then.

        Args:
            workers: Process id by rank, of this machine.
        """
        if workers != self._workers:
            self._workers, self._watch = dict(workers), Watch(self._timeout_s)
        signs = {rank: read_sign(self._logs.beat(rank), pid=pid) for rank, pid in workers.items()}
        others = _others(self._logs, signs) if self._logs.node else {}
        if not self._watch.look(signs, others=others):
            return None
        pids = {rank: sign.pid for rank, sign in signs.items() if sign is not None}
        return _told(self._watch, signs, dump_stacks(pids, self._logs.of_rank), self._logs)


def _others(logs: Logs, signs: Mapping[int, Sign | None]) -> dict[int, Sign]:
    """What processes of other machines wrote; that of an earlier job does not change and does no harm."""
    found = {}
    for path in logs.folder.glob("rank-*.beat"):
        rank, sign = path.stem.removeprefix("rank-"), read_sign(path)
        if rank.isdigit() and int(rank) not in signs and sign is not None:
            found[int(rank)] = sign
    return found


def _told(watch: Watch, signs: Mapping[int, Sign | None], stacks: Mapping[int, str], logs: Logs) -> WorkerError:
    stuck = find_stuck(watch, signs, stacks)
    log = f"{logs.folder}/rank-*.log" if stuck.rank is None else logs.of_rank(stuck.rank)
    return WorkerError(stuck.text, hint=f"the stacks are in {log}; if its steps are only slow, raise launch.timeout_s")


@contextmanager
def watched(heart: Heart, logs: Logs, *, rank: int, timeout_s: float, stop: Stop) -> Iterator[None]:
    """End this process if it, or the group that it is in, does not move: by an exception, else at once with code 10.

    Raises:
        WorkerError: It did not move, and could be interrupted.
    """
    done = threading.Event()
    thread = threading.Thread(
        target=_watch, args=(done, logs, rank, timeout_s, stop), name="bmctl-watchdog", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        done.set()


def _watch(done: threading.Event, logs: Logs, rank: int, timeout_s: float, stop: Stop) -> None:
    watch, me = Watch(timeout_s), os.getpid()
    world = int(os.environ.get("WORLD_SIZE") or 1) if "RANK" in os.environ else 1
    while not done.wait(LOOK_S):
        signs = {rank: read_sign(logs.beat(rank), pid=me)}
        others = {one: sign for one in range(world) if one != rank and (sign := read_sign(logs.beat(one))) is not None}
        if watch.look(signs, others=others):
            break
    else:
        return
    error = _own_error(watch, {**others, **signs}, logs, rank=rank)
    stop.abort(error)
    if done.wait(INTERRUPT_S):
        return
    with suppress(OSError):
        os.write(2, f"error: {error.message}\n  hint: {error.hint}\n".encode())
    os._exit(error.exit_code)


def _own_error(watch: Watch, signs: Mapping[int, Sign | None], logs: Logs, *, rank: int) -> WorkerError:
    """What a process without a parent of ours tells: of itself, and of the others in its group."""
    stacks = {rank: own_stack()}
    with suppress(OSError), logs.of_rank(rank).open("a", encoding="utf-8") as file:
        file.write(stacks[rank])
    is_alone = os.environ.get("WORLD_SIZE", "1") != os.environ.get("LOCAL_WORLD_SIZE", "1")
    return _told(watch, {rank: signs[rank]} if is_alone else signs, stacks, logs)


def own_stack() -> str:
    """The stacks of all threads, the main one last, as faulthandler writes them."""
    main = threading.main_thread().ident
    frames = sorted(sys._current_frames().items(), key=lambda item: item[0] == main)
    lines = []
    for ident, frame in frames:
        lines.append(f"Thread 0x{ident:016x} (most recent call first):")
        here: FrameType | None = frame
        while here is not None:
            lines.append(f'  File "{here.f_code.co_filename}", line {here.f_lineno} in {here.f_code.co_name}')
            here = here.f_back
    return "\n".join(lines) + "\n"
