"""bmctl's own networks: small enough to train on a CPU, plain enough to prune, quantize and export.

N: samples. C: input channels. H, W: pixels. K: classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn


class StochasticDepth(nn.Module):
    """Leaves whole samples' residual branches out in training, and makes up for it in those that stay.

    Args:
        p: Probability that a sample's branch is left out.

    Source: Huang et al. 2016, https://arxiv.org/abs/1603.09382
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x_NCHW
        kept_N111 = torch.empty(x_NCHW.shape[0], 1, 1, 1, dtype=x_NCHW.dtype, device=x_NCHW.device)
        return x_NCHW * kept_N111.bernoulli_(1 - self.p).div_(1 - self.p)

    def extra_repr(self) -> str:
        return f"p={self.p}"


class Block(nn.Module):
    """Two 3x3 convolutions around which the input is added; a 1x1 convolution fits the input where shapes differ.

    Source: He et al. 2015, https://arxiv.org/abs/1512.03385
    """

    def __init__(self, inside: int, outside: int, *, stride: int, stochastic_depth: float = 0.0) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outside)
        self.relu = nn.ReLU(inplace=True)
        self.drop = StochasticDepth(stochastic_depth) if stochastic_depth else nn.Identity()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inside != outside:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inside, outside, 1, stride=stride, bias=False), nn.BatchNorm2d(outside)
            )

    def forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        inner = self.relu(self.norm1(self.conv1(x_NCHW)))
        return self.relu(self.drop(self.norm2(self.conv2(inner))) + self.shortcut(x_NCHW))


class ResCNN(nn.Module):
    """A stem and three residual blocks of `width`, 2 and 4 times `width` channels, halving the resolution twice.

    Args:
        num_classes: K.
        channels: C.
        width: Channels of the first block.
        dropout: Probability by which features are left out before the head.
        stochastic_depth: Of the last block's branch; a third and two thirds of it for the blocks before.
    """

    MIN_SIZE = 8
    """Pixels of height and width."""

    def __init__(
        self,
        *,
        num_classes: int,
        channels: int,
        width: int = 32,
        dropout: float = 0.0,
        stochastic_depth: float = 0.0,
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )
        self.blocks = nn.Sequential(
            Block(width, width, stride=1, stochastic_depth=stochastic_depth / 3),
            Block(width, 2 * width, stride=2, stochastic_depth=stochastic_depth * 2 / 3),
            Block(2 * width, 4 * width, stride=2, stochastic_depth=stochastic_depth),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.head = nn.Linear(4 * width, num_classes)

    def forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        return self.head(self.dropout(self.pool(self.blocks(self.stem(x_NCHW))).flatten(1)))


class MLP(nn.Module):
    """Linear layers with ReLU between them; no batch statistics.

    Args:
        num_inputs: C * H * W.
        num_classes: K.
        hidden: Width of each hidden layer.
        dropout: Probability by which outputs of hidden layers are left out.
    """

    def __init__(
        self, *, num_inputs: int, num_classes: int, hidden: Sequence[int] = (512, 256), dropout: float = 0.0
    ) -> None:
        super().__init__()
        widths = (num_inputs, *hidden)
        layers: list[nn.Module] = []
        for inside, outside in pairwise(widths):
            relu: nn.Module = nn.ReLU(inplace=True)
            # In one place with the ReLU: layers keep their numbers, and weights their names.
            layers += [nn.Linear(inside, outside), nn.Sequential(relu, nn.Dropout(dropout)) if dropout else relu]
        self.layers = nn.Sequential(nn.Flatten(), *layers, nn.Linear(widths[-1], num_classes))

    def forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        return self.layers(x_NCHW)


class Logits(nn.Module):
    """A classifier of transformers that gives its logits alone.

    Args:
        model: Takes `pixel_values` and gives an output with `logits`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values=x_NCHW).logits
