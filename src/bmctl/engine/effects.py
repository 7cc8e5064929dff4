"""What runs of a model change beside their outputs: generators, buffers, gradients; kept, and put back."""

from __future__ import annotations

import base64
import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

Buffers = dict[tuple[nn.Module, str], torch.Tensor | None]


@contextmanager
def no_trace(model: nn.Module, device: torch.device) -> Iterator[None]:
    """While the block runs, `model` may be tried; afterwards buffers, gradients and generators are as before.

    Args:
        model: Buffers that it changes in place are copies.
        device: Whose generator is among those that are put back.
    """
    kept, gradients = random_state(device), [(each, each.grad) for each in model.parameters()]
    try:
        with with_buffers(copy_buffers(model)):
            yield
    finally:
        set_random_state(kept, device)
        for weight, gradient in gradients:
            weight.grad = gradient


# -- generators -------------------------------------------------------------------------------------


def seed_all(seed: int, *, stage: str, rank: int = 0) -> None:
    """Seed Python, NumPy and torch, differently for every stage and rank."""
    digest = hashlib.sha256(f"{seed}/{stage}/{rank}".encode()).digest()
    random.seed(digest)
    np.random.seed(int.from_bytes(digest[:4], "little"))
    torch.manual_seed(int.from_bytes(digest[4:12], "little") >> 1)


def random_state(device: torch.device) -> dict[str, Any]:
    """Where this process's generators stand, as JSON."""
    version, numbers, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    state: dict[str, Any] = {
        "python": [version, list(numbers), gauss],
        "numpy": [kind, [int(key) for key in keys], int(position), int(has_gauss), float(cached)],
        "torch": _to_text(torch.get_rng_state()),
    }
    if device.type == "cuda":
        state["cuda"] = _to_text(torch.cuda.get_rng_state(device))
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Put back what `random_state` gave."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_from_text(state["torch"]))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(_from_text(state["cuda"]), device)


def _to_text(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _from_text(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


# -- buffers ----------------------------------------------------------------------------------------


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
