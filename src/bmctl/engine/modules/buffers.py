"""What a forward pass changes beside its outputs: batch statistics, counters, observers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

Buffers = dict[tuple[nn.Module, str], torch.Tensor | None]


def copy_buffers(model: nn.Module) -> Buffers:
    """All buffers as they are now, by owner and name, those that a checkpoint leaves out too."""
    return {
        (module, name): buffer.clone() if buffer is not None else None
        for module in model.modules()
        for name, buffer in module._buffers.items()
    }


@contextmanager
def with_buffers(buffers: Buffers) -> Iterator[None]:
    """While the block runs, the modules read and change `buffers`; their own come to no harm."""
    own = {(module, name): module._buffers[name] for module, name in buffers}
    _put(buffers)
    try:
        yield
    finally:
        _put(own)


def _put(buffers: Buffers) -> None:
    for (module, name), buffer in buffers.items():
        module._buffers[name] = buffer
