"""What a model would need, found on torch's meta device: shapes without memory or arithmetic."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bmctl.core import memory
from bmctl.engine.batch import blank, call
from bmctl.engine.modules.blocks import find_blocks
from bmctl.engine.sharding.strategy import Outline
from bmctl.errors import first_line
from bmctl.schema import BATCH, TensorSpec

_ROWS = 2  # batch norm refuses to train on a single sample
# What a model raises whose forward pass looks at numbers, or that is not made for these shapes.
_FAILURES = (
    RuntimeError, AssertionError, AttributeError, LookupError, NotImplementedError, TypeError, ValueError,
)  # fmt: skip


def on_meta(model: nn.Module) -> nn.Module:
    """A copy of the model without memory; what is tied stays tied."""
    memo: dict[int, object] = {}
    for weight in model.parameters():
        memo[id(weight)] = nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=weight.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, memo)


def outline_of(
    model: nn.Module, *, given: Sequence[TensorSpec], gives: Sequence[str], sizes: Mapping[str, int] | None = None
) -> Outline:
    """Count a model's parameters, and what one sample leaves behind in a forward pass.

    Args:
        model: On any device; it is not run, a copy without memory is.
        given: What it takes, in order.
        gives: Names of its outputs.
        sizes: Of the free axes of `given`, but for that of the samples.
    """
    weights = list(model.parameters())
    blocks = [list(block.parameters()) for block in find_blocks(model).values()]
    inside = {id(weight) for block in blocks for weight in block}
    outside = [weight for weight in weights if id(weight) not in inside]
    num_bytes, unused, why = _trace(model, given, gives, sizes or {})
    return Outline(
        num_params=_count(weights),
        num_trained=_count([weight for weight in weights if weight.requires_grad]),
        num_gathered=_count(outside) + max(map(_count, blocks), default=0),
        activation_bytes=num_bytes,
        unused=unused,
        untraced=why,
    )


def memory_at_hand(device: torch.device, *, num_local: int) -> int:
    """Bytes that one of `num_local` processes of this machine may fill: its GPU's, or its part of the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return memory.total_bytes() // num_local


def _trace(
    model: nn.Module, given: Sequence[TensorSpec], gives: Sequence[str], sizes: Mapping[str, int]
) -> tuple[int | None, tuple[str, ...] | None, str]:
    """Bytes kept per sample, and the parameters that get no gradient; None and why for a model that needs numbers.

    The tensors are torch's fake ones: transformers ask plain meta tensors whether a mask masks anything.
    """
    owned: set[int] = set()
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in owned:
            kept[storage._cdata] = storage
        return tensor

    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            traced = on_meta(model).train()
            owned |= {tensor.untyped_storage()._cdata for tensor in [*traced.parameters(), *traced.buffers()]}
            batch = blank(given, sizes={**sizes, BATCH: _ROWS}, device=torch.device("meta"))
            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                outputs = call(traced, batch, takes=[spec.name for spec in given], gives=gives)
            num_bytes = sum(storage.nbytes() for storage in kept.values()) // _ROWS
            torch.autograd.backward([each.sum() for each in outputs.values() if each.requires_grad])
    except _FAILURES as error:
        return None, None, f"{type(error).__name__}: {first_line(error)}"
    unused = (name for name, weight in traced.named_parameters() if weight.requires_grad and weight.grad is None)
    return num_bytes, tuple(unused), ""


def _count(weights: Sequence[torch.Tensor]) -> int:
    return sum(weight.numel() for weight in weights)
