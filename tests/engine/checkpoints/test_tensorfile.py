"""A safetensors file in the making: any type and layout goes in and comes out, and nan and inf are seen."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bmctl.engine.checkpoints.tensorfile import CHUNK_BYTES, TensorFile

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2, torch.float8_e4m3fn]


def filled(**tensors: torch.Tensor) -> TensorFile:
    file = TensorFile(pin=False)
    file.fill(tensors)
    return file


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("dtype", FLOATS)
def test_only_nan_and_inf_are_not_finite(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    finite = torch.tensor([0.0, -0.0, 1.5, info.max, info.min, info.tiny], dtype=torch.float64).to(dtype)
    assert filled(w=finite).find_non_finite() is None
    for value in [float("nan"), *([] if dtype == torch.float8_e4m3fn else [float("inf"), float("-inf")])]:
        bad = finite.clone()
        bad[3] = value
        assert filled(a=finite, w=bad).find_non_finite() == "w"


def test_parts_of_complex_numbers_count_and_integers_do_not() -> None:
    assert filled(w=torch.tensor([1 + 2j])).find_non_finite() is None
    assert filled(w=torch.tensor([complex(1, float("inf"))])).find_non_finite() == "w"
    assert filled(w=torch.full((3,), -1)).find_non_finite() is None


def test_every_type_and_layout_comes_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {str(dtype)[6:]: torch.randn(5).to(dtype) for dtype in FLOATS}
    tensors |= {
        "turned": torch.randn(3, 4).t(),
        "empty": torch.empty(0, 2),
        "large": torch.arange(CHUNK_BYTES // 8 + 3),
    }
    tensors |= {"scalar": torch.tensor(3), "flag": torch.tensor(True)}
    file = filled(**tensors)
    record = file.write(tmp_path / "w.safetensors", point="test", going_on=lambda: None)
    assert record.sha256 == hashlib.sha256((tmp_path / "w.safetensors").read_bytes()).hexdigest()
    assert record.size_bytes == (tmp_path / "w.safetensors").stat().st_size
    found = load_file(tmp_path / "w.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert torch.equal(bits(found[name]), bits(tensor)), name


def test_memory_is_used_again_for_the_same_layout(tmp_path: Path) -> None:
    file = filled(w=torch.ones(4))
    file.fill({"w": torch.full((4,), 2.0)})
    file.write(tmp_path / "w.safetensors", point="test", going_on=lambda: None)
    assert load_file(tmp_path / "w.safetensors")["w"].tolist() == [2.0] * 4
    file.fill({})
    assert file.is_empty


def test_going_on_may_end_it(tmp_path: Path) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        filled(w=torch.ones(CHUNK_BYTES)).write(tmp_path / "w.safetensors", point="test", going_on=stop)
