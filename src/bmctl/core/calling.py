"""Calling a module by position, and naming what it gives: the one convention for any model of any library."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from bmctl.errors import UnsupportedError


def call(model: Any, fields: Iterable[torch.Tensor], *, gives: Sequence[str]) -> dict[str, torch.Tensor]:
    """The outputs of a module, by name.

    Args:
        model: Called by position: libraries call the same thing `x`, `input_ids` or `pixel_values`.
        fields: What it takes, in its own order.
        gives: Names of its outputs; what it gives besides is left out.

    Raises:
        UnsupportedError: It gives something else than tensors, or fewer.
    """
    return named(model(*fields), gives=gives)


def named(outputs: Any, *, gives: Sequence[str]) -> dict[str, torch.Tensor]:
    """A tensor, a sequence of tensors, or a mapping such as transformers' ModelOutput, as {name: tensor}."""
    if isinstance(outputs, torch.Tensor):
        found = {gives[0]: outputs}
    elif isinstance(outputs, Mapping):
        found = {name: outputs[name] for name in gives if name in outputs}
    elif isinstance(outputs, list | tuple):
        found = dict(zip(gives, outputs, strict=False))
    else:
        found = {}
    if len(found) < len(gives) or not all(isinstance(tensor, torch.Tensor) for tensor in found.values()):
        raise UnsupportedError(
            f"the model gives {_described(outputs)}, expected {', '.join(gives)}",
            hint="wrap it in a module that returns these tensors, in this order",
        )
    return found


def tensors_of(outputs: Any) -> list[torch.Tensor]:
    """Every tensor in what a module gave, however it is wrapped."""
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]


def is_channels_last(tensor: torch.Tensor) -> bool:
    """Whether a memory layout for images applies: ids, masks and vectors have none."""
    return tensor.dim() == 4 and tensor.is_floating_point()


def device_of(model: nn.Module) -> torch.device:
    """Where the first parameter or buffer lies; the CPU for a module without any."""
    held = next(chain(model.parameters(), model.buffers()), None)
    return held.device if held is not None else torch.device("cpu")


def _described(outputs: Any) -> str:
    if isinstance(outputs, torch.Tensor):
        return f"one tensor {list(outputs.shape)}"
    if isinstance(outputs, Mapping):
        return f"a {type(outputs).__name__} of {', '.join(map(str, outputs)) or 'nothing'}"
    if isinstance(outputs, list | tuple):
        return f"a {type(outputs).__name__} of {len(outputs)}"
    return f"a {type(outputs).__name__}"
