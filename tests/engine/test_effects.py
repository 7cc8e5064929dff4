"""What a run of a model changes beside its outputs is put back."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from bmctl.engine.effects import no_trace, random_state, set_random_state

CPU = torch.device("cpu")


def test_a_trial_leaves_no_trace_however_it_ends() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout()).train()
    model[0].weight.grad = torch.ones(4, 4)
    kept = model[0].weight.grad
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    places = [id(buffer) for buffer in model.buffers()]
    drawn = random_state(CPU)
    with pytest.raises(ZeroDivisionError), no_trace(model, CPU):
        model(torch.randn(8, 4)).sum().backward()
        random.random(), np.random.rand()
        assert int(model[1].num_batches_tracked) == 1
        raise ZeroDivisionError
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert places == [id(buffer) for buffer in model.buffers()]
    assert model[0].weight.grad is kept and model[0].bias.grad is None
    assert drawn == random_state(CPU)


def test_generators_go_on_where_they_stood() -> None:
    state = random_state(CPU)
    first = random.random(), float(np.random.rand()), float(torch.rand(()))
    set_random_state(state, CPU)
    assert first == (random.random(), float(np.random.rand()), float(torch.rand(())))
