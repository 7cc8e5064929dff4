"""Training steps on a device: number formats, kernels, clocks, loading, compiling, and going on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

for package in ("torch", "pydantic", "yaml", "safetensors", "PIL", "tensorboard"):
    pytest.importorskip(package)

import torch
from tests.engine.runs import Seen, StopAt, distance, fit, make_context, make_model, make_recipe

from bmctl.engine.computing.kernels import KERNELS
from bmctl.engine.loading.data import open_split, resolve_input
from bmctl.engine.loading.loader import Loader, open_loader
from bmctl.engine.training.stopwatch import Stopwatch
from bmctl.engine.training.train import FitResult
from bmctl.errors import PreemptedError

on_gpu = pytest.mark.gpu


def trained(folder: Path, *overrides: str, device: str, name: str = "run", **given: Any) -> FitResult:
    recipe = make_recipe(folder, *overrides)
    return fit(make_context(folder / name, recipe, device=device, **given), make_model(recipe))


@pytest.mark.parametrize(
    ("device", "precision"),
    [
        ("cpu", "fp32"),
        *(pytest.param("cuda", name, marks=on_gpu) for name in ("fp32", "tf32", "bf16", "fp16")),
    ],
)
def test_every_precision_learns(tmp_path: Path, device: str, precision: str) -> None:
    seen = Seen()
    result = trained(tmp_path, f"train.precision={precision}", device=device, seen=seen)
    assert result.precision == precision, seen.notes
    assert result.val is not None and result.val.value > 0.5 > result.val.baseline
    assert all(weight.dtype == torch.float32 and weight.device.type == device for weight in result.model.parameters())
    assert all(parts >= 0 for parts in seen.of("done")[-1]["parts"].values())
    assert seen.of("done")[-1]["parts"]["backward"] > 0


@on_gpu
def test_fp16_leaves_out_a_step_that_overflows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scaler begins with 2^16; told to begin with more than fp16 holds, it comes down and training goes on."""
    scalers = []

    def scaler(self: object, device: torch.device) -> torch.amp.GradScaler:
        scalers.append(torch.amp.GradScaler(device.type, init_scale=2.0**40))
        return scalers[-1]

    monkeypatch.setattr("bmctl.engine.computing.precision.Precision.scaler", scaler)
    result = trained(tmp_path, "train.precision=fp16", "train.epochs=5", device="cuda")
    assert scalers[-1].get_scale() < 2.0**40
    assert result.val is not None and result.val.value > result.val.baseline


def test_kernels_for_cpus_stay_away(tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the CPU has; on the CPU because the recipe says so."""

    def refuse() -> None:
        pytest.fail("a kernel of bmctl's took torch's place")

    for module in KERNELS.values():
        monkeypatch.setattr(module, "tuned", refuse)
    monkeypatch.setattr("bmctl.engine.computing.kernels.has_tiles", lambda: True)
    overrides = ["train.max_steps=3"] if device == "cuda" else ["train.max_steps=3", "train.kernels=torch"]
    result = trained(tmp_path, *overrides, "train.precision=auto", device=device)
    assert any(note.startswith("kernels: torch's own") for note in result.notes)
    if device == "cuda":
        assert "kernels: torch's own (bmctl's are for CPUs, and this is cuda)" in result.notes


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_come_from_pinned_memory(
    tmp_path: Path, device: str, num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those on the GPU, where they are finished too, are those on the CPU."""
    if device == "cpu" and num_workers:
        pytest.skip("loader processes on the CPU are tried in tests/engine/loading")
    recipe = make_recipe(tmp_path, "data.input.augment.shift=2")
    data = make_context(tmp_path / "run", recipe).data
    split = open_split(data, name="train", given=resolve_input(data), augment=True)
    sent: list[torch.Tensor] = []
    placed = Loader._placed

    def spy(loader: Loader, tensor: torch.Tensor, *, pin: bool) -> torch.Tensor:
        sent.append(tensor.pin_memory() if pin else tensor)
        return placed(loader, sent[-1], pin=False)

    def batches(to: str, pin: bool) -> list[dict[str, torch.Tensor]]:
        workers = num_workers if to == device else 0
        where = torch.device(to)
        with open_loader(split, seed=0, batch_size=32, num_workers=workers, pin=pin, device=where) as loader:
            return [{name: each.cpu() for name, each in batch.items()} for batch in loader.batches(epoch=0)]

    wanted = batches("cpu", False)
    monkeypatch.setattr(Loader, "_placed", spy)
    found = batches(device, device == "cuda")
    assert [tensor.is_pinned() for tensor in sent] == [device == "cuda"] * len(sent) and sent
    assert len(found) == len(wanted) == 10
    for one, other in zip(found, wanted, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.allclose(one[name], other[name], atol=1e-5) for name in one)


@on_gpu
def test_a_gpu_is_asked_only_when_somebody_wants_to_know() -> None:
    device = torch.device("cuda")
    watch = Stopwatch(device)
    x = torch.randn(4096, 4096, device=device)
    for _ in range(3):
        x @ x
    torch.cuda.synchronize()
    watch.start()
    for _ in range(4):
        watch.lap("data")
        for _ in range(8):
            x @ x
        watch.lap("forward")
        for _ in range(16):
            x @ x
        watch.lap("backward")
        watch.lap("optimizer")
    assert not torch.cuda.current_stream().query(), "laps must not wait for the GPU"
    means = watch.take()
    assert 1.5 < means["backward"] / means["forward"] < 2.5
    assert means["data"] < 0.2 * means["forward"]


@on_gpu
def test_a_compiled_model_learns_the_same(tmp_path: Path) -> None:
    seen, overrides = Seen(), ("train.max_steps=10", "train.optimizer=sgd")
    compiled = trained(tmp_path, *overrides, "train.compile=true", device="cuda", seen=seen)
    eager = trained(tmp_path, *overrides, device="cuda", name="eager")
    assert "eager" not in seen.notes, seen.notes
    assert distance(compiled.model.state_dict(), eager.model.state_dict()) < 1e-3


@pytest.mark.parametrize(
    ("device", "precision"),
    [("cpu", "fp32"), *(pytest.param("cuda", name, marks=on_gpu) for name in ("fp32", "fp16"))],
)
def test_a_stopped_run_goes_on(tmp_path: Path, device: str, precision: str) -> None:
    """Bit for bit on a CPU; on a GPU but for what its kernels round otherwise from one time to the next."""
    overrides = (f"train.precision={precision}", "train.optimizer=sgd", "train.checkpoint_every_steps=4")
    whole = trained(tmp_path, *overrides, device=device, name="whole")
    with pytest.raises(PreemptedError):
        trained(tmp_path, *overrides, device=device, stop=StopAt(13))
    seen = Seen()
    again = trained(tmp_path, *overrides, device=device, resume=True, seen=seen)
    assert "going on from step" in seen.notes
    assert again.steps == whole.steps == 30
    far = distance(again.model.state_dict(), whole.model.state_dict())
    assert far == 0 if device == "cpu" else far < 1e-3
