"""What loader processes hand over: tensors in shared memory, normalised here or where they are used.

n: samples of a batch. c: 1 or 3 channels as they are in the data. C: channels that the model takes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from bmctl.core import images
from bmctl.errors import ResourceError
from bmctl.schema import Preprocess

Pair = tuple[torch.Tensor, torch.Tensor]
"""float32 [n, C, H, W] and int64 [n]."""


@dataclass(frozen=True)
class Form:
    """Attributes:
    raw: As uint8, to be normalised by whoever takes it.
    channels_last: Memory layout.
    """

    raw: bool
    channels_last: bool

    def tensors(self, pixels: np.ndarray, labels: np.ndarray, spec: Preprocess, *, shared: bool) -> Pair:
        """float32 [n, C, H, W], or uint8 [n, H, W, c] where raw; and int64 [n]."""
        if self.raw:
            x = _empty(pixels.shape, torch.uint8, shared=shared)
            x.numpy()[...] = pixels
            return x, torch.from_numpy(labels)
        count, height, width, _ = pixels.shape
        if self.channels_last:
            x = _empty((count, height, width, spec.channels), torch.float32, shared=shared).permute(0, 3, 1, 2)
        else:
            x = _empty((count, spec.channels, height, width), torch.float32, shared=shared)
        images.normalise(pixels, spec, out=x.numpy())
        return x, torch.from_numpy(labels)


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


def normalised(x_nHWc: torch.Tensor, moments: torch.Tensor, *, channels_last: bool) -> torch.Tensor:
    """As `images.normalise`, on the device of `x_nHWc`; moments: float32 [2, C], mean and std."""
    x = ((x_nHWc.to(torch.float32).div_(255) - moments[0]) / moments[1]).permute(0, 3, 1, 2)
    return x if channels_last else x.contiguous()


def no_room(reason: str) -> ResourceError:
    return ResourceError(
        f"no room in /dev/shm to hand batches over ({reason})",
        hint="give it more (docker run --shm-size=2g), lower data.prefetch, or --set data.num_workers=0",
    )
