"""What loader processes hand over: tensors in shared memory, finished there or where they are used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch

from bmctl.engine.loading.split import Empty, Encoded, Tensors, as_tensor
from bmctl.errors import ResourceError


class Finish(Protocol):
    """`Split.finished`."""

    def __call__(self, fields: Tensors, *, channels_last: bool, empty: Empty) -> Tensors: ...


@dataclass(frozen=True)
class Form:
    """Attributes:
    raw: As encoded, to be finished by whoever takes it.
    channels_last: Memory layout.
    """

    raw: bool
    channels_last: bool

    def tensors(self, batch: Encoded, *, finish: Finish, shared: bool) -> Encoded:
        """The same batch as tensors, its fields finished unless raw."""
        targets = _placed(batch.targets, shared=shared)
        if self.raw:
            return Encoded(_placed(batch.fields, shared=shared), targets)
        fields = finish(
            {name: as_tensor(array) for name, array in batch.fields.items()},
            channels_last=self.channels_last,
            empty=partial(_empty, shared=shared),
        )
        # What finish made no new tensor for is not in shared memory yet.
        return Encoded({name: _moved(each, shared=shared) for name, each in fields.items()}, targets)


def _placed(arrays: Mapping[str, np.ndarray], *, shared: bool) -> Tensors:
    """Contiguous, and where `shared` in shared memory."""
    return {name: _moved(as_tensor(array).contiguous(), shared=shared) for name, array in arrays.items()}


def _moved(tensor: torch.Tensor, *, shared: bool) -> torch.Tensor:
    if not shared or tensor.is_shared():
        return tensor
    return _empty(tuple(tensor.shape), tensor.dtype, shared=True).copy_(tensor)


def _empty(shape: tuple[int, ...], dtype: torch.dtype, *, shared: bool) -> torch.Tensor:
    """Where `shared`, in shared memory from the beginning: moving it there later would be a copy more."""
    if not shared:
        return torch.empty(shape, dtype=dtype)
    size_bytes = int(np.prod(shape)) * dtype.itemsize
    try:
        storage = torch.UntypedStorage._new_shared(size_bytes)
    except RuntimeError as error:
        raise no_room(str(error).splitlines()[0]) from error
    return torch.empty(0, dtype=dtype).set_(storage, 0, shape)  # type: ignore[call-overload]


def no_room(reason: str) -> ResourceError:
    return ResourceError(
        f"no room in /dev/shm to hand batches over ({reason})",
        hint="give it more (docker run --shm-size=2g), lower data.prefetch, or --set data.num_workers=0",
    )
