"""Batches by torch's DataLoader: in this process, or in loader processes that hand their errors over."""

from __future__ import annotations

import atexit
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader

from bmctl.errors import BmctlError, ResourceError

Batch = tuple[torch.Tensor, torch.Tensor]
"""float32 [n, C, H, W] and int64 [n]."""


class Batched(Protocol):
    def __getitems__(self, indices: np.ndarray) -> Batch: ...


def load(split: Batched, steps: Sequence[np.ndarray], *, num_workers: int) -> Iterator[Batch]:
    """The batches of the given steps, in order, assembled here or by `num_workers` processes.

    Args:
        split: Makes a batch of sample indices.
        steps: int64 [n] sample indices per step.
        num_workers: Processes; 0 does it here.

    Raises:
        BmctlError: What the split raises, in whichever process.
        ResourceError: A loader process died.
    """
    # Its own generator: the iterator's base seed must not be drawn from the global one, which a resumed run restores.
    loader: DataLoader = DataLoader(
        _Guarded(split),  # type: ignore[arg-type]
        batch_sampler=steps,  # type: ignore[arg-type]
        collate_fn=_same,
        num_workers=num_workers,
        generator=torch.Generator(),
        worker_init_fn=_ignore_signals,
    )
    batches = iter(loader)
    # These processes ignore SIGTERM, so multiprocessing's own farewell would wait for them for ever.
    end = getattr(batches, "_shutdown_workers", lambda: None)
    atexit.register(end)
    try:
        for batch in batches:
            if isinstance(batch, BmctlError):
                raise batch
            yield batch
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise ResourceError(
            f"a loader process died ({str(error).splitlines()[0]})",
            hint="--set data.num_workers=0, or give /dev/shm and memory more room",
        ) from error
    finally:
        end()
        atexit.unregister(end)


@dataclass(frozen=True)
class _Guarded:
    """Hands errors over as values: torch would raise them again with a traceback for a message and without the hint."""

    split: Batched

    def __getitems__(self, indices: np.ndarray) -> Batch | BmctlError:
        try:
            return self.split.__getitems__(indices)
        except BmctlError as error:
            return error


def _same(batch: object) -> object:
    return batch


def _ignore_signals(worker: int) -> None:
    """Only the training process reacts to signals; loader processes end when it does."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
