"""How far every process is, and who is behind when nobody moves.

A process writes into RUN/logs/rank-N.beat, which is mapped into its memory: its step and what it is doing, at every
step, evaluated batch and saved file; and, from a thread, that its interpreter still runs. Whoever watches it compares
what it reads now with what it read before, so that clocks of different machines need not agree.

The rule by which nothing healthy is killed: a group hangs when none of its processes has moved for `launch.timeout_s`.
A process that has not finished its first step, or says that it is preparing or finishing, has ten times as long: it
loads, compiles, or measures what it made. Even then it must show that its interpreter runs.
"""

from __future__ import annotations

import faulthandler
import mmap
import os
import re
import signal
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from bmctl.disk import disk_errors

PATIENCE = 10
PATIENT = ("preparing", "finishing")
"""What is being done begins with one of these where no beat is due for long."""
DUMP_SIGNAL = signal.SIGUSR2
ALIVE_S = 0.5
LATER = 2.0
LATER_S = 60.0

_NUMBERS = struct.Struct("<qqq")  # step, beats, steps done since the start
_ALIVE = struct.Struct("<q")
_PID_AT, _NUMBERS_AT, _ALIVE_AT, _DOING_AT = 0, 8, 32, 40
_DOING_BYTES = 80
_SIZE = _DOING_AT + _DOING_BYTES


@dataclass(frozen=True)
class Sign:
    """What a process last wrote.

    Attributes:
        step: Optimizer steps done, or -1 before the loop.
        beats: How often it moved.
        moved: Steps that it finished itself.
        alive: How often its thread ran.
    """

    pid: int
    step: int
    beats: int
    moved: int
    alive: int
    doing: str

    @property
    def is_patient(self) -> bool:
        """Whether no beat is due for long."""
        return self.moved == 0 or self.doing.startswith(PATIENT)


class Heart:
    """This process's beat."""

    def __init__(self, path: Path) -> None:
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                os.pwrite(handle, bytes(_SIZE), 0)  # not a hole: filling one on a full disk would be a SIGBUS
                self._map = mmap.mmap(handle, _SIZE)
            finally:
                os.close(handle)
        self._step, self._beats, self._moved, self._alive, self._doing = -1, 0, 0, 0, ""
        self.beat(-1, "preparing")
        _ALIVE.pack_into(self._map, _PID_AT, os.getpid())  # last: only a whole record has a process

    def beat(self, step: int, doing: str) -> None:
        """Say that this process moved: so many optimizer steps are done, and this comes next."""
        if step != self._step:
            self._moved += self._step >= 0
            self._step = step
        self._beats += 1
        _NUMBERS.pack_into(self._map, _NUMBERS_AT, step, self._beats, self._moved)
        if doing != self._doing:
            self._doing = doing
            self._map[_DOING_AT:_SIZE] = doing.encode(errors="replace")[:_DOING_BYTES].ljust(_DOING_BYTES, b"\0")

    def live(self, *, share: bool = False) -> None:
        """Say that the interpreter runs; let other machines read what was said, on a shared file system."""
        self._alive += 1
        _ALIVE.pack_into(self._map, _ALIVE_AT, self._alive)
        if share:
            with suppress(OSError):
                self._map.flush()


def read_sign(path: Path, *, pid: int | None = None) -> Sign | None:
    """What a process last wrote; None without a file, or if another process wrote it."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    if len(data) < _SIZE:
        return None
    (found,) = _ALIVE.unpack_from(data, _PID_AT)
    if not found or pid not in (None, found):
        return None
    step, beats, moved = _NUMBERS.unpack_from(data, _NUMBERS_AT)
    (alive,) = _ALIVE.unpack_from(data, _ALIVE_AT)
    doing = data[_DOING_AT:_SIZE].rstrip(b"\0").decode(errors="replace")
    return Sign(pid=found, step=step, beats=beats, moved=moved, alive=alive, doing=doing)


@contextmanager
def beating(path: Path) -> Iterator[Heart]:
    """A beat for this process while the block runs, with a thread that shows that its interpreter does.

    Args:
        path: RUN/logs/rank-N.beat.
    """
    heart, done = Heart(path), threading.Event()
    has_others = os.environ.get("WORLD_SIZE", "1") != os.environ.get("LOCAL_WORLD_SIZE", "1")

    def live() -> None:
        while not done.wait(ALIVE_S):
            heart.live(share=has_others)

    heart.live()
    thread = threading.Thread(target=live, name="bmctl-alive", daemon=True)
    thread.start()
    try:
        yield heart
    finally:
        done.set()
        thread.join()


def group_timeout_s(timeout_s: float) -> float:
    """The process group's own timeout: later than that of the watch, which names who is behind."""
    return LATER * PATIENCE * timeout_s + LATER_S


# -- who is behind --------------------------------------------------------------------------------------


@dataclass
class _Seen:
    """What is known of one process; seconds count only while somebody watched."""

    sign: Sign | None = None
    silent_s: float = 0.0
    lifeless_s: float = 0.0

    def note(self, sign: Sign | None, passed_s: float) -> None:
        before, self.sign = self.sign, sign
        moved = sign is not None and (before is None or (sign.pid, sign.beats) != (before.pid, before.beats))
        lives = moved or (sign is not None and before is not None and sign.alive != before.alive)
        self.silent_s = 0.0 if moved else self.silent_s + passed_s
        self.lifeless_s = 0.0 if lives else self.lifeless_s + passed_s


@dataclass
class Watch:
    """Whether a group of processes still moves.

    Attributes:
        timeout_s: launch.timeout_s.
        longest_look_s: More than this between two looks means that nobody watched: the machine slept, or we did.
    """

    timeout_s: float
    longest_look_s: float = 1.0
    _seen: dict[int, _Seen] = field(default_factory=dict)
    _looked: float | None = None

    def look(
        self, signs: Mapping[int, Sign | None], *, others: Mapping[int, Sign] | None = None, now: float | None = None
    ) -> bool:
        """Whether the group hangs.

        Args:
            signs: By rank, of the processes that are watched; None for one that has written nothing yet.
            others: By rank, of processes elsewhere: while one of them moves, nobody hangs.
            now: Seconds of a steady clock.
        """
        now = time.monotonic() if now is None else now
        passed_s = 0.0 if self._looked is None else min(now - self._looked, self.longest_look_s)
        self._looked = now
        everybody = {**(others or {}), **signs}
        self._seen = {rank: self._seen.get(rank) or _Seen(sign) for rank, sign in everybody.items()}
        for rank, sign in everybody.items():
            self._seen[rank].note(sign, passed_s)
        if not signs or any(seen.silent_s < self.timeout_s for seen in self._seen.values()):
            return False
        watched = [self._seen[rank] for rank in signs]
        if any(seen.sign is not None and seen.lifeless_s >= self.timeout_s for seen in watched):
            return True
        return all(seen.silent_s >= self._limit_s(seen) for seen in watched)

    def _limit_s(self, seen: _Seen) -> float:
        return self.timeout_s * (PATIENCE if seen.sign is None or seen.sign.is_patient else 1)

    def lifeless(self, rank: int) -> bool:
        """Whether that process gave no sign that its interpreter runs."""
        return self._seen[rank].lifeless_s >= min(self.timeout_s / 2, 20 * ALIVE_S)

    def silent_s(self) -> float:
        """Seconds since any of them moved."""
        return min(seen.silent_s for seen in self._seen.values())


@dataclass(frozen=True)
class Stuck:
    """The process that holds up the others.

    Attributes:
        rank: None where all only wait for processes of another machine.
        text: What is told of it.
    """

    rank: int | None
    text: str


def find_stuck(watch: Watch, signs: Mapping[int, Sign | None], stacks: Mapping[int, str]) -> Stuck:
    """Who is behind: whoever is stopped or lifeless, then whoever has done fewer steps and does not wait for others.

    Args:
        watch: Has just found that the group hangs.
        signs: By rank.
        stacks: What `dump_stacks` found, by rank.
    """
    silent_s = watch.silent_s()
    for rank, sign in sorted(signs.items()):
        if sign is None:
            return Stuck(rank, f"rank {rank} has not begun after {silent_s:.0f} s")
        if process_state(sign.pid) in "Tt":
            return Stuck(rank, f"{_behind(rank, sign, silent_s)}; it is stopped (SIGSTOP)")
    for rank, sign in sorted(signs.items()):
        if sign is not None and watch.lifeless(rank):
            return Stuck(rank, f"{_behind(rank, sign, silent_s)}; it is alive, but its interpreter does not run")
    known = {rank: sign for rank, sign in signs.items() if sign is not None}
    fewest = min(sign.step for sign in known.values())
    behind = [rank for rank in sorted(known) if known[rank].step == fewest]
    busy = [rank for rank in behind if not is_waiting(stacks.get(rank, ""))]
    if not busy and len(behind) < len(known):
        busy = behind
    rank = busy[0] if busy else behind[0]
    text = _behind(rank, known[rank], silent_s)
    if not busy and len(known) > 1:
        return Stuck(None, f"{text}; like the others here, it waits for another process")
    where = innermost(stacks.get(rank, ""))
    return Stuck(rank, f"{text}; it is stuck in {where}" if where else f"{text}; it is alive")


def _behind(rank: int, sign: Sign, silent_s: float) -> str:
    after = f"after step {sign.step}" if sign.step >= 0 else "before the first step"
    return f"rank {rank} has not moved for {silent_s:.0f} s (launch.timeout_s): {after}, {sign.doing}"


def process_state(pid: int) -> str:
    """One letter as in ps; T is stopped; empty if there is no such process, or no /proc."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return " "


# -- stacks ---------------------------------------------------------------------------------------------


def dump_on_signal() -> None:
    """Let DUMP_SIGNAL write the stacks of all threads to stderr, whatever the interpreter is doing."""
    faulthandler.enable()
    faulthandler.register(DUMP_SIGNAL, all_threads=True, chain=False)


def dump_stacks(pids: Mapping[int, int], log_of: Callable[[int], Path], *, wait_s: float = 2.0) -> dict[int, str]:
    """Have processes write their stacks into their logs; what they wrote, by rank.

    Args:
        pids: By rank, of processes that called `dump_on_signal`.
        log_of: A rank's log, which is its stderr.
        wait_s: For the slowest of them.
    """
    begun = {rank: _size(log_of(rank)) for rank in pids}
    for pid in pids.values():
        with suppress(ProcessLookupError):
            os.kill(pid, DUMP_SIGNAL)
    found: dict[int, str] = {}
    deadline = time.monotonic() + wait_s
    while time.monotonic() < deadline:
        before = dict(found)
        found = {rank: _from(log_of(rank), begun[rank]) for rank in pids}
        if all(found.values()) and found == before:
            break
        time.sleep(0.2)
    return found


_FRAME = re.compile(r'^  File "(.+)", line (\d+) in (.+)$', re.MULTILINE)
_WAITING = ("/torch/distributed/", "/bmctl/engine/parallel.py", "/bmctl/engine/sharding/communication.py")


def main_stack(text: str) -> list[tuple[str, int, str]]:
    """File, line and function of the main thread's frames, innermost first: the last thread of a dump."""
    last = re.split(r"^(?:Current thread|Thread) .*$", text, flags=re.MULTILINE)[-1]
    return [(found[1], int(found[2]), found[3]) for found in _FRAME.finditer(last)]


def is_waiting(text: str) -> bool:
    """Whether a dumped stack is that of a process that waits for others: in a collective, or in a shared backward."""
    frames = main_stack(text)[:6]
    return any(part in frame[0] for frame in frames for part in _WAITING) or any(
        frame[2] == "_engine_run_backward" for frame in frames[:1]
    )


def innermost(text: str) -> str:
    """Where a dumped stack stands, in words."""
    frames = main_stack(text)
    return f"{frames[0][2]} ({Path(frames[0][0]).name}:{frames[0][1]})" if frames else ""


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _from(path: Path, offset: int) -> str:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read().decode(errors="replace")
    except OSError:
        return ""
