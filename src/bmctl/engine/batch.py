"""Batches: named tensors from a task's feed to its loss, and the one way in which a model is called with them.

Samples lie along axis 0 of every tensor; a tensor without axes is shared by all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from bmctl.core.calling import is_channels_last, named
from bmctl.schema import BATCH, TensorSpec

Batch = dict[str, torch.Tensor]
"""Flat: what the model takes, in its order, then what its outputs are held against."""


def call(
    model: Callable[..., Any], batch: Mapping[str, torch.Tensor], *, takes: Sequence[str], gives: Sequence[str]
) -> Batch:
    """The outputs of a model, by name.

    Args:
        model: Is called by position, as models do not agree on the names of what they take.
        batch: Holds at least what the model takes.
        takes: Names of what it takes, in order.
        gives: Names of what it gives: one for a tensor, one for each element of a tuple or a list from its beginning,
            or keys of a dict, such as the outputs of transformers.

    Raises:
        UnsupportedError: It gives something else.
    """
    return named(model(*[batch[name] for name in takes]), gives=gives)


def num_rows(batch: Mapping[str, torch.Tensor]) -> int:
    """Samples of a batch."""
    return next(len(tensor) for tensor in batch.values() if tensor.dim())


def rows(batch: Mapping[str, torch.Tensor], index: slice | torch.Tensor) -> Batch:
    """Some of the samples."""
    return {name: tensor[index] if tensor.dim() else tensor for name, tensor in batch.items()}


def chunks(batch: Batch, count: int) -> list[Batch]:
    """The samples in `count` equal parts; the last one is smaller where they do not divide."""
    if count == 1:
        return [batch]
    num = num_rows(batch)
    size = -(-num // count)
    return [rows(batch, slice(start, start + size)) for start in range(0, num, size)]


def moved(batch: Mapping[str, torch.Tensor], device: torch.device) -> Batch:
    """On a device; from page-locked memory without waiting."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def channels_last(batch: Mapping[str, torch.Tensor]) -> Batch:
    """In the layout that convolutions are fastest in: for images, and nothing else."""
    return {
        name: tensor.contiguous(memory_format=torch.channels_last) if is_channels_last(tensor) else tensor
        for name, tensor in batch.items()
    }


def free_sizes(batch: Mapping[str, torch.Tensor], given: Sequence[TensorSpec]) -> dict[str, int]:
    """How long the free axes of `given` are in a batch, but for that of the samples."""
    return {
        axis: size
        for spec in given
        for axis, size in zip(spec.shape, batch[spec.name].shape, strict=True)
        if isinstance(axis, str) and axis != BATCH
    }


def blank(given: Sequence[TensorSpec], *, sizes: Mapping[str, int], device: torch.device) -> Batch:
    """A batch whose numbers nobody set.

    Args:
        given: What the model takes.
        sizes: Of all free axes, the samples' among them.
    """
    return {
        spec.name: torch.empty(
            [size if isinstance(size, int) else sizes[size] for size in spec.shape],
            dtype=getattr(torch, spec.dtype),
            device=device,
        )
        for spec in given
    }
