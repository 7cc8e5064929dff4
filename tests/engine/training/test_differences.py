"""What is said of a training that is not bit for bit that of one process with whole batches."""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from torch import nn

from bmctl.engine.parallel import Group
from bmctl.engine.training.differences import differences
from bmctl.fit import Fit
from bmctl.models.own.networks import Encoder, ResCNN


def said(model: nn.Module, *, world: int = 2, parts: int = 1) -> str:
    group = Group(rank=0, local_rank=0, world=world, device=torch.device("cpu"), threads=1)
    return "; ".join(differences(model, group, Fit(accumulate=parts)))


DRAWN = {
    "bmctl": lambda: ResCNN(num_classes=2, channels=1, width=4, stochastic_depth=0.1),
    "timm": lambda: timm.create_model("convnext_atto", drop_path_rate=0.1),
    "torchvision": lambda: torchvision.models.convnext_tiny(stochastic_depth_prob=0.1),
}


@pytest.mark.parametrize("source", DRAWN)
def test_stochastic_depth_is_said(source: str) -> None:
    text = "stochastic depth draws differently in each "
    assert f"{text}process" in said(DRAWN[source]())
    assert f"{text}part" in said(DRAWN[source](), world=1, parts=2)
    assert said(DRAWN[source](), world=1) == ""


def test_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BeitConfig(**small, image_size=32, drop_path_rate=0.1)
    assert "stochastic depth draws differently in each process" in said(transformers.BeitModel(config))


def test_what_draws_nothing_is_not_said() -> None:
    assert said(ResCNN(num_classes=2, channels=1, width=4, stochastic_depth=0.0)).count("draw") == 0
    assert said(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.0))) == ""
    both = Encoder(
        vocab_size=9, max_tokens=4, num_classes=2, width=8, depth=2, heads=2, dropout=0.1, stochastic_depth=0.1
    )
    assert "2 processes: dropout and stochastic depth draw differently in each process; one process" in said(both)
