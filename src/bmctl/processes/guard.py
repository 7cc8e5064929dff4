"""A command's work in a process of its own, so that its death can be told: the parent waits, and does nothing else.

A crash in native code (SIGSEGV, SIGABRT) or the kernel's OOM killer ends a process before it can say a word. The parent
is forked before torch is loaded, which costs a millisecond and some pages of memory; the child has the same terminal,
process group, streams and environment, and dies with its parent. What the child notes of its work, and the stacks that
faulthandler dumps when it crashes, go to a file in memory that both hold.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bmctl.disk import disk_errors
from bmctl.errors import ResourceError, WorkerError
from bmctl.job import Logs, is_worker
from bmctl.processes.attempts import Attempts
from bmctl.processes.signals import STOP_SIGNALS
from bmctl.verdict import crash_lines, how_ended

SAME_S = 0.1
"""Within so long a signal to the whole process group reaches both processes, and sent twice it is meant once."""
FORGET_S = 1.0
LOG = "crash.log"

ROOM = 2**16
"""Bytes for the line that a child notes; faulthandler writes behind them."""

_record: int | None = None
_noted: dict[str, str] = {}


def guarded(work: Callable[[], int], *, again: Sequence[str]) -> int:
    """Do `work` in a child process, and tell how that ended where it cannot tell itself.

    Workers of torchrun do it here, as somebody else waits for them; and so do all where the kernel does not end a
    child together with its parent (PR_SET_PDEATHSIG is Linux's).

    Args:
        work: Its return value is the process's exit code. In the child this function returns or raises as `work` does.
        again: The command line that goes on after a death, without the program: a command, and what it is given.

    Returns:
        What `work` returns, in the child. The parent ends as the child does: with its exit code, or by the signal to
        stop that came before anybody caught it.

    Raises:
        WorkerError: In the parent: the child was killed.
        ResourceError: There can be no child.
    """
    if is_worker() or sys.platform != "linux":
        return work()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not stream.closed:
            stream.flush()
    record, (heard, hears) = os.memfd_create("bmctl"), os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored by whoever started us, a child's end would be lost
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {*STOP_SIGNALS, signal.SIGCHLD})
    parent = os.getpid()
    try:
        child = os.fork()
    except OSError as error:
        raise ResourceError(f"no process can be started: {error.strerror}", hint="see: ulimit -u") from error
    if child == 0:
        os.close(heard)
        _settle_in(parent, record, hears)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return work()
    os.close(hears)
    status = _wait(child, heard)
    if os.WIFEXITED(status):
        os._exit(os.WEXITSTATUS(status))  # all is said and flushed: there is nothing left to do here
    signum = os.WTERMSIG(status)
    if signum in STOP_SIGNALS:
        signal.signal(signum, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signum})
        os.kill(parent, signum)
    raise _Death.read(child, signum, record).told(again)


# -- the child ----------------------------------------------------------------------------------------


def _settle_in(parent: int, record: int, hears: int) -> None:
    global _record
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(137)
    signal.set_wakeup_fd(hears, warn_on_full_buffer=False)
    os.lseek(record, ROOM, os.SEEK_SET)
    faulthandler.enable(file=record)
    _record = record


def note(**fields: str) -> None:
    """Keep `run` or `stage`, of the work that is being done, for the parent; elsewhere nothing happens."""
    if not fields.items() <= _noted.items():
        _keep({**_noted, **fields, "at": ""})


def beat(step: int, doing: str) -> None:
    """Keep how far the work is; see StageContext.beat."""
    if step >= 0:
        _keep({**_noted, "at": f" after step {step}, {doing}"})


def _keep(fields: Mapping[str, str]) -> None:
    if _record is not None:
        _noted.update(fields)
        os.pwrite(_record, json.dumps(_noted).encode() + b"\n", 0)


# -- the parent ---------------------------------------------------------------------------------------


def _wait(child: int, heard: int) -> int:
    """Until the child has ended: its status. Signals that reached this process alone are handed on.

    Ctrl-C, `timeout` and `kill %1` reach the child as well, which would take a second one for a second order: it says
    what it got, down to the moment, through the pipe that Python's own handler writes to.
    """
    while True:
        found = signal.sigtimedwait({*STOP_SIGNALS, signal.SIGCHLD}, FORGET_S)
        if found is None:
            _read(heard)
        elif found.si_signo == signal.SIGCHLD:
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                return status
        else:
            time.sleep(SAME_S)
            if found.si_signo not in _read(heard):
                os.kill(child, found.si_signo)
                time.sleep(SAME_S)
                _read(heard)  # its echo
            while signal.sigtimedwait({found.si_signo}, 0):
                """Sent twice, meant once."""


def _read(heard: int) -> bytes:
    """Numbers of the signals that the child got since the last call."""
    try:
        return os.read(heard, 2**16)
    except BlockingIOError:
        return b""


@dataclass(frozen=True)
class _Death:
    """How a child died.

    Attributes:
        run: What it worked on; None if it had not come to that, or needs none.
        stage: Of the run; empty before the first.
        at: How far it was, in words; empty where there are no steps.
        dump: What faulthandler wrote.
    """

    pid: int
    signum: int
    run: Path | None
    stage: str
    at: str
    dump: str

    @classmethod
    def read(cls, pid: int, signum: int, record: int) -> _Death:
        kept = os.pread(record, os.fstat(record).st_size, 0)
        line, dump = kept[:ROOM].partition(b"\n")[0].strip(b"\0"), kept[ROOM:].decode(errors="replace")
        noted = json.loads(line or "{}")
        run = Path(noted["run"]) if "run" in noted else None
        # What a loader process left when it crashed is not the stack of one that the kernel killed.
        return cls(
            pid, signum, run, noted.get("stage", ""), noted.get("at", ""), "" if signum == signal.SIGKILL else dump
        )

    def told(self, again: Sequence[str]) -> WorkerError:
        """What to tell, and keep: the stacks in the run's logs, the cause with the starts of its training."""
        brief = f"{self.stage or again[0]} {how_ended(-self.signum)}{self.at}"
        hints = []
        if self.run is not None:
            Attempts(self.run, self.stage).killed(brief)
            if self.dump:
                hints.append(f"the stacks are in {self._log(brief)}")
        if self.signum == signal.SIGKILL:
            hints.append("when memory is short, the kernel kills: take smaller batches, or fewer data.num_workers")
        hints.append(f"what is published is kept; to go on: {shlex.join(['bmctl', *again])}")
        return WorkerError("\n".join([brief, *crash_lines(self.dump.splitlines())]), hint="; ".join(hints))

    def _log(self, brief: str) -> Path:
        assert self.run is not None
        log = Logs(self.run).folder / LOG
        with disk_errors(log):
            log.parent.mkdir(exist_ok=True)
            with log.open("a", encoding="utf-8") as file:
                file.write(f"=== {time.strftime('%Y-%m-%d %H:%M:%S')} process {self.pid}: {brief}\n{self.dump}\n")
        return log
