"""Convolutions of single pixels with a stride, where oneDNN would write past the end of its memory.

For the gradient of the weights of such a layer oneDNN copies the pixels that are taken into a buffer, in whole vectors
of 8 or 16 channels, though it has room for no more channels than there are: with fewer, in channels_last, it
overwrites what lies behind. The process is killed by SIGSEGV or SIGABRT, at once or later, or waits for ever, or
gradients are wrong. timm's repvgg, mobileone and fastvit have such layers, and structured pruning makes them. Here the
pixels are taken first, and what is convolved has no stride.
Source: https://github.com/uxlfoundation/oneDNN/issues/6035 (open; oneDNN 3.x up to that of torch 2.14)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional as F

NUM_LANES = 16
"""Channels in oneDNN's widest vector; with so many, and more, it stays within bounds."""

Sizes = int | tuple[int, ...]

_native = F.conv2d


def concerned(model: nn.Module) -> list[str]:
    """Names of the layers of a model that would be hit in channels_last on a CPU."""
    layers = ((name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d))
    return [name for name, layer in layers if _is_concerned(layer.weight, layer.stride, layer.padding, layer.groups)]


@contextmanager
def within_bounds() -> Iterator[None]:
    """While the block runs, such layers may be trained; all others compute as ever."""
    assert F.conv2d is _native, "already within bounds"
    F.conv2d = _conv2d  # type: ignore[assignment]
    try:
        yield
    finally:
        F.conv2d = _native


def _conv2d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    groups: int = 1,
) -> torch.Tensor:
    """In place of F.conv2d, by which the layers of torch, torchvision and timm convolve."""
    is_trained = weight.requires_grad and torch.is_grad_enabled()
    if is_trained and not input.is_contiguous() and _is_concerned(weight, stride, padding, groups):
        rows, columns = _pair(stride)
        return _native(input[..., ::rows, ::columns], weight, bias)
    return _native(input, weight, bias, stride, padding, dilation, groups)


def _is_concerned(weight: torch.Tensor, stride: Sizes, padding: Sizes | str, groups: int) -> bool:
    """Whether kernels [out_channels, channels, height, width] are single pixels, few, and moved with a stride."""
    is_unpadded = padding == "valid" if isinstance(padding, str) else _pair(padding) == (0, 0)
    is_pixel = tuple(weight.shape[2:]) == (1, 1) and is_unpadded
    return is_pixel and groups == 1 and weight.shape[1] < NUM_LANES and _pair(stride) != (1, 1)


def _pair(sizes: Sizes) -> tuple[int, int]:
    """One size for both axes, or one for each."""
    return (sizes, sizes) if isinstance(sizes, int) else (sizes[0], sizes[-1])
