"""`--profile` and the split of a step, as a user meets them: flags in, files and lines out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bmctl.cli import main

RECIPE = """
name: tiny
model: {name: "bmctl:mlp"}
data: {source: {kind: bundled}, train: {limit: 320}, val: {limit: 100}}
task: {kind: classify}
train: {epochs: 2, batch_size: 16, precision: fp32}
launch: {device: cpu, timeout_s: 60}
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE)
    return path


def events(run: Path, kind: str) -> list[dict]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def test_a_training_says_where_its_time_went(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "-r", str(recipe), "-o", "run", "--set", "launch.threads=1"]) == 0
    err = capsys.readouterr().err
    (line,) = [line for line in err.splitlines() if line.startswith("train: step ")]
    assert "forward" in line and "backward" in line and "optimizer" in line
    (done,) = events(Path("run"), "done")
    assert all(ms >= 0 for ms in done["parts"].values()) and done["parts"]["backward"] > 0
    # The parts are those of whole steps; the log's clock counts what it says itself as well, and no set-up.
    assert 0.2 < sum(done["parts"].values()) * done["steps"] / 1000 / done["seconds"] < 1.05
    assert not Path("run/profile").exists()


def test_train_with_profile_leaves_a_trace_and_says_where(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "-r", str(recipe), "-o", "run", "--profile", "--set", "launch.threads=1"]) == 0
    trace = Path("run/profile/train-rank-0.json")
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert "aten::addmm" in names
    assert "aten::addmm" in trace.with_suffix(".txt").read_text()
    assert f"{trace}, the top operators are beside it" in capsys.readouterr().err


@pytest.mark.slow
def test_every_process_of_a_group_leaves_its_own(recipe: Path) -> None:
    assert main(["distribute", "-r", str(recipe), "-o", "run", "--nproc", "2", "--profile", "-q"]) == 0
    assert sorted(path.name for path in Path("run/profile").iterdir()) == [
        f"train-rank-{rank}.{suffix}" for rank in (0, 1) for suffix in ("json", "txt")
    ]
    (done,) = events(Path("run"), "done")
    assert done["parts"]["communication"] > 0
