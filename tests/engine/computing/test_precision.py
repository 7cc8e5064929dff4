"""What each machine computes in, that nothing is emulated on request, and that TF32's switches are put back."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable

import pytest
import torch

from bmctl.engine.computing.precision import Precision, choose_precision
from bmctl.errors import DependencyError

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
AMX = {"amx_bf16": True, "avx512_bf16": True, "avx2": True}
OLD = {"amx_bf16": False, "avx2": True}


@pytest.fixture
def gpu(monkeypatch) -> Callable[[str, tuple[int, int]], None]:
    """A GPU that is not there, of a name and compute capability; everything else is torch's."""

    def pretend(name: str, version: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: version)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: version >= (8, 0))
        monkeypatch.setattr(torch.cuda, "is_tf32_supported", lambda: version >= (8, 0))

    return pretend


def test_the_pretended_gpu_is_asked_as_torch_is() -> None:
    assert list(inspect.signature(torch.cuda.is_bf16_supported).parameters) == ["including_emulation"]
    assert not inspect.signature(torch.cuda.is_tf32_supported).parameters
    assert list(inspect.signature(torch.cuda.get_device_capability).parameters) == ["device"]
    assert list(inspect.signature(torch.cuda.get_device_name).parameters) == ["device"]
    assert list(inspect.signature(torch.cuda.device).parameters) == ["device"]


# -- choice ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("units", "name", "reason"),
    [(AMX, "bf16", "amx_bf16 and avx512_bf16"), (OLD, "fp32", "no bf16"), ({}, "fp32", "no bf16")],
)
def test_auto_follows_the_cpu(monkeypatch, units, name, reason) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units)
    found = choose_precision("auto", CPU)
    assert (found.name, found.tf32) == (name, None)
    assert reason in found.reason
    assert choose_precision("fp32", CPU) == Precision("fp32", "the recipe says so")


@pytest.mark.parametrize(
    ("gpu_name", "version", "expected", "tf32", "reason"),
    [
        ("NVIDIA H100", (9, 0), "bf16", True, "NVIDIA H100 has bf16 units"),
        ("NVIDIA A100", (8, 0), "bf16", True, "NVIDIA A100 has bf16 units"),
        ("Tesla T4", (7, 5), "fp16", False, "Tesla T4 has no bf16 units; Tesla T4 has fp16 units"),
        ("Tesla V100", (7, 0), "fp16", False, "has fp16 units"),
        ("GeForce GTX 1080", (6, 1), "fp32", False, "GeForce GTX 1080 has no bf16 units"),
        ("Tesla P100", (6, 0), "fp16", False, "has fp16 units"),
        ("Tesla M40", (5, 2), "fp32", False, "no bf16"),
    ],
)
def test_auto_follows_the_gpu(gpu, gpu_name, version, expected, tf32, reason) -> None:
    gpu(gpu_name, version)
    found = choose_precision("auto", GPU)
    assert (found.name, found.tf32) == (expected, tf32)
    assert reason in found.reason


def test_fp32_on_a_gpu_is_fp32(gpu) -> None:
    """torch's own default lets convolutions run in TF32."""
    gpu("NVIDIA A100", (8, 0))
    assert choose_precision("fp32", GPU).tf32 is False
    assert choose_precision("tf32", GPU) == Precision(
        "tf32", "the recipe says so; NVIDIA A100 has TF32 units", tf32=True
    )


@pytest.mark.parametrize(
    ("asked", "message"),
    [("bf16", "no bf16"), ("fp16", "a CPU emulates it"), ("tf32", "format of NVIDIA GPUs")],
)
def test_what_a_cpu_has_not_is_refused(monkeypatch, asked, message) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: OLD)
    with pytest.raises(DependencyError, match=f"train.precision is {asked}, but .*{message}") as caught:
        choose_precision(asked, CPU)
    assert caught.value.exit_code == 6
    assert caught.value.hint == "--set train.precision=auto"


@pytest.mark.parametrize(
    ("version", "asked", "message"),
    [((7, 5), "bf16", "no bf16 units"), ((7, 5), "tf32", "older than Ampere"), ((6, 1), "fp16", "no fp16 units")],
)
def test_what_a_gpu_has_not_is_refused(gpu, version, asked, message) -> None:
    gpu("Some GPU", version)
    with pytest.raises(DependencyError, match=f"{asked}, but Some GPU .*{message}"):
        choose_precision(asked, GPU)


# -- use ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fp32", "tf32", "bf16", "fp16"])
def test_autocast_computes_in_it(name) -> None:
    with Precision(name, "").autocast(CPU):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}.get(name, torch.float32)


@pytest.mark.parametrize("name", ["fp32", "tf32", "bf16", "fp16"])
def test_only_fp16_is_scaled(name) -> None:
    scaler = Precision(name, "").scaler(CPU)
    assert isinstance(scaler, torch.amp.GradScaler)
    assert scaler.is_enabled() == (name == "fp16")
    assert scaler.scale(torch.ones(())).item() == (65536 if name == "fp16" else 1)


def switches() -> dict[str, object]:
    backends = torch.backends
    found: dict[str, object] = {
        "matmul": backends.cuda.matmul.fp32_precision,
        "conv": backends.cudnn.conv.fp32_precision,
        "rnn": backends.cudnn.rnn.fp32_precision,
        "cpu": backends.mkldnn.matmul.fp32_precision,
    }
    try:
        found["old"] = torch.get_float32_matmul_precision(), backends.cudnn.allow_tf32
    except RuntimeError:
        found["old"] = None
    return found


@pytest.mark.parametrize(
    ("tf32", "exact", "old"), [(True, "tf32", ("high", True)), (False, "ieee", ("highest", False))]
)
def test_tf32_is_switched_and_put_back(tf32, exact, old) -> None:
    before = switches()
    with Precision("tf32", "", tf32=tf32).applied():
        assert switches() == {"matmul": exact, "conv": exact, "rnn": exact, "cpu": before["cpu"], "old": old}
        with Precision("fp32", "", tf32=not tf32).applied():
            assert switches()["matmul"] != exact
        assert switches()["matmul"] == exact
    assert switches() == before


def test_what_somebody_switched_in_the_new_way_alone_is_put_back() -> None:
    before = switches()
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        mixed = switches()
        assert mixed["old"] is None
        with Precision("fp32", "", tf32=False).applied():
            assert switches()["matmul"] == "ieee"
        assert switches() == mixed
    finally:
        torch.backends.cuda.matmul.fp32_precision = before["matmul"]
    assert switches() == before


def test_on_a_cpu_nothing_is_switched() -> None:
    before = switches()
    with Precision("bf16", "").applied():
        assert switches() == before
