"""A decoder-only transformer, which goes on with a text token by token; written to be read.

N: texts. P: tokens in the cache. T: tokens after them. S = P + T. G: places that logits are asked for. D: width.
A: heads. K: heads of keys and values, of which A is a multiple. d = D / A. V: size of the vocabulary.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import nn

from bmctl.models.own.causal import bias_of, chosen, in_order, places_of

Positions = Literal["rotary", "learned", "sinusoidal"]
Norm = Literal["rms", "layer"]

ROTARY_BASE = 10_000.0


class Decoder(nn.Module):
    """Layers of attention to what came before, each normalised first and added to its input; logits of the next token.

    Source: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762; with rotary positions and RMSNorm the architecture of
    Touvron et al. 2023, https://arxiv.org/abs/2302.13971

    Args:
        vocab_size: V.
        max_tokens: Largest S that it is trained for.
        width: D.
        depth: Number of layers.
        heads: A, of which `width` is a multiple.
        kv_heads: K.
        hidden: Width inside a layer's feed-forward half.
        positions: How it knows where a token stands: `rotary` turns queries and keys, the others are added to the
            embeddings.
        norm: RMSNorm or LayerNorm.
        tied: The table of the embeddings makes the logits as well.
        dropout: Probability by which embeddings and outputs of layers' halves are left out.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        max_tokens: int,
        width: int = 256,
        depth: int = 4,
        heads: int = 4,
        kv_heads: int = 4,
        hidden: int = 704,
        positions: Positions = "rotary",
        norm: Norm = "rms",
        tied: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.max_tokens = max_tokens
        self.tokens = nn.Embedding(vocab_size, width)
        self.positions: nn.Module | None = None
        if positions == "learned":
            self.positions = nn.Embedding(max_tokens, width)
        elif positions == "sinusoidal":
            self.positions = Sinusoids(width)
        self.angles = Angles(width // heads) if positions == "rotary" else None
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.layers = nn.ModuleList(
            DecoderLayer(width, heads=heads, kv_heads=kv_heads, hidden=hidden, norm=norm, dropout=dropout)
            for _ in range(depth)
        )
        self.norm = _norm(norm, width)
        self.head = nn.Linear(width, vocab_size, bias=False)
        self._initialise(depth)
        if tied:
            self.head.weight = self.tokens.weight

    @property
    def cache(self) -> tuple[tuple[int, int], ...]:
        """Of each layer: heads of keys and values, and numbers of a head. A cache holds both, [N, K, P, d]."""
        attentions = [each for each in self.modules() if isinstance(each, CausalAttention)]
        return tuple((each.kv_heads, each.head_dim) for each in attentions)

    def forward(
        self, ids_NT: torch.Tensor, mask_NS: torch.Tensor, at_NG: torch.Tensor | None = None, *past: torch.Tensor
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Logits [N, T, V] of whole texts; with a cache logits [N, G, V], and the cache with the new tokens in it.

        Args:
            ids_NT: int64 token ids. Without a cache padding comes last.
            mask_NS: int64, 0 for padding, else 1; of the tokens in the cache as well, anywhere among them.
            at_NG: int64, places among the T of which logits are wanted; what lies beyond is the last one.
            past: Keys and values of each layer, [N, K, P, d]; P may be 0.
        """
        num_past = past[0].shape[2] if past else 0
        places_NT = places_of(mask_NS, num_past, most=self.max_tokens) if past else in_order(ids_NT)
        x_NTD = self.tokens(ids_NT)
        if self.positions is not None:
            x_NTD = x_NTD + self.positions(places_NT)
        turns = self.angles(places_NT) if self.angles is not None else None
        bias_N1TS = bias_of(mask_NS, ids_NT.shape[1], num_past).to(x_NTD.dtype) if past else None
        x_NTD = self.dropout(x_NTD)
        present: list[torch.Tensor] = []
        for index, layer in enumerate(self.layers):
            x_NTD, *kept = layer(x_NTD, turns, bias_N1TS, *past[2 * index : 2 * index + 2])
            present += kept
        if at_NG is None:
            return self.head(self.norm(x_NTD))
        return self.head(self.norm(chosen(x_NTD, at_NG))), *present

    @torch.no_grad()
    def _initialise(self, depth: int) -> None:
        """Small, and smaller where layers add up. Source: Radford et al. 2019, section 2.3."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                adds = name.endswith(("proj.weight", "outer.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * depth) if adds else 0.02)


class DecoderLayer(nn.Module):
    """Attention and a gated feed-forward half. Source of the latter: Shazeer 2020, https://arxiv.org/abs/2002.05202"""

    def __init__(self, width: int, *, heads: int, kv_heads: int, hidden: int, norm: Norm, dropout: float) -> None:
        super().__init__()
        self.norm1 = _norm(norm, width)
        self.attention = CausalAttention(width, heads=heads, kv_heads=kv_heads)
        self.norm2 = _norm(norm, width)
        self.gate = nn.Linear(width, hidden, bias=False)
        self.inner = nn.Linear(width, hidden, bias=False)
        self.outer = nn.Linear(hidden, width, bias=False)
        self.silu = nn.SiLU()
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(
        self,
        x_NTD: torch.Tensor,
        turns: tuple[torch.Tensor, torch.Tensor] | None,
        bias_N1TS: torch.Tensor | None,
        *past: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """Its output, and with `past` its keys and values."""
        mixed_NTD, *kept = self.attention(self.norm1(x_NTD), turns, bias_N1TS, *past)
        x_NTD = x_NTD + self.dropout(mixed_NTD)
        normed_NTD = self.norm2(x_NTD)
        return x_NTD + self.dropout(self.outer(self.silu(self.gate(normed_NTD)) * self.inner(normed_NTD))), *kept


class CausalAttention(nn.Module):
    """Every token looks at itself and at what came before; A / K heads of queries share one of keys and values.

    Source of the shared heads: Ainslie et al. 2023, https://arxiv.org/abs/2305.13245
    """

    def __init__(self, width: int, *, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, width // heads
        self.query = nn.Linear(width, heads * self.head_dim, bias=False)
        self.key = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.value = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.proj = nn.Linear(heads * self.head_dim, width, bias=False)

    def forward(
        self,
        x_NTD: torch.Tensor,
        turns: tuple[torch.Tensor, torch.Tensor] | None,
        bias_N1TS: torch.Tensor | None,
        *past: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        q_NATd, k_NKSd, v_NKSd = (
            layer(x_NTD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        if turns is not None:
            q_NATd, k_NKSd = turned(q_NATd, turns), turned(k_NKSd, turns)
        if past:
            k_NKSd, v_NKSd = torch.cat([past[0], k_NKSd], dim=2), torch.cat([past[1], v_NKSd], dim=2)
        mixed_NATd = nn.functional.scaled_dot_product_attention(
            q_NATd, self._shared(k_NKSd), self._shared(v_NKSd), attn_mask=bias_N1TS, is_causal=bias_N1TS is None
        )
        mixed_NTD = self.proj(mixed_NATd.transpose(1, 2).flatten(2))
        return (mixed_NTD, k_NKSd, v_NKSd) if past else (mixed_NTD,)

    def _shared(self, x_NKSd: torch.Tensor) -> torch.Tensor:
        """[N, A, S, d]: each head as often as there are heads of queries to it."""
        times = self.heads // self.kv_heads
        if times == 1:
            return x_NKSd
        return x_NKSd[:, :, None].expand(-1, -1, times, -1, -1).flatten(1, 2)


# -- positions --------------------------------------------------------------------------------------


class Sinusoids(nn.Module):
    """Sines and cosines of the place, at frequencies that fall from 1 to 1 / ROTARY_BASE."""

    frequencies: torch.Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", _frequencies(width), persistent=False)
        self.scale = 0.02 * math.sqrt(2)  # as large as the embeddings are at first

    def forward(self, places_NT: torch.Tensor) -> torch.Tensor:
        angles_NTd = places_NT[..., None].to(self.frequencies.dtype) * self.frequencies
        return torch.cat([angles_NTd.sin(), angles_NTd.cos()], dim=-1) * self.scale


class Angles(nn.Module):
    """By how much a query or a key is turned at each place. Source: Su et al. 2021, https://arxiv.org/abs/2104.09864"""

    frequencies: torch.Tensor

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", _frequencies(head_dim), persistent=False)

    def forward(self, places_NT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines, [N, 1, T, d]."""
        angles_NTd = places_NT[..., None].to(self.frequencies.dtype) * self.frequencies
        angles_N1Td = torch.cat([angles_NTd, angles_NTd], dim=-1)[:, None]
        return angles_N1Td.cos(), angles_N1Td.sin()


def turned(x_NATd: torch.Tensor, turns: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Each pair (i, i + d / 2) of numbers, as a point of the plane, turned by its angle."""
    cos_N1Td, sin_N1Td = (each.to(x_NATd.dtype) for each in turns)
    first, second = x_NATd.chunk(2, dim=-1)
    return x_NATd * cos_N1Td + torch.cat([-second, first], dim=-1) * sin_N1Td


def _frequencies(width: int) -> torch.Tensor:
    return ROTARY_BASE ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)


def _norm(name: Norm, width: int) -> nn.Module:
    return nn.RMSNorm(width, eps=1e-6) if name == "rms" else nn.LayerNorm(width)
