"""Small models with every kind of trouble: residual sums, depthwise and grouped convolutions, attention."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from bmctl.methods import Example, MethodContext

Build = Callable[[], nn.Module]


class Residual(nn.Module):
    """A convolution, a residual block, a depthwise and a grouped one, a classifier of 10."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.left = nn.Conv2d(16, 24, 3, stride=1, padding=1)
        self.right = nn.Conv2d(24, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.grouped = nn.Conv2d(16, 32, 3, stride=2, padding=1, groups=4)
        self.group_norm = nn.GroupNorm(8, 32)
        self.head = nn.Linear(32 * 4 * 4, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = x + self.right(torch.relu(self.left(x)))
        x = torch.relu(self.group_norm(self.grouped(self.depthwise(x))))
        return self.head(x.flatten(1))


def residual() -> nn.Module:
    return Residual().eval()


def vit() -> nn.Module:
    import timm

    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=4, num_classes=10, depth=2, embed_dim=24, num_heads=3
    )
    return model.eval()


@pytest.fixture(autouse=True)
def _one_seed() -> None:
    torch.manual_seed(0)


def context_of(example: Example) -> MethodContext:
    """What a module method may look at."""
    return MethodContext(example=example, calibration=lambda: iter(()), calibration_record={})


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(7))


@pytest.fixture
def context(images: torch.Tensor) -> MethodContext:
    return context_of({"input": images})


@pytest.fixture(params=[residual, vit], ids=["residual", "vit"])
def build(request: pytest.FixtureRequest) -> Build:
    return request.param
