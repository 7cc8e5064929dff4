"""The commands as a user runs them: small, real, and end to end."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bmctl.backends import tensorrt, tensorrt_rtx
from bmctl.cli import main
from bmctl.engine.deployment import export as engine_export
from bmctl.engine.deployment import prove as engine_prove

RECIPE = """
name: tiny
model: {name: "bmctl:rescnn", args: {width: 8}}
data:
  source: bundled
  train: {limit: 256}
  val: {limit: 100}
  test: {limit: 200}
train: {epochs: 1, batch_size: 64}
launch: {threads: 1}
compress:
  - {method: structured, ratio: 0.25, recover: {fit: {epochs: 1}}}
  - {method: ptq, samples: 32}
export:
  backends: [onnxruntime, openvino]
  measure: {batch_size: 16, rounds: 3}
infer: {data: "bundled:samples"}
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the recipe, and the three lines that are a whole script, run in it."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "tiny.yaml").write_text(RECIPE)
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert main(["train", "--recipe", "./tiny.yaml", "-q"]) == 0
        assert main(["compress", "-q"]) == 0
        assert main(["export", "--tensorrt", "--set", "gates.allow_unrun=true", "-q"]) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def here(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(home)
    return home


def files(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*")) if path.is_file()}


def document(capsys: pytest.CaptureFixture[str]) -> dict:
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(("is_here", "named"), [(True, "tensorrt_rtx"), (True, "onnxruntime"), (False, "tensorrt_rtx")])
def test_the_flag_takes_tensorrt_where_it_runs_whatever_the_recipe_names(
    is_here: bool, named: str, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[set[str]] = []
    monkeypatch.setattr(tensorrt, "unavailable", lambda config: "" if is_here else "no TensorRT")
    monkeypatch.setattr(tensorrt_rtx, "unavailable", lambda config: "no GPU")
    monkeypatch.setattr(
        engine_export, "export_package", lambda *_, backends, **__: asked.append({one.name for one in backends}) or []
    )
    monkeypatch.setattr(engine_prove, "prove", lambda *_, **__: None)
    run = Path(shutil.copytree(here / "runs" / "tiny", tmp_path / "tiny"))
    assert main(["export", str(run), "--tensorrt", "--backend", named, "-q"]) == 0
    assert asked[-1] == ({named, "tensorrt"} if is_here else {named, "tensorrt_rtx"})
    notes = [json.loads(line).get("text", "") for line in (run / "metrics.jsonl").read_text().splitlines()]
    (note,) = [text for text in notes[-10:] if text.startswith("--tensorrt takes ")]
    if is_here:
        assert note == "--tensorrt takes tensorrt: it is installed, and runs here"
    else:
        assert note.startswith("--tensorrt takes tensorrt_rtx, which the recipe names as well: no TensorRT; no GPU; ")


def test_three_lines_are_a_whole_script(here: Path) -> None:
    run = here / "runs" / "tiny"
    assert [path.name for path in sorted((run / "packages").iterdir())] == ["00-train", "01-structured", "02-ptq"]
    deployed = {path.name for path in (run / "deploy").iterdir() if not path.name.startswith(".")}
    assert deployed == {"baseline", "onnxruntime", "openvino", "tensorrt_rtx"}
    assert (run / "deploy" / "tensorrt_rtx" / "model.rtx.engine").stat().st_size > 10_000
    manifest = json.loads((run / "deploy" / "tensorrt_rtx" / "manifest.json").read_text())
    assert manifest["status"] == "built, not run"
    assert manifest["command_elsewhere"].startswith("bmctl export ")
    report = json.loads((run / "report.json").read_text())
    rows = {row["name"]: row for row in report["rows"]}
    assert rows["deploy/openvino"]["test"]["num_samples"] == 200
    assert rows["deploy/openvino"]["drop"]["low"] is not None
    assert rows["deploy/openvino"]["speedup"]["value"] > 0
    assert rows["deploy/openvino"]["peak_memory_bytes"] > 100_000
    assert rows["deploy/tensorrt_rtx"]["peak_memory_bytes"] is None
    assert list(rows["deploy/openvino"]["test_drops"]) == ["accuracy", "macro_f1", "loss"]
    assert rows["deploy/tensorrt_rtx"]["test"] is None
    assert rows["packages/00-train"]["val"]["trivial"] == pytest.approx(0.1)


def test_what_is_finished_is_not_run_again(here: Path) -> None:
    before = files(here / "runs" / "tiny" / "packages") | files(here / "runs" / "tiny" / "deploy")
    assert main(["export", "-r", "./tiny.yaml", "-q"]) == 0
    assert files(here / "runs" / "tiny" / "packages") | files(here / "runs" / "tiny" / "deploy") == before


def test_another_recipe_for_the_same_run_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(here / "runs" / "tiny" / "packages")
    assert main(["train", "-r", "./tiny.yaml", "--set", "train.epochs=2"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert files(here / "runs" / "tiny" / "packages") == before


def test_a_failed_gate_exits_8_and_the_report_says_it(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--set", "gates.min_speedup=1000", "--json"]) == 8
    captured = capsys.readouterr()
    assert any(not gate["passed"] for gate in json.loads(captured.out)["gates"])
    assert "min_speedup" in captured.err


def test_any_metric_of_the_task_is_gated(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    limits = ["--set", "gates.metrics.macro_f1.min=0.999", "--set", "gates.metrics.loss.max=1000"]
    assert main(["export", "--backend", "openvino", *limits, "--json"]) == 8
    found = json.loads(capsys.readouterr().out)["gates"]
    verdicts = {gate["name"]: gate["passed"] for gate in found if gate["artifact"] == "deploy/openvino"}
    assert (verdicts["metrics.macro_f1.min"], verdicts["metrics.loss.max"]) == (False, True)
    assert main(["export", "--set", "gates.metrics.macro.min=0.1"]) == 3
    assert "did you mean macro_f1?" in capsys.readouterr().err


def test_an_engine_that_was_not_run_fails_its_gate(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gate = ["--set", "gates.max_drop=1.0", "--set", "gates.backends=[tensorrt_rtx]"]
    assert main(["export", "--backend", "tensorrt_rtx", *gate]) == 8
    assert "built, not run" in capsys.readouterr().err
    assert main(["export", "--backend", "tensorrt_rtx", *gate, "--set", "gates.allow_unrun=true", "-q"]) == 0


@pytest.mark.parametrize(
    ("verb", "method", "knob", "source"),
    [
        ("prune", "magnitude", "sparsity=0.7", "00-train"),
        ("lowrank", "svd", "energy=0.9", "00-train"),
        ("quantize", "ptq", "samples=50", "01-structured"),
        ("quantize", "cast", "dtype=bf16", "00-train"),
    ],
)
def test_one_step_needs_no_recipe(here: Path, tmp_path: Path, verb: str, method: str, knob: str, source: str) -> None:
    package = f"runs/tiny/packages/{source}"
    assert main([verb, package, "--method", method, "--set", knob, "-o", str(tmp_path / "run"), "-q"]) == 0
    made = sorted((tmp_path / "run" / "packages").iterdir())
    assert [path.name[:2] for path in made] == ["00", "01"]
    manifest = json.loads((made[-1] / "manifest.json").read_text())
    step = manifest["history"][-1]["step"]
    name, _, value = knob.partition("=")
    assert step["method"] == method and str(step[name]) == value
    assert manifest["parent"] == hashlib.sha256((made[0] / "manifest.json").read_bytes()).hexdigest()
    assert manifest["metrics"]["val"]["num_samples"] == 100


def test_prune_with_a_recipe_does_its_steps_up_to_the_last_pruning(here: Path, tmp_path: Path) -> None:
    assert main(["prune", "-r", "./tiny.yaml", "-o", str(tmp_path / "run"), "-q"]) == 0
    assert [p.name for p in sorted((tmp_path / "run" / "packages").iterdir())] == ["00-train", "01-structured"]


def test_a_package_can_be_trained_further(here: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(["train", "runs/tiny/packages/01-structured", "-o", str(run), "--set", "train.epochs=2", "-q"]) == 0
    first, second = (json.loads((p / "manifest.json").read_text()) for p in sorted((run / "packages").iterdir()))
    assert second["stage"] == "train" and second["history"] == first["history"] and second["parent"]
    assert main(["train", "runs/tiny/packages/02-ptq", "-o", str(tmp_path / "frozen"), "-q"]) == 11


def test_a_foreign_onnx_is_quantized_with_the_recipes_data(here: Path, tmp_path: Path) -> None:
    graph = here / "runs" / "tiny" / "deploy" / "baseline" / "onnxruntime" / "model.onnx"
    assert main(["import", str(graph), "-o", str(tmp_path / "bare"), "-q"]) == 0
    manifest = json.loads((tmp_path / "bare" / "packages" / "00-import" / "manifest.json").read_text())
    assert manifest["frozen"] and manifest["model"] is None
    assert main(["export", str(tmp_path / "bare"), "--backend", "onnxruntime", "-q"]) == 0
    assert (tmp_path / "bare" / "deploy" / "onnxruntime" / "model.onnx").is_file()


def test_evaluate_tells_metric_and_interval(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "runs/tiny/deploy/openvino", "--split", "test", "--json"]) == 0
    found = document(capsys)
    assert found["num_samples"] == 200 and found["low"] < found["value"] < found["high"]


def test_a_command_without_a_recipe_says_which_run_it_takes(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate"]) == 0
    assert "run: runs/tiny" in capsys.readouterr().err


def test_infer_writes_lines_that_a_script_can_read(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["infer", "-q"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 10 and all(0 <= line["score"] <= 1 for line in lines)
    assert main(["infer", "bundled:samples", "-m", "runs/tiny", "--format", "csv", "-q"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 11 and rows[0].startswith("input,")
    assert main(["infer", "bundled:samples", "-m", "runs/tiny", "--json", "-q"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 10


def test_a_dry_run_writes_nothing_and_loads_no_torch(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    code = (
        "import sys; from bmctl.cli import main; code = main(['run', '-r', './tiny.yaml', '--dry-run', '--json']);"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert list(json.loads(done.stdout)) == ["run", "train", "compress", "export", "infer"]
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]


def test_overwrite_does_everything_again(here: Path, tmp_path: Path) -> None:
    args = ["run", "-r", "./tiny.yaml", "-o", str(tmp_path / "run"), "--to", "train", "-q"]
    assert main(args) == 0
    first = files(tmp_path / "run" / "packages")
    assert main([*args, "--overwrite"]) == 0
    second = files(tmp_path / "run" / "packages")
    assert first.keys() == second.keys() and all(second[name] > first[name] for name in first)
