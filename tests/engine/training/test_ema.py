"""The average of the weights: the recursion it claims, on floats alone, and never in the model's way."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bmctl.engine.training.ema import Average


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def move(model: nn.Module, by: float) -> None:
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor += by


def test_it_follows_the_weights_as_slowly_as_asked() -> None:
    model = make_model()
    average = Average(model, decay=0.9)
    expected = model.state_dict()["0.weight"].clone()
    for step in range(200):
        move(model, 1)
        average.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.state_dict()["0.weight"]
    assert torch.allclose(average.tensors()["0.weight"], expected)
    lag = model.state_dict()["0.weight"] - average.tensors()["0.weight"]
    assert torch.allclose(lag, torch.full_like(lag, 9.0), atol=0.1), "decay / (1 - decay) steps behind"
    assert average.tensors()["1.num_batches_tracked"] == 200, "a counter is not averaged"


def test_the_model_has_the_averages_only_while_asked() -> None:
    model = make_model()
    average = Average(model, decay=0.5)
    move(model, 2)
    average.update(50)
    live = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="on the way"), average.in_place():
        assert torch.equal(model.state_dict()["0.bias"], average.tensors()["0.bias"])
        assert not torch.equal(model.state_dict()["0.bias"], live["0.bias"])
        raise RuntimeError("on the way")
    assert all(torch.equal(tensor, live[name]) for name, tensor in model.state_dict().items())


def test_it_goes_on_from_what_was_saved() -> None:
    model = make_model()
    average = Average(model, decay=0.9)
    move(model, 1)
    average.update(0)
    saved = {name: tensor.clone() for name, tensor in average.tensors().items()}
    again = Average(model, decay=0.9)
    again.load(saved)
    for one in (average, again):
        one.update(1)
    assert all(torch.equal(tensor, average.tensors()[name]) for name, tensor in again.tensors().items())
