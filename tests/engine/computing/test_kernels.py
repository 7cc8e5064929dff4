"""Whose kernels compute the steps, and why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bmctl.engine.computing import kernels
from bmctl.engine.computing.kernels import KERNELS, Kernels, choose
from bmctl.engine.parallel import Group


def chosen(**given: Any) -> Kernels:
    device = torch.device(given.pop("device", "cpu"))
    group = Group(rank=0, local_rank=0, world=1, device=device, threads=1)
    return choose(given.pop("asked", "auto"), **{"precision": "bf16", "compiled": False, "group": group, **given})


@pytest.fixture(autouse=True)
def tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "has_tiles", lambda: True)


def test_bf16_on_a_cpu_with_tiles_takes_them() -> None:
    found = chosen()
    assert found.names == ("attention", "convolution", "linear") == tuple(KERNELS)
    assert str(found) == "kernels: attention, convolution, linear by bmctl (bf16 on a CPU with AMX tiles)"


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"asked": "torch"}, "the recipe says so"),
        ({"device": "cuda"}, "bmctl's are for CPUs, and this is cuda"),
        ({"precision": "fp32"}, "bmctl's are for bf16, and steps are in fp32"),
        ({"compiled": True}, "torch.compile makes its own"),
    ],
)
def test_everything_else_leaves_torchs(given: dict, reason: str) -> None:
    assert chosen(**given) == Kernels((), reason)
    assert str(chosen(**given)) == f"kernels: torch's own ({reason})"


def test_one_machine_without_tiles_leaves_torchs_to_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "gather", lambda group, mine: [mine, {"has_tiles": False}])
    assert chosen() == Kernels((), "bmctl's are for CPUs with AMX tiles")


def test_they_hold_inside_alone() -> None:
    native = (F.scaled_dot_product_attention, nn.Conv2d._conv_forward, F.linear)
    with chosen(asked="torch").applied():
        assert native == (F.scaled_dot_product_attention, nn.Conv2d._conv_forward, F.linear)
    with pytest.raises(ValueError, match="on purpose"), chosen().applied():
        now = (F.scaled_dot_product_attention, nn.Conv2d._conv_forward, F.linear)
        assert not any(one is other for one, other in zip(native, now, strict=True))
        raise ValueError("on purpose")
    assert native == (F.scaled_dot_product_attention, nn.Conv2d._conv_forward, F.linear)
