"""Linear layers of a training step on a CPU with AMX: torch's own products, without what torch spends around them.

torch adds a bias by first copying it into every row of the outputs; oneDNN adds it while it writes them. And where a
weight is far from square, its gradient is sooner found with the smaller of its two factors copied into rows.

x_MI: rows of inputs; w_OI: the weight; b_O: the bias; dy_MO: gradient of the outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional as F

from bmctl.engine.computing.tiles import trains_in_bf16

MIN_OUTPUTS = 2**20
"""Numbers below which it costs as much as it gains."""
MIN_COPIED, MIN_RATIO = 768, 3
"""Columns of the side that is copied, and how many times wider the other one is."""

_native = F.linear


@contextmanager
def tuned() -> Iterator[None]:
    """Compute linear layers with a bias in bf16 on the CPU the faster way, wherever a model calls torch's function.

    It holds for forward passes with gradients; all else, and whatever torch.compile takes over, computes as ever.
    """
    assert F.linear is _native, "already tuned"
    F.linear = _linear
    try:
        yield
    finally:
        F.linear = _native


def _linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """In place of F.linear."""
    if bias is None or not _is_eligible(input, weight, bias):
        return _native(input, weight, bias)
    x_MI = input.to(torch.bfloat16).reshape(-1, input.shape[-1])
    y_MO: torch.Tensor = _Linear.apply(x_MI, weight, bias)
    return y_MO.view(*input.shape[:-1], weight.shape[0])


def _is_eligible(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> bool:
    if not trains_in_bf16(x, weight, bias) or x.dim() < 2 or weight.dim() != 2 or not x.numel():
        return False
    if x.shape[-1] != weight.shape[1] or bias.shape != weight.shape[:1]:
        return False
    return x.numel() // x.shape[-1] * weight.shape[0] >= MIN_OUTPUTS


class _Linear(torch.autograd.Function):
    """In bf16; gradients of weight and bias come in their own types."""

    @staticmethod
    def forward(ctx: Any, x_MI: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        w_OI, b_O = weight.to(torch.bfloat16).contiguous(), bias.to(torch.bfloat16)
        ctx.save_for_backward(x_MI, w_OI, weight)
        ctx.bias_dtype = bias.dtype
        y_MO: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x_MI, w_OI, b_O, "none", [], "")
        return y_MO

    @staticmethod
    def backward(ctx: Any, dy_MO: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_MI, w_OI, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        if torch.is_grad_enabled():
            # A gradient of this gradient is asked for, which has to know where the weight came from.
            w_OI = weight.to(torch.bfloat16)
        with torch.autocast("cpu", enabled=False):
            dx = dy_MO @ w_OI if needs_x else None
            dw = weight_gradient(dy_MO, x_MI).to(weight.dtype) if needs_weight else None
            db = dy_MO.sum(0).to(ctx.bias_dtype) if needs_bias else None
        return dx, dw, db


def weight_gradient(dy_MO: torch.Tensor, x_MI: torch.Tensor) -> torch.Tensor:
    """dw_OI."""
    num_inputs, num_outputs = x_MI.shape[1], dy_MO.shape[1]
    if min(num_inputs, num_outputs) >= MIN_COPIED:
        if num_outputs >= MIN_RATIO * num_inputs:
            return (x_MI.t().contiguous() @ dy_MO).t()
        if num_inputs >= MIN_RATIO * num_outputs:
            return dy_MO.t().contiguous() @ x_MI
    return dy_MO.t() @ x_MI
