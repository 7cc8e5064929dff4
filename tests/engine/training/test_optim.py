"""Optimizers: their state survives a save bit for bit, the schedule does what it says."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from bmctl.engine.training.optim import Optimizers, build_optimizer
from bmctl.errors import PackageError
from bmctl.fit import SGD, Adafactor, Adam, AdamW, Muon, RMSprop

CONFIGS = [
    AdamW(lr=0.01),
    AdamW(lr=0.01, weight_decay=0.0),
    Adam(name="adam", lr=0.01, weight_decay=0.1),
    SGD(name="sgd", lr=0.1),
    SGD(name="sgd", lr=0.1, momentum=0.0),
    SGD(name="sgd", lr=0.1, nesterov=True),
    RMSprop(name="rmsprop", lr=0.01),
    RMSprop(name="rmsprop", lr=0.01, momentum=0.9),
    Adafactor(name="adafactor", lr=0.01),
    Adafactor(name="adafactor", lr=0.01, weight_decay=0.1),
    Muon(name="muon", lr=0.01),
]
LAYOUTS = {"nhwc": torch.channels_last, "nchw": torch.contiguous_format}


class Odd(nn.Module):
    """Shapes that flat state must tell apart: a scalar, 1x1 matrices and convolutions, three dimensions, nesting."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.place = nn.Parameter(torch.randn(1, 5, 6))
        self.conv = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 1, 1), nn.Flatten())
        self.inner = nn.ModuleDict({"a": nn.Sequential(nn.Linear(36, 30), nn.LayerNorm(30)), "b": nn.Linear(30, 1)})
        self.idle = nn.Linear(2, 2)
        self.head = nn.Linear(1, 4)

    def forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        hidden = self.inner["a"](self.conv(x_NCHW)) * self.scale + self.place.reshape(1, 30)
        return self.head(self.inner["b"](hidden))


def make_model(layout: torch.memory_format) -> nn.Module:
    torch.manual_seed(0)
    return Odd().to(memory_format=layout)


def train(model: nn.Module, optimizers: Optimizers, *, first: int, last: int) -> None:
    for step in range(first, last):
        optimizers.set_rate(0.01 / (step + 1))
        generator = torch.Generator().manual_seed(step)
        model(torch.randn(2, 3, 8, 8, generator=generator)).square().mean().backward()
        optimizers.step()
        optimizers.zero_grad()


def saved(optimizers: Optimizers, model: nn.Module) -> dict[str, torch.Tensor]:
    """As a file gives it back: plain and contiguous."""
    return {name: tensor.clone().contiguous() for name, tensor in optimizers.tensors(model).items()}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.name}-{getattr(config, 'momentum', '')}")
def test_a_saved_state_goes_on_bit_for_bit(config, layout) -> None:
    whole = make_model(layout)
    optimizers = build_optimizer(whole, config)
    train(whole, optimizers, first=0, last=3)
    half, state = copy.deepcopy(whole), saved(optimizers, whole)
    train(whole, optimizers, first=3, last=6)

    resumed = build_optimizer(half, config)
    resumed.load(half, state, lambda key, like: state[key])
    back = resumed.tensors(half)
    assert list(back) == list(state)
    assert all(torch.equal(back[key], state[key]) and back[key].dtype == state[key].dtype for key in state)
    now = optimizers.tensors(whole)
    assert all(back[key].stride() == now[key].stride() and back[key].device == now[key].device for key in state)
    train(half, resumed, first=3, last=6)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), half.parameters(), strict=True))
    moved = [not torch.equal(a, b) for a, b in zip(half.parameters(), make_model(layout).parameters(), strict=True)]
    assert moved == ["idle" not in name for name, _ in half.named_parameters()]


def refused(config, state: dict[str, torch.Tensor], match: str) -> None:
    model = make_model(torch.contiguous_format)
    with pytest.raises(PackageError, match=match):
        build_optimizer(model, config).load(model, state, lambda key, like: state[key])


def test_a_state_of_another_model_or_kind_is_refused() -> None:
    model = make_model(torch.contiguous_format)
    optimizers = build_optimizer(model, AdamW())
    train(model, optimizers, first=0, last=1)
    state = saved(optimizers, model)
    refused(AdamW(), state | {"exp_avg/head.weight": torch.zeros(2, 3)}, r"exp_avg/head\.weight \(2, 3\)")
    refused(AdamW(), state | {"exp_avg/head.weight": torch.zeros(4, 1).double()}, r"exp_avg/head\.weight")
    refused(AdamW(), state | {"exp_avg/9.weight": torch.zeros(8, 3, 3, 3)}, r"exp_avg/9\.weight")
    refused(AdamW(), {key: value for key, value in state.items() if key != "step/scale"}, r"no .* step/scale")
    refused(SGD(name="sgd"), state, "exp_avg/")
    refused(SGD(name="sgd", momentum=0.0), state, "exp_avg/")
    refused(Adafactor(name="adafactor"), state, "exp_avg/")
