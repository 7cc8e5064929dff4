"""The side of loader processes: what they do with a request, how they are made, and how it is told how one died."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from bmctl.engine.loading.handover import Form, no_room
from bmctl.engine.loading.order import Plan
from bmctl.engine.loading.split import Empty, Encoded, Tensors
from bmctl.errors import BmctlError, ResourceError

_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_PR_SET_PDEATHSIG = 1
_DEATH_S = 2.0
"""A process whose connection broke may need a moment until it is gone."""


class Batched(Protocol):
    """What a loader reads from: a split."""

    @property
    def in_memory(self) -> bool: ...
    def __len__(self) -> int: ...
    def encoded(self, plan: Plan, *, first: int, every: int) -> Iterator[Encoded]:
        """Arrays of the steps first, first + every, ... of a plan, not finished."""
        ...

    def finished(self, fields: Tensors, *, channels_last: bool = False, empty: Empty | None = None) -> Tensors:
        """Fields as the model takes them, where they are."""
        ...


@dataclass
class Steps:
    """The batch sampler: it sends the plan along with each step, so that processes outlive an epoch."""

    plan: Plan
    num_samples: int

    def __len__(self) -> int:
        return self.num_samples // self.plan.batch_size - self.plan.start_step

    def __iter__(self) -> Iterator[tuple[Plan, int]]:
        plan = self.plan
        return ((plan, step) for step in range(len(self)))


@dataclass
class Desk:
    """In a loader process: makes its share of a plan's batches, one request after another.

    Errors are handed over as values: torch would raise them again with a traceback for a message and without the hint.
    """

    split: Batched
    form: Form
    num_workers: int
    parent: int | None
    _next: tuple[Plan, int] | None = None
    _batches: Iterator[Encoded] = field(default_factory=lambda: iter(()))

    def __getitems__(self, request: tuple[Plan, int]) -> Encoded | BmctlError:
        plan, step = request
        try:
            if request != self._next:
                self._batches = self.split.encoded(plan, first=step, every=self.num_workers)
            self._next = (plan, step + self.num_workers)
            return self.form.tensors(next(self._batches), finish=self.split.finished, shared=True)
        except BmctlError as error:
            self._next = None
            return error


def same(batch: object) -> object:
    return batch


@contextmanager
def starting() -> Iterator[None]:
    """Signals wait: a process forked meanwhile would die of one that came before it could ignore it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _IGNORED)
    try:
        with warnings.catch_warnings():
            # More processes than cores: the recipe asked for them.
            warnings.filterwarnings("ignore", message="This DataLoader will create")
            yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def settle_in(worker: int) -> None:
    """Only the training process reacts to signals; loader processes end when it does, however it ends."""
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    info = torch.utils.data.get_worker_info()
    parent = info.dataset.parent if info is not None else None  # type: ignore[attr-defined]
    # The signal comes when the thread ends that made this process: only the main thread's end is the process's.
    if parent is not None and sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def death(iterator: Any, error: Exception) -> ResourceError | None:
    """Which loader process died, and of what; None if they are all there."""
    workers = iterator._workers if iterator is not None else []
    for worker in workers:
        # torch's handler of SIGCHLD raises wherever it finds this process.
        with contextlib.suppress(RuntimeError):
            worker.join(timeout=_DEATH_S / len(workers))
    dead = [(index, worker.exitcode) for index, worker in enumerate(workers) if worker.exitcode]
    if not dead:
        if "DataLoader worker" not in str(error):
            return None
        return ResourceError(f"a loader process died ({str(error).splitlines()[0]})", hint="--set data.num_workers=0")
    index, code = dead[0]
    if code == -signal.SIGBUS:
        return no_room("bus error")
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
    hint = "see what happens without: --set data.num_workers=0"
    if code == -signal.SIGKILL:
        hint = "when memory is short, the kernel kills: --set data.num_workers=0, or a smaller data.prefetch"
    return ResourceError(f"a loader process died: number {index} {how}", hint=hint)
