"""What a model would need, found on torch's meta device: shapes without memory or arithmetic."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn

from bmctl.core import memory
from bmctl.engine.modules.blocks import find_blocks
from bmctl.engine.sharding.strategy import Outline

_ROWS = 2  # batch norm refuses to train on a single sample


def on_meta(model: nn.Module) -> nn.Module:
    """A copy of the model without memory; what is tied stays tied."""
    memo: dict[int, object] = {}
    for weight in model.parameters():
        memo[id(weight)] = nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=weight.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, memo)


def outline_of(model: nn.Module, *, sample_shape: Sequence[int] | None) -> Outline:
    """Count a model's parameters, and what one sample leaves behind in a forward pass.

    Args:
        model: On any device; it is not run, a copy without memory is.
        sample_shape: Of one input, without the batch; None traces nothing.
    """
    weights = list(model.parameters())
    blocks = [list(block.parameters()) for block in find_blocks(model).values()]
    inside = {id(weight) for block in blocks for weight in block}
    outside = [weight for weight in weights if id(weight) not in inside]
    traced = _trace(on_meta(model), sample_shape) if sample_shape is not None else None
    return Outline(
        num_params=_count(weights),
        num_trained=_count([weight for weight in weights if weight.requires_grad]),
        num_gathered=_count(outside) + max(map(_count, blocks), default=0),
        activation_bytes=traced[0] if traced else None,
        unused=traced[1] if traced else None,
    )


def memory_at_hand(device: torch.device, *, num_local: int) -> int:
    """Bytes that one of `num_local` processes of this machine may fill: its GPU's, or its part of the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return memory.total_bytes() // num_local


def _trace(model: nn.Module, sample_shape: Sequence[int]) -> tuple[int, tuple[str, ...]] | None:
    """Bytes kept per sample, and the parameters that get no gradient; None for a model that needs real numbers."""
    owned = {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in owned:
            kept[storage._cdata] = storage
        return tensor

    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            outputs = model.train()(torch.empty(_ROWS, *sample_shape, device="meta"))
        num_bytes = sum(storage.nbytes() for storage in kept.values()) // _ROWS
        outputs.sum().backward()
    except (RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError):
        return None
    unused = (name for name, weight in model.named_parameters() if weight.requires_grad and weight.grad is None)
    return num_bytes, tuple(unused)


def _count(weights: Sequence[torch.Tensor]) -> int:
    return sum(weight.numel() for weight in weights)
