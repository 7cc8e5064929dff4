"""The last step to a model's input, on the host or on the device; bit for bit the same on both.

n: images of a batch. H, W: pixels. c: 1 or 3 channels as they are in the data. C: channels that the model takes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch

from bmctl.inputs.image.pixels import normalise
from bmctl.inputs.image.spec import Spec

Empty = Callable[[tuple[int, ...], torch.dtype], torch.Tensor]


def finish(x_nHWc: torch.Tensor, spec: Spec, *, channels_last: bool, empty: Empty | None = None) -> torch.Tensor:
    """uint8 [n, H, W, c] to float32 [n, C, H, W], where it is.

    Args:
        x_nHWc: On the host in one pass over memory, elsewhere with torch.
        spec: Channels, mean and std.
        channels_last: Memory layout.
        empty: Makes the tensor on the host; None is torch's.
    """
    if x_nHWc.device.type != "cpu":
        return on_device(x_nHWc, spec, channels_last=channels_last)
    count, height, width, _ = x_nHWc.shape
    make = empty or _empty
    if channels_last:
        x = make((count, height, width, spec.channels), torch.float32).permute(0, 3, 1, 2)
    else:
        x = make((count, spec.channels, height, width), torch.float32)
    normalise(x_nHWc.numpy(), spec, out=x.numpy())
    return x


def on_device(x_nHWc: torch.Tensor, spec: Spec, *, channels_last: bool) -> torch.Tensor:
    """As `pixels.normalise`, on the device of `x_nHWc`."""
    moments = _moments(tuple(spec.mean), tuple(spec.std), x_nHWc.device)
    x = ((x_nHWc.to(torch.float32).div_(255) - moments[0]) / moments[1]).permute(0, 3, 1, 2)
    return x if channels_last else x.contiguous()


@lru_cache(maxsize=8)
def _moments(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """float32 [2, C], copied to the device once."""
    return torch.tensor([mean, std], dtype=torch.float32).to(device)


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)
