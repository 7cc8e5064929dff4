"""bf16 where the hardware has it, and never emulated on request."""

from __future__ import annotations

import pytest
import torch

from bmctl.engine.precision import choose_precision
from bmctl.errors import DependencyError

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("units", "name", "reason"),
    [
        ({"amx_bf16": True, "avx512_bf16": True, "avx2": True}, "bf16", "amx_bf16 and avx512_bf16"),
        ({"amx_bf16": False, "avx2": True}, "fp32", "no bf16"),
        ({}, "fp32", "no bf16"),
    ],
)
def test_auto_follows_the_hardware(monkeypatch, units, name, reason) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units)
    found = choose_precision("auto", CPU)
    assert found.name == name
    assert reason in found.reason
    assert choose_precision("fp32", CPU).name == "fp32"


def test_bf16_without_hardware_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    with pytest.raises(DependencyError, match="no bf16") as caught:
        choose_precision("bf16", CPU)
    assert caught.value.exit_code == 6


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_autocast_computes_in_it(monkeypatch, name) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    with choose_precision(name, CPU).autocast(CPU):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[name]
