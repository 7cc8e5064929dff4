"""A transformer's layer, whose steps both attention and linear layers compute."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class TransformerStep:
    """Through autocast, torch's own layer with its packed projection, and if asked activations computed again."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self._layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True)
        self._x_BNC = torch.randn(3, 9, 32)

    def gradients(self, *, again: bool = False) -> list[torch.Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = checkpoint(self._layer, self._x_BNC, use_reentrant=False) if again else self._layer(self._x_BNC)
        return list(torch.autograd.grad(y.float().square().sum(), list(self._layer.parameters())))


def assert_close(ones: list[torch.Tensor], others: list[torch.Tensor]) -> None:
    """As far as bf16 goes."""
    for one, other in zip(ones, others, strict=True):
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.02 * float(other.abs().max()))
