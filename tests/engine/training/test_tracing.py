"""A trace that a viewer opens and a table that a person reads, of the right steps; nothing where nobody asked."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bmctl.engine.training import tracing as module
from bmctl.engine.training.tracing import ACTIVE, WAIT, WARM_UP, tracing


def make_context(run: Path, *, profile: bool = True, rank: int = 0) -> Any:
    return SimpleNamespace(run=run, profile=profile, group=SimpleNamespace(rank=rank, device=torch.device("cpu")))


def train(context: Any, *, steps: int, said: list[str], planned: int | None = None) -> None:
    model = torch.nn.Linear(4, 2)
    with tracing(context, stage="train", num_steps=steps if planned is None else planned, note=said.append) as tracer:
        for _ in range(steps):
            model(torch.randn(3, 4)).sum().backward()
            tracer.step()


def num_matmuls(path: Path) -> int:
    events = json.loads(path.read_text())["traceEvents"]
    return sum(event.get("name") == "aten::addmm" for event in events)


def test_nothing_is_printed(tmp_path: Path) -> None:
    """In a process of its own: the profiler's library asks only once how much it may say."""
    here = Path(__file__).parents[3]
    code = (
        f"import sys; sys.path.insert(0, {str(here)!r})\n"
        "from pathlib import Path\n"
        "from tests.engine.training.test_tracing import make_context, train\n"
        f"train(make_context(Path({str(tmp_path)!r})), steps=20, said=[])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
    assert (tmp_path / "profile" / "train-rank-0.json").is_file()


def test_a_few_steps_after_warm_up_are_traced(tmp_path: Path) -> None:
    said: list[str] = []
    train(make_context(tmp_path, rank=1), steps=40, said=said)
    trace = tmp_path / "profile" / "train-rank-1.json"
    assert num_matmuls(trace) == ACTIVE
    first = WAIT + WARM_UP + 1
    assert said == [
        f"--profile: a trace of steps {first} to {first + ACTIVE - 1} is {trace}, the top operators are beside it"
    ]
    shapes = [
        event["args"].get("Input Dims")
        for event in json.loads(trace.read_text())["traceEvents"]
        if event.get("name") == "aten::addmm"
    ]
    assert shapes[0][1] == [3, 4]
    table = trace.with_suffix(".txt").read_text()
    assert "aten::addmm" in table and "Self CPU" in table and "[3, 4]" in table
    assert sorted(path.name for path in trace.parent.iterdir()) == ["train-rank-1.json", "train-rank-1.txt"]


@pytest.mark.parametrize("steps", [2, 5, WAIT + WARM_UP + ACTIVE - 1])
def test_short_trainings_are_traced_from_their_second_step_on(tmp_path: Path, steps: int) -> None:
    train(make_context(tmp_path), steps=steps, said=[])
    assert num_matmuls(tmp_path / "profile" / "train-rank-0.json") == min(ACTIVE, steps - 1)


@pytest.mark.parametrize("steps", [0, 1])
def test_nothing_to_trace_is_said(tmp_path: Path, steps: int) -> None:
    said: list[str] = []
    train(make_context(tmp_path), steps=steps, said=said)
    assert said == [f"--profile: of {steps} steps nothing is traced, two are needed: one warms up"]
    assert not list(tmp_path.iterdir())


def test_a_training_that_stops_before_the_first_traced_step_says_so(tmp_path: Path) -> None:
    said: list[str] = []
    train(make_context(tmp_path), steps=3, planned=100, said=said)
    assert said == ["--profile: the training ended after 3 steps, before the first traced"]
    assert not list(tmp_path.iterdir())


def test_a_training_that_stops_early_leaves_what_was_recorded(tmp_path: Path) -> None:
    said: list[str] = []
    with pytest.raises(KeyError), tracing(make_context(tmp_path), stage="train", num_steps=99, note=said.append) as it:
        for step in range(99):
            torch.addmm(torch.ones(2), torch.ones(2, 2), torch.ones(2, 2))
            if step == WAIT + WARM_UP + 2:
                raise KeyError
            it.step()
    assert num_matmuls(tmp_path / "profile" / "train-rank-0.json") == 3
    assert len(said) == 1


def test_without_the_flag_there_is_no_profiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "profile", None)
    said: list[str] = []
    train(make_context(tmp_path, profile=False), steps=3, said=said)
    assert not said and not list(tmp_path.iterdir())


def test_a_disk_that_does_not_take_it_does_not_end_the_training(tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "profile").write_text("in the way")
    train(make_context(tmp_path), steps=20, said=said)
    assert len(said) == 1 and said[0].startswith("--profile: the trace could not be written")
