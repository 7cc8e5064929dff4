"""Where the faster kernels hold."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bmctl.engine.computing.tiles import has_tiles, trains_in_bf16


def test_bf16_by_autocast_or_by_all_tensors() -> None:
    x, w = torch.randn(2, 2), nn.Parameter(torch.randn(2, 2))
    assert not trains_in_bf16(x, w)
    assert trains_in_bf16(x.bfloat16(), w.bfloat16())
    assert not trains_in_bf16(x, w.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert trains_in_bf16(x, w)
        assert not trains_in_bf16(x, w.detach()), "nothing is trained"
        with torch.no_grad():
            assert not trains_in_bf16(x, w)
    with torch.autocast("cpu", dtype=torch.float16):
        assert not trains_in_bf16(x, w)


def test_tensors_of_other_classes_and_devices_are_not_meant() -> None:
    class Own(torch.Tensor):
        pass

    w = nn.Parameter(torch.randn(2, 2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not trains_in_bf16(torch.randn(2, 2).as_subclass(Own), w)
        assert not trains_in_bf16(torch.empty(2, 2, device="meta"), w)


def test_what_torch_compile_and_torch_func_take_over_is_not_meant() -> None:
    w = nn.Parameter(torch.randn(2, 2))
    told = lambda x: x + 1 if trains_in_bf16(w) else x  # noqa: E731
    zero = torch.zeros(3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(told(zero), zero + 1)
        assert torch.equal(torch.compile(told, backend="eager")(zero), zero)
        assert torch.equal(torch.func.vmap(told)(zero), zero)


def test_the_cpu_says_whether_it_has_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    for capabilities, has in [({"amx_bf16": True}, True), ({"amx_bf16": False}, False), ({}, False)]:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda known=capabilities: known)
        assert has_tiles() == has
