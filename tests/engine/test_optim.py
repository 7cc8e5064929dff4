"""Optimizers: their state survives a save bit for bit, the schedule does what it says."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from bmctl.engine.optim import build_optimizer, learning_rate, load_optimizer, optimizer_tensors, set_learning_rate
from bmctl.errors import PackageError
from bmctl.fit import SGD, Adam, AdamW, Constant, Cosine, RMSprop

CONFIGS = [
    AdamW(lr=0.01),
    Adam(name="adam", lr=0.01, weight_decay=0.1),
    SGD(name="sgd", lr=0.1),
    SGD(name="sgd", lr=0.1, momentum=0.0),
    SGD(name="sgd", lr=0.1, nesterov=True),
    RMSprop(name="rmsprop", lr=0.01),
    RMSprop(name="rmsprop", lr=0.01, momentum=0.9),
]


def make_model(layout: torch.memory_format) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 6 * 6, 4))
    return model.to(memory_format=layout)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, *, first: int, last: int) -> None:
    for step in range(first, last):
        set_learning_rate(optimizer, 0.01 / (step + 1))
        generator = torch.Generator().manual_seed(step)
        model(torch.randn(2, 3, 8, 8, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["nhwc", "nchw"])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.name}-{getattr(config, 'momentum', '')}")
def test_a_saved_state_goes_on_bit_for_bit(config, layout) -> None:
    whole = make_model(layout)
    optimizer = build_optimizer(whole, config)
    train(whole, optimizer, first=0, last=3)
    half = copy.deepcopy(whole)
    saved = {name: tensor.clone().contiguous() for name, tensor in optimizer_tensors(optimizer, whole).items()}
    train(whole, optimizer, first=3, last=6)

    resumed = build_optimizer(half, config)
    load_optimizer(resumed, half, saved)
    train(half, resumed, first=3, last=6)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), half.parameters(), strict=True))
    assert not torch.equal(next(half.parameters()), next(make_model(layout).parameters()))


def test_a_state_of_another_model_is_refused() -> None:
    model = make_model(torch.contiguous_format)
    optimizer = build_optimizer(model, AdamW())
    with pytest.raises(PackageError, match=r"exp_avg/0\.weight"):
        load_optimizer(optimizer, model, {"exp_avg/0.weight": torch.zeros(2, 3)})
    with pytest.raises(PackageError, match=r"exp_avg/9\.weight"):
        load_optimizer(optimizer, model, {"exp_avg/9.weight": torch.zeros(8, 3, 3, 3)})


def test_the_rate_rises_and_falls() -> None:
    cosine = Cosine(warmup=0.1, final=0.1)
    rates = [learning_rate(cosine, peak=2.0, step=step, num_steps=100) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == rates[10] == max(rates) == 2.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx(2.0 * 0.55)
    assert 0.2 < rates[-1] < 0.201
    constant = Constant(name="constant", warmup=0.0)
    assert {learning_rate(constant, peak=2.0, step=step, num_steps=3) for step in range(3)} == {2.0}
