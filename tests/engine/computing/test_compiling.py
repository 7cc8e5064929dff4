"""Compiled steps compute what plain ones do; where compiling fails the plain ones run, and a line says why."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bmctl.engine.computing import compiling
from bmctl.engine.computing.compiling import compiled
from bmctl.engine.computing.precision import Precision
from bmctl.models.own.networks import MLP, ResCNN

FP32 = Precision("fp32", "")


def small() -> nn.Module:
    torch.manual_seed(0)
    return ResCNN(num_classes=3, channels=1, width=2).train()


def tried(model: nn.Module, x: torch.Tensor, *, note: Callable[[str], None], precision: Precision = FP32) -> Any:
    return compiled(model, example={"x": x}, takes=["x"], gives=["y"], precision=precision, note=note)


def gradients(forward, model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(forward(x).square().sum(), list(model.parameters())))


@pytest.fixture
def backend(monkeypatch):
    """Another backend than Inductor, which takes long; says how often it was asked to compile something."""
    torch._dynamo.reset()
    calls: list[int] = []

    def use(work) -> list[int]:
        def counted(graph, inputs):
            calls.append(len(inputs))
            return work(graph, inputs)

        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counted))
        return calls

    return use


def plain(graph, inputs):
    return graph.forward


def broken(graph, inputs):
    raise NotImplementedError("no kernel for this\nand a long story")


def test_nothing_but_the_code_is_changed(backend) -> None:
    calls = backend(plain)
    model, notes = nn.Sequential(small(), nn.Dropout()).train(), []
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    example = torch.randn(4, 1, 8, 8)
    luck = torch.get_rng_state()
    forward = tried(model, example, note=notes.append)
    assert calls and not notes
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(each.grad is None for each in model.parameters())
    assert torch.equal(luck, torch.get_rng_state())
    assert forward.fast is not None


def test_other_batch_sizes_are_compiled_once(backend) -> None:
    calls = backend(plain)
    model = small()
    forward = compiled(
        model, example={"x": torch.randn(4, 1, 8, 8)}, takes=["x"], gives=["y"], precision=FP32, note=pytest.fail
    )
    first = len(calls)
    for size in (5, 6, 7, 9, 11, 13):
        forward(torch.randn(size, 1, 8, 8)).sum().backward()
    assert first <= len(calls) <= 2 * first


def test_evaluation_is_not_compiled(backend) -> None:
    calls = backend(plain)
    model = small()
    forward = compiled(
        model, example={"x": torch.randn(4, 1, 8, 8)}, takes=["x"], gives=["y"], precision=FP32, note=pytest.fail
    )
    first = len(calls)
    with torch.no_grad():
        forward(torch.randn(4, 1, 8, 8))
    model.eval()
    forward(torch.randn(4, 1, 8, 8))
    assert len(calls) == first


def test_a_failure_is_said_in_one_line_and_the_model_runs(backend) -> None:
    backend(broken)
    model, notes = small(), []
    x = torch.randn(4, 1, 8, 8)
    forward = tried(model, x, note=notes.append)
    assert notes == ["compile: the model runs as it is: NotImplementedError: no kernel for this"]
    assert all(map(torch.equal, gradients(forward, model, x), gradients(model, model, x)))


class Irreversible(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: torch.Tensor) -> torch.Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx, dy: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("no gradient for this")


def test_a_failure_of_the_backward_pass_is_found_before_the_first_step(backend) -> None:
    backend(lambda graph, inputs: lambda *given: tuple(map(Irreversible.apply, graph.forward(*given))))
    model, notes = small(), []
    x = torch.randn(4, 1, 8, 8)
    forward = tried(model, x, note=notes.append)
    assert notes == ["compile: the model runs as it is: NotImplementedError: no gradient for this"]
    assert all(map(torch.equal, gradients(forward, model, x), gradients(model, model, x)))


def test_a_later_failure_too(backend) -> None:
    works = [True]
    backend(lambda graph, inputs: plain(graph, inputs) if works[0] else broken(graph, inputs))
    model, notes = small(), []
    forward = compiled(
        model, example={"x": torch.randn(4, 1, 8, 8)}, takes=["x"], gives=["y"], precision=FP32, note=notes.append
    )
    works[0] = False
    assert not notes
    assert forward(torch.randn(5, 1, 8, 8)).shape == (5, 3)
    assert len(notes) == 1
    forward(torch.randn(6, 1, 8, 8))
    assert len(notes) == 1


def test_steps_in_bf16_are_what_is_tried(backend) -> None:
    calls = backend(plain)
    precision, x = Precision("bf16", ""), torch.randn(4, 1, 8, 8)
    forward = tried(small(), x, note=pytest.fail, precision=precision)
    first = len(calls)
    with precision.autocast(x.device):
        forward(x).sum().backward()
    assert len(calls) == first


def test_sharded_models_stay_as_they_are(monkeypatch) -> None:
    monkeypatch.setattr(compiling, "FSDPModule", MLP)
    notes: list[str] = []
    model = MLP(num_inputs=4, num_classes=2).train()
    forward = compiled(
        model, example={"x": torch.randn(2, 4)}, takes=["x"], gives=["y"], precision=FP32, note=notes.append
    )
    assert notes == ["compile: the model runs as it is: its parts are gathered by hooks, which are not compiled"]
    assert forward(torch.randn(2, 4)).shape == (2, 2)


# What a run does, in a process of its own, so that the compiler that its environment names is taken.
SCRIPT = """
import torch
from bmctl.engine.computing.compiling import compiled
from bmctl.models.own.networks import MLP
from bmctl.engine.computing.precision import Precision
torch.manual_seed(0)
model = MLP(num_inputs=16, num_classes=3, hidden=(8,)).train()
x = torch.randn(4, 1, 4, 4)
example, precision = {"x": x}, Precision("fp32", "")
forward = compiled(model, example=example, takes=["x"], gives=["y"], precision=precision, note=print)
ways = [torch.autograd.grad(way(x).square().sum(), list(model.parameters())) for way in (forward, model)]
print("fast" if forward.fast is not None else "eager", all(map(torch.allclose, *ways)))
"""


def run(folder: Path, **env: str) -> str:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache"), **env}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_inductor_computes_the_same(tmp_path) -> None:
    assert run(tmp_path).splitlines() == ["fast True"]


@pytest.mark.slow
def test_without_a_compiler_it_runs_as_it_is(tmp_path) -> None:
    *notes, last = run(tmp_path, CXX="/nonexistent").splitlines()
    assert last == "eager True"
    assert len(notes) == 1
    assert notes[0].startswith("compile: the model runs as it is: InvalidCxxCompiler")
