"""bmctl's own networks: small enough to train on a CPU, plain enough to prune, quantize and export.

N: samples. C: input channels. H, W: pixels. K: classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn


class Block(nn.Module):
    """Two 3x3 convolutions around which the input is added; a 1x1 convolution fits the input where shapes differ.

    Source: He et al. 2015, https://arxiv.org/abs/1512.03385
    """

    def __init__(self, inside: int, outside: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outside)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inside != outside:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inside, outside, 1, stride=stride, bias=False), nn.BatchNorm2d(outside)
            )

    def forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        inner = self.relu(self.norm1(self.conv1(x_NCHW)))
        return self.relu(self.norm2(self.conv2(inner)) + self.shortcut(x_NCHW))


class ResCNN(nn.Module):
    """A stem and three residual blocks of `width`, 2 and 4 times `width` channels, halving the resolution twice.

    Args:
        num_classes: K.
        channels: C.
        width: Channels of the first block.
    """

    def __init__(self, *, num_classes: int, channels: int, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )
        self.blocks = nn.Sequential(
            Block(width, width, stride=1),
            Block(width, 2 * width, stride=2),
            Block(2 * width, 4 * width, stride=2),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(4 * width, num_classes)

    def forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        return self.head(self.pool(self.blocks(self.stem(x_NCHW))).flatten(1))


class MLP(nn.Module):
    """Linear layers with ReLU between them; no batch statistics and no dropout.

    Args:
        num_inputs: C * H * W.
        num_classes: K.
        hidden: Width of each hidden layer.
    """

    def __init__(self, *, num_inputs: int, num_classes: int, hidden: Sequence[int] = (512, 256)) -> None:
        super().__init__()
        widths = (num_inputs, *hidden)
        layers: list[nn.Module] = []
        for inside, outside in pairwise(widths):
            layers += [nn.Linear(inside, outside), nn.ReLU(inplace=True)]
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
