"""Batches by torch's DataLoader: in this process, or in loader processes that stay for a whole training."""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader

from bmctl.engine.batch import Batch
from bmctl.engine.loading.desk import Batched, Desk, Steps, death, same, settle_in, starting
from bmctl.engine.loading.handover import Form
from bmctl.engine.loading.order import Plan
from bmctl.engine.loading.split import Encoded
from bmctl.errors import BmctlError, DataError

QUICK_MS = 2.0
"""A batch from memory that takes no longer is made where it is used: handing it over would cost as much."""
MOST_WORKERS = 16


@dataclass
class Loader:
    """The batches of one process, epoch by epoch; `open_loader` makes and closes it.

    Attributes:
        device: Where batches are put; None leaves them in memory.
        raw: Loader processes hand fields over as they are encoded, such as uint8 pixels, and `device` finishes them.
    """

    split: Batched
    plan: Plan
    num_workers: int
    prefetch: int
    pin: bool
    device: torch.device | None
    channels_last: bool
    raw: bool
    _steps: Steps = field(init=False)
    _loader: DataLoader | None = field(init=False, default=None)
    _iterator: Any = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._steps = Steps(self.plan, len(self.split))

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
            for arrays in self.split.encoded(plan, first=0, every=1):
                yield self._finished(form.tensors(arrays, finish=self.split.finished, shared=False), pin=self.pin)
            return
        try:
            with starting():
                self._loader = self._loader or self._made(form)
                self._iterator = iter(self._loader)
            for batch in self._iterator:
                if isinstance(batch, BmctlError):
                    raise batch
                yield self._finished(batch)
        except (RuntimeError, OSError, EOFError) as error:
            # Of what the process held in shared memory, nothing can be had any more either: that fails in many ways.
            told = death(self._iterator, error)
            if told is None:
                raise
            raise told from error

    def close(self) -> None:
        """End the loader processes."""
        # They ignore SIGTERM, so multiprocessing's own farewell would wait for them for ever.
        if self._iterator is not None:
            self._iterator._shutdown_workers()
        self._loader = self._iterator = None

    def _made(self, form: Form) -> DataLoader:
        tied = threading.current_thread() is threading.main_thread()
        return DataLoader(
            Desk(self.split, form, self.num_workers, parent=os.getpid() if tied else None),  # type: ignore[arg-type]
            batch_sampler=self._steps,  # type: ignore[arg-type]
            collate_fn=same,
            num_workers=self.num_workers,
            prefetch_factor=self.prefetch,
            persistent_workers=True,
            pin_memory=self.pin,
            # Arrays in memory are shared with a forked process, not copied.
            multiprocessing_context="fork",
            # Its own: the base seed must not be drawn from the global generator, which a resumed run restores.
            generator=torch.Generator(),
            worker_init_fn=settle_in,
        )

    def _finished(self, batch: Encoded, *, pin: bool = False) -> Batch:
        fields, targets = ({name: self._placed(each, pin=pin) for name, each in part.items()} for part in batch)
        if self.raw:
            fields = self.split.finished(fields, channels_last=self.channels_last)
        return {**fields, **targets}

    def _placed(self, tensor: torch.Tensor, *, pin: bool) -> torch.Tensor:
        tensor = tensor.pin_memory() if pin else tensor
        return tensor if self.device is None else tensor.to(self.device, non_blocking=True)


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
        device: Where batches are put; a GPU finishes them, too. None leaves them in memory.
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
    plan, form = Plan(seed=0, epoch=0, batch_size=min(batch_size, len(split))), Form(False, False)
    batches = split.encoded(plan, first=0, every=1)
    next(batches)
    times = []
    for _ in range(3):
        began = time.perf_counter()
        arrays = next(batches, None)
        if arrays is None:
            batches = split.encoded(plan, first=0, every=1)
            arrays = next(batches)
        form.tensors(arrays, finish=split.finished, shared=False)
        times.append(time.perf_counter() - began)
    return min(times) * 1000
