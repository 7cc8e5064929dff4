"""The shipped recipes, the whole way on real data, and the demo's recipe with other models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bmctl.cli import main
from bmctl.recipe import builtin_recipes, load_recipe

pytestmark = pytest.mark.slow

SHORT = [
    "train.max_steps=6", "train.batch_size=16", "compress.1.recover.fit.max_steps=4",
    "compress.1.recover.fit.batch_size=16", "compress.2.samples=16", "data.train.limit=128", "data.val.limit=32",
    "data.test.limit=64", "export.axes.batch.max=64", "export.measure.rounds=3", "export.measure.batch_size=4",
    "gates={}",
]  # fmt: skip


def run(recipe: str, output: Path, *overrides: str) -> tuple[int, dict]:
    flags = [flag for override in overrides for flag in ("--set", override)]
    code = main(["run", "--recipe", recipe, "--output", str(output), "--quiet", *flags])
    return code, json.loads((output / "report.json").read_text())


def rows(report: dict) -> dict[str, dict]:
    return {row["name"]: row for row in report["rows"]}


@pytest.mark.timeout(1500)
def test_the_demo_keeps_its_promises(tmp_path: Path) -> None:
    """All but the speeds, which `make bench` looks at: a busy machine must not fail a test."""
    _, report = run("fashion-mnist", tmp_path / "run", "gates.min_speedup=null")
    found = rows(report)
    trained, shipped = found["packages/00-train"], found["deploy/openvino"]
    assert trained["test"]["value"] >= 0.885
    assert trained["test"]["num_samples"] == 5000
    assert shipped["drop"]["value"] <= 0.01 and shipped["drop"]["low"] < shipped["drop"]["value"]
    assert shipped["size_bytes"] <= found["deploy/baseline/openvino"]["size_bytes"] / 8
    assert shipped["precision"] == "int8"
    assert found["deploy/tensorrt_rtx"]["status"] == "built, not run"
    assert all(gate["passed"] for gate in report["gates"])
    predictions = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    right = sum(p["class_name"].lower().split("/")[0][:4] in p["input"].lower().replace("-", " ") for p in predictions)
    assert len(predictions) == 10 and right >= 7


@pytest.mark.parametrize("name", ["digits", "commands", "fashion-mnist-mlp"])
def test_the_other_recipes_pass_their_gates(name: str, tmp_path: Path) -> None:
    code, report = run(name, tmp_path / "run")
    assert code == 0
    assert all(gate["passed"] for gate in report["gates"]) and report["gates"]


@pytest.mark.parametrize(
    ("model", "overrides"),
    [
        ("torchvision:resnet18", []),
        ("timm:vit_tiny_patch16_224", ["data.input.size=32", "model.args={patch_size: 8}"]),
    ],
)
@pytest.mark.timeout(900)
def test_the_demos_recipe_takes_other_models(model: str, overrides: list[str], tmp_path: Path) -> None:
    code, report = run("fashion-mnist", tmp_path / "run", f"model.name={model}", *SHORT, *overrides)
    assert code == 0
    found = rows(report)
    assert found["packages/03-ptq"]["size_bytes"] < found["packages/00-train"]["size_bytes"] / 4
    assert {name for name in found if name.startswith("deploy/")} == {
        "deploy/baseline/onnxruntime", "deploy/onnxruntime", "deploy/baseline/openvino", "deploy/openvino",
        "deploy/tensorrt_rtx",
    }  # fmt: skip
    assert found["deploy/openvino"]["test"]["num_samples"] == 64


def test_every_shipped_recipe_loads() -> None:
    found = builtin_recipes()
    assert {"fashion-mnist", "fashion-mnist-mlp", "digits", "commands", "image-folder", "reuters-r8"} <= found.keys()
    for name in found:
        assert load_recipe(name).name == name
