"""Batches by torch's DataLoader: in this process, or in loader processes that stay for a whole training.

n: samples of a batch. c: 1 or 3 channels as they are in the data. C: channels that the model takes.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader

from bmctl.core import images
from bmctl.engine.batch import Batch
from bmctl.engine.loading.handover import Form, Pair, no_room, normalised
from bmctl.engine.loading.order import Plan
from bmctl.errors import BmctlError, DataError, ResourceError
from bmctl.schema import Preprocess

QUICK_MS = 2.0
"""A batch from memory that takes no longer is made where it is used: handing it over would cost as much."""
MOST_WORKERS = 16
_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_PR_SET_PDEATHSIG = 1
_DEATH_S = 2.0
"""A process whose connection broke may need a moment until it is gone."""


class Batched(Protocol):
    """What a loader reads from: a split."""

    @property
    def preprocess(self) -> Preprocess: ...
    @property
    def in_memory(self) -> bool: ...
    def __len__(self) -> int: ...
    def pixel_batches(self, plan: Plan, *, first: int, every: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """uint8 [n, H, W, c] and int64 [n] of the steps first, first + every, ... of a plan."""
        ...


@dataclass
class Loader:
    """The batches of one process, epoch by epoch; `open_loader` makes and closes it.

    Attributes:
        device: Where batches are put; None leaves them in memory.
        raw: Loader processes hand over uint8, a quarter of the bytes, and `device` normalises.
    """

    split: Batched
    plan: Plan
    num_workers: int
    prefetch: int
    pin: bool
    device: torch.device | None
    channels_last: bool
    raw: bool
    _steps: _Steps = field(init=False)
    _loader: DataLoader | None = field(init=False, default=None)
    _iterator: Any = field(init=False, default=None)
    _moments: torch.Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._steps = _Steps(self.plan, len(self.split))

    def batches(self, *, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """The rest of an epoch; an iterator that was left half-way ends when the next one begins.

        Args:
            epoch: Of order and augmentation.
            start_step: Steps of this epoch that are done already.

        Raises:
            DataError: A file that cannot be read.
            ResourceError: A loader process died, or there is no room to hand batches over.
        """
        self._steps.plan = plan = replace(self.plan, epoch=epoch, start_step=start_step)
        form = Form(self.raw, self.channels_last)
        if self.num_workers == 0:
            for pixels, labels in self.split.pixel_batches(plan, first=0, every=1):
                x, y = form.tensors(pixels, labels, self.split.preprocess, shared=False)
                yield self._finished(x.pin_memory(), y.pin_memory()) if self.pin else self._finished(x, y)
            return
        try:
            with _starting():
                self._loader = self._loader or self._made(form)
                self._iterator = iter(self._loader)
            for batch in self._iterator:
                if isinstance(batch, BmctlError):
                    raise batch
                yield self._finished(*batch)
        except (RuntimeError, OSError, EOFError) as error:
            # Of what the process held in shared memory, nothing can be had any more either: that fails in many ways.
            death = _death(self._iterator, error)
            if death is None:
                raise
            raise death from error

    def close(self) -> None:
        """End the loader processes."""
        # They ignore SIGTERM, so multiprocessing's own farewell would wait for them for ever.
        if self._iterator is not None:
            self._iterator._shutdown_workers()
        self._loader = self._iterator = None

    def _made(self, form: Form) -> DataLoader:
        tied = threading.current_thread() is threading.main_thread()
        return DataLoader(
            _Desk(self.split, form, self.num_workers, parent=os.getpid() if tied else None),  # type: ignore[arg-type]
            batch_sampler=self._steps,  # type: ignore[arg-type]
            collate_fn=_same,
            num_workers=self.num_workers,
            prefetch_factor=self.prefetch,
            persistent_workers=True,
            pin_memory=self.pin,
            # Arrays in memory are shared with a forked process, not copied.
            multiprocessing_context="fork",
            # Its own: the base seed must not be drawn from the global generator, which a resumed run restores.
            generator=torch.Generator(),
            worker_init_fn=_settle_in,
        )

    def _finished(self, x: torch.Tensor, y: torch.Tensor) -> Batch:
        if self.device is not None:
            x, y = x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)
        if not self.raw:
            return {"input": x, "label": y}
        if self._moments is None or self._moments.device != x.device:
            spec = self.split.preprocess
            self._moments = torch.tensor([spec.mean, spec.std], dtype=torch.float32).to(x.device)
        return {"input": normalised(x, self._moments, channels_last=self.channels_last), "label": y}


@contextmanager
def open_loader(
    split: Batched,
    *,
    seed: int,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    num_workers: int = 0,
    prefetch: int = 2,
    pin: bool = False,
    device: torch.device | None = None,
    channels_last: bool = False,
) -> Iterator[Loader]:
    """A loader whose processes start with its first batch and stay until the `with` block is left.

    Args:
        split: What to train on.
        seed: Of order and augmentation.
        batch_size: Samples of a step over all processes.
        rank: This process; it gets its slice of every batch.
        world: Number of processes.
        num_workers: Processes that decode and assemble; 0 does it here. The batches are the same.
        prefetch: Batches that each of them prepares ahead.
        pin: Page-locked memory, from which copies to a GPU need not be waited for.
        device: Where batches are put; a GPU normalises them, too. None leaves them in memory.
        channels_last: The memory layout of the batches.

    Raises:
        DataError: Fewer samples than one step.
    """
    if batch_size % world:
        raise ValueError(f"batch_size {batch_size} does not divide by {world} processes")
    if len(split) < batch_size:
        raise DataError(
            f"the training split has {len(split)} samples, fewer than one step of {batch_size}",
            hint=f"--set train.batch_size={max(1, len(split) // 2)}",
        )
    loader = Loader(
        split=split,
        plan=Plan(seed=seed, epoch=0, batch_size=batch_size, rank=rank, world=world),
        num_workers=num_workers,
        prefetch=prefetch,
        pin=pin,
        device=device,
        channels_last=channels_last,
        raw=device is not None and device.type != "cpu",
    )
    atexit.register(loader.close)
    try:
        yield loader
    finally:
        loader.close()
        atexit.unregister(loader.close)


def choose_workers(
    split: Batched,
    *,
    asked: int | Literal["auto"],
    batch_size: int,
    device: torch.device,
    num_cores: int,
    local_world: int = 1,
) -> tuple[int, str]:
    """How many loader processes a training process gets, and why.

    On GPUs all but one of the process's share of the cores; on the CPU, where the cores compute, a quarter, but one at
    least where there are two cores. None for data in memory whose batches take up to QUICK_MS.

    Args:
        split: What to train on.
        asked: What the recipe says.
        batch_size: Samples of a step in one process.
        device: Where it computes.
        num_cores: Of this machine.
        local_world: Training processes on this machine.
    """
    if asked != "auto":
        return asked, "as the recipe says"
    if split.in_memory:
        took_ms = _batch_ms(split, batch_size)
        if took_ms <= QUICK_MS:
            return 0, f"a batch from memory takes {took_ms:.1f} ms"
    share = max(1, num_cores // local_world)
    if device.type == "cuda":
        return min(max(1, share - 1), MOST_WORKERS), f"all but one of {share} cores per process"
    if share == 1:
        return 0, "one core per process"
    return min(max(1, share // 4), MOST_WORKERS), f"a quarter of {share} cores per process, at least 1"


def _batch_ms(split: Batched, batch_size: int) -> float:
    plan = Plan(seed=0, epoch=0, batch_size=min(batch_size, len(split)))
    batches = split.pixel_batches(plan, first=0, every=1)
    next(batches)
    times = []
    for _ in range(3):
        began = time.perf_counter()
        pixels = next(batches, None)
        if pixels is None:
            batches = split.pixel_batches(plan, first=0, every=1)
            pixels = next(batches)
        images.normalise(pixels[0], split.preprocess)
        times.append(time.perf_counter() - began)
    return min(times) * 1000


# -- loader processes -------------------------------------------------------------------------------


@dataclass
class _Steps:
    """The batch sampler: it sends the plan along with each step, so that processes outlive an epoch."""

    plan: Plan
    num_samples: int

    def __len__(self) -> int:
        return self.num_samples // self.plan.batch_size - self.plan.start_step

    def __iter__(self) -> Iterator[tuple[Plan, int]]:
        plan = self.plan
        return ((plan, step) for step in range(len(self)))


@dataclass
class _Desk:
    """In a loader process: makes its share of a plan's batches, one request after another.

    Errors are handed over as values: torch would raise them again with a traceback for a message and without the hint.
    """

    split: Batched
    form: Form
    num_workers: int
    parent: int | None
    _next: tuple[Plan, int] | None = None
    _batches: Iterator[tuple[np.ndarray, np.ndarray]] = field(default_factory=lambda: iter(()))

    def __getitems__(self, request: tuple[Plan, int]) -> Pair | BmctlError:
        plan, step = request
        try:
            if request != self._next:
                self._batches = self.split.pixel_batches(plan, first=step, every=self.num_workers)
            self._next = (plan, step + self.num_workers)
            return self.form.tensors(*next(self._batches), self.split.preprocess, shared=True)
        except BmctlError as error:
            self._next = None
            return error


def _same(batch: object) -> object:
    return batch


@contextmanager
def _starting() -> Iterator[None]:
    """Signals wait: a process forked meanwhile would die of one that came before it could ignore it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _IGNORED)
    try:
        with warnings.catch_warnings():
            # More processes than cores: the recipe asked for them.
            warnings.filterwarnings("ignore", message="This DataLoader will create")
            yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _settle_in(worker: int) -> None:
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


def _death(iterator: Any, error: Exception) -> ResourceError | None:
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
