"""Attention of a training step on a CPU, with a backward pass of whole matrix products.

torch's flash kernel computes the backward pass in tiles of fp32 that the matrix units see little of, and up to 767
queries in small ones; there the products of whole heads take half of its time or less. Attention matrices that are
small are computed here and kept in bf16 from forward to backward. Of others the forward pass is torch's, and they are
computed again, some samples at a time.

B: samples. H: heads. N, M: queries and keys. D: numbers of a head. With scores s = scale * q k^T, p = softmax(s) and
outputs o = p v, the gradients are dv = p^T do, ds = p * (do v^T - sum(do * o)), dq = scale * ds k and
dk = scale * ds^T q.
Source: Dao et al., "FlashAttention", arXiv 2205.14135, appendix B.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional as F

from bmctl.engine.computing.tiles import trains_in_bf16

MAX_SCORES = 2**22
"""Numbers of the attention matrices that are there at a time: 16 MiB in fp32."""

MAX_QUERIES = 767
"""From 768 on torch's tiles are as large as to cost no more than products.

Source: q_split_size in aten/src/ATen/native/cpu/FlashAttentionKernel.cpp
"""
MOST_KEPT = 8
"""Keys per number of a head up to which attention matrices are kept: twice the memory of q, k, v and o."""

_native = F.scaled_dot_product_attention


@contextmanager
def tuned() -> Iterator[None]:
    """Compute gradients of attention in bf16 on the CPU the faster way, wherever a model calls torch's function.

    It holds for what has no mask and no dropout; all else, and whatever torch.compile takes over, computes as ever.
    """
    assert F.scaled_dot_product_attention is _native, "already tuned"
    F.scaled_dot_product_attention = _attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = _native


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """In place of F.scaled_dot_product_attention."""
    is_plain = attn_mask is None and dropout_p == 0.0 and not enable_gqa
    if not is_plain or not _is_eligible(query, key, value):
        return _native(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    q, k, v = (tensor.to(torch.bfloat16) for tensor in (query, key, value))
    o: torch.Tensor = _Attention.apply(q, k, v, is_causal, q.shape[-1] ** -0.5 if scale is None else scale)
    return o


def _is_eligible(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    tensors = (query, key, value)
    if not trains_in_bf16(*tensors) or not torch.backends.cuda.flash_sdp_enabled():
        return False
    if any(tensor.dim() != 4 or not tensor.numel() for tensor in tensors) or query.shape[2] > MAX_QUERIES:
        return False
    return query.shape[:2] == key.shape[:2] and key.shape == value.shape and query.shape[3] == key.shape[3]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, is_causal: bool, scale: float
    ) -> torch.Tensor:
        if k.shape[2] <= MOST_KEPT * k.shape[3]:
            q, k, v = (tensor.contiguous() for tensor in (q, k, v))
            o, p = forward(q, k, v, is_causal=is_causal, scale=scale)
        else:
            o, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal, scale=scale)
            p = None
        ctx.save_for_backward(q, k, v, p)
        ctx.is_causal, ctx.scale = is_causal, scale
        return o

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, do: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, p = ctx.saved_tensors
        return (*gradients(do, q, k, v, p, is_causal=ctx.is_causal, scale=ctx.scale), None, None)


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, is_causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs o [B, H, N, D] and attention matrices p [B, H, N, M], in bf16."""
    p = _joined([_probabilities(q[part], k[part], is_causal=is_causal, scale=scale) for part in _parts(q, k)])
    # The layout [B, N, H, D] in memory is the one that the projection after the heads wants.
    o = torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
    return o.copy_(p @ v), p


def gradients(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    p: torch.Tensor | None,
    *,
    is_causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q [B, H, N, D] and of k and v [B, H, M, D].

    Args:
        do: Of the outputs, [B, H, N, D].
        p: Attention matrices [B, H, N, M], if they were kept.
    """
    found = []
    for part in _parts(q, k):
        do_, q_, k_, v_ = (tensor[part].contiguous() for tensor in (do, q, k, v))
        p_ = _probabilities(q_, k_, is_causal=is_causal, scale=scale) if p is None else p[part]
        dv = p_.transpose(-2, -1) @ do_
        ds = torch._softmax_backward_data(do_ @ v_.transpose(-2, -1), p_, -1, p_.dtype)
        found.append(((ds @ k_).mul_(scale), (ds.transpose(-2, -1) @ q_).mul_(scale), dv))
    dq, dk, dv = (_joined(parts) for parts in zip(*found, strict=True))
    return dq, dk, dv


def _probabilities(q: torch.Tensor, k: torch.Tensor, *, is_causal: bool, scale: float) -> torch.Tensor:
    # The scores in bf16 would be wrong by more than all other roundings together.
    s = q.float().mul_(scale) @ k.float().transpose(-2, -1)
    if is_causal:
        s.masked_fill_(torch.ones(s.shape[-2:], dtype=torch.bool).triu(1), float("-inf"))
    return s.softmax(-1).to(q.dtype)


def _parts(q: torch.Tensor, k: torch.Tensor) -> Iterator[slice]:
    """Of the samples, so that only so many scores are there at a time."""
    at_a_time = max(1, MAX_SCORES // (q.shape[1] * q.shape[2] * k.shape[2]))
    return (slice(first, first + at_a_time) for first in range(0, q.shape[0], at_a_time))


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
