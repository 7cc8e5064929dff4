"""A plug-in is one file and one line in the table of its folder: each kind of them added for real, to a copy.

The plug-ins lie in tests/plugins. The command line then takes each the whole way that it reaches: from a recipe through
training, compression and export to predictions.
"""

from __future__ import annotations

import difflib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bmctl.backends import BACKENDS
from bmctl.inputs import INPUTS
from bmctl.methods import METHODS
from bmctl.sources import SOURCES
from bmctl.tasks import TASKS

SOURCE = Path(__file__).parents[1] / "src" / "bmctl"
PLUGINS = Path(__file__).parent / "plugins"

RECIPE = """
name: tiny
model: {name: "bmctl:mlp", args: {hidden: [8]}}
train: {epochs: 2, batch_size: 8, optimizer: {lr: 0.02}}
launch: {threads: 1}
"""
EXPORT = "export: {backends: [%s], measure: {batch_size: 4, rounds: 3}}\n"
PICTURES = "data: {source: {kind: folder, root: pictures}}\n"


def pictures(work: Path, *, names: tuple[str, str] = ("dark", "light")) -> None:
    """pictures/{train,val,test}/NAME/*.png: of 4x4 pixels, dark ones of the first name and light ones of the second."""
    rng = np.random.default_rng(0)
    for split, count in {"train": 24, "val": 8, "test": 8}.items():
        for base, name in zip((20, 180), names, strict=True):
            folder = work / "pictures" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = base + rng.integers(0, 50, (4, 4))
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")


class Copy:
    """The package with one plug-in more, and a folder to run it in."""

    def __init__(self, folder: Path) -> None:
        self.package, self.work = folder / "site" / "bmctl", folder / "work"
        shutil.copytree(SOURCE, self.package, ignore=shutil.ignore_patterns("__pycache__"))
        self.work.mkdir()

    def add(self, kind: str, name: str) -> None:
        """One file, one line."""
        shutil.copyfile(PLUGINS / f"{name}.py", self.package / kind / f"{name}.py")
        table = self.package / kind / "__init__.py"
        before = table.read_text().splitlines()
        start = next(i for i, line in enumerate(before) if line.startswith(f"{kind.upper()}: "))
        end = before.index(")", start)
        after = [*before[:end], f'    "{name}",', *before[end:]]
        table.write_text("\n".join(after) + "\n")

    def run(self, *command: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "bmctl", *command],
            env=os.environ | {"PYTHONPATH": str(self.package.parent)},
            cwd=self.work, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    def whole_way(self, recipe: str) -> dict[str, dict[str, Any]]:
        """`bmctl run`; the report's rows by name."""
        (self.work / "r.yaml").write_text(RECIPE + recipe)
        self.run("run", "--recipe", "./r.yaml", "--quiet")
        report = json.loads((self.work / "runs" / "tiny" / "report.json").read_text())
        return {row["name"]: row for row in report["rows"]}

    def manifest(self, folder: str) -> dict[str, Any]:
        return json.loads((self.work / "runs" / "tiny" / folder / "manifest.json").read_text())

    def predictions(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.work / "runs/tiny/predictions.jsonl").read_text().splitlines()]


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    return Copy(tmp_path)


def changes(copy: Copy) -> list[str]:
    """Files that are new, and lines that are, or are no longer, in files that were there."""
    found = []
    for path in sorted(copy.package.rglob("*.py")):
        name = path.relative_to(copy.package)
        if not (SOURCE / name).exists():
            found.append(f"new {name}")
            continue
        lines = difflib.ndiff((SOURCE / name).read_text().splitlines(), path.read_text().splitlines())
        found += [f"{name} {line}" for line in lines if line[0] in "+-"]
    assert len(list(SOURCE.rglob("*.py"))) == len(list(copy.package.rglob("*.py"))) - 1
    return found


@pytest.mark.parametrize(
    ("kind", "name"), [("inputs", "numbers"), ("tasks", "amount"), ("methods", "signs"), ("backends", "reference")]
)
def test_a_plugin_is_one_file_and_one_line(kind: str, name: str, copy: Copy) -> None:
    copy.add(kind, name)
    assert sorted(changes(copy)) == sorted([f'{kind}/__init__.py +     "{name}",', f"new {kind}/{name}.py"])


@pytest.mark.parametrize(
    ("table", "key"),
    [(INPUTS, "kind"), (SOURCES, "kind"), (TASKS, "kind"), (METHODS, "method"), (BACKENDS, "name")],
    ids=["inputs", "sources", "tasks", "methods", "backends"],
)
def test_a_plugin_is_called_by_its_file(table: Mapping[str, ModuleType], key: str) -> None:
    assert {name: module.Config.model_fields[key].default for name, module in table.items()} == {n: n for n in table}


def test_an_input_goes_the_whole_way(copy: Copy) -> None:
    """Vectors in a table: trained on, exported, and read by `infer` as the input reads them."""
    copy.add("inputs", "numbers")
    rows = np.random.default_rng(0).normal(loc=3, size=(200, 3)).round(3)
    lines = [f"{a} {b} {c},{'low' if a + b < 6 else 'high'}" for a, b, c in rows]
    (copy.work / "rows.csv").write_text("\n".join(["text,label", *lines, ""]))
    (copy.work / "asked.txt").write_text("5 4.5 3\n1 1.5 3\n")
    found = copy.whole_way(
        "data:\n  source: {kind: table, path: rows.csv, val: 0.2, test: 0.2}\n  input: {kind: numbers}\n"
        + EXPORT % "onnxruntime" + "infer: {data: asked.txt}\n"
    )  # fmt: skip
    spec = copy.manifest("packages/00-train")["input"]
    assert spec["kind"] == "numbers" and np.allclose(spec["mean"], 3, atol=0.3)
    part = copy.manifest("deploy/onnxruntime")["parts"]["model"]
    assert [(one["name"], one["shape"]) for one in part["signature"]["inputs"]] == [("numbers", ["batch", 3])]
    assert part["parity"]["passed"]
    assert found["deploy/onnxruntime"]["test"]["value"] > found["deploy/onnxruntime"]["test"]["trivial"]
    named = [(one["input"], one["class_name"]) for one in copy.predictions()]
    assert named == [("asked.txt:1", "high"), ("asked.txt:2", "low")]


def test_a_task_goes_the_whole_way(copy: Copy) -> None:
    """Pictures whose classes are amounts: its own metrics are reported and gated, its own columns predicted."""
    copy.add("tasks", "amount")
    pictures(copy.work, names=("0", "2"))
    found = copy.whole_way(
        PICTURES + "task: {kind: amount, beta: 0.5}\n" + EXPORT % "onnxruntime"
        + "infer: {data: pictures/test}\ngates: {metrics: {rmse: {max: 0.9}, mae: {max_drop: 0.01}}}\n"
    )  # fmt: skip
    test = found["deploy/onnxruntime"]["test"]
    assert (test["name"], test["better"], test["unit"], test["num_samples"]) == ("rmse", "lower", "kg", 16)
    assert test["value"] < test["trivial"] == 1.0 and test["low"] < test["value"] < test["high"]
    assert list(found["deploy/onnxruntime"]["test_drops"]) == ["rmse", "mae"]
    package = copy.manifest("packages/00-train")
    assert package["facts"]["amounts"] == [0.0, 2.0] and list(package["parts"]) == ["scale"]
    assert (copy.work / "runs/tiny/deploy/onnxruntime/scale.onnx").is_file()
    predicted = copy.predictions()
    assert len(predicted) == 16 and all(set(one) == {"input", "amount"} for one in predicted)
    assert all((one["amount"] > 1) == ("/2/" in one["input"]) for one in predicted)
    shown = copy.run("evaluate", "runs/tiny/deploy/onnxruntime", "--split", "test", "--json")
    assert json.loads(shown)["name"] == "rmse"


def test_a_method_goes_the_whole_way(copy: Copy) -> None:
    """A step of a recipe and of the command line, whose structure is restored wherever the package is opened."""
    copy.add("methods", "signs")
    pictures(copy.work)
    found = copy.whole_way(
        PICTURES + "compress: [{method: signs}]\n" + EXPORT % "onnxruntime" + "infer: {data: pictures/test}\n"
    )
    (step,) = copy.manifest("packages/01-signs")["history"]
    assert step == {"step": step["step"], "meta": {"layers": ["layers.1", "layers.3"]}}
    assert step["step"]["method"] == "signs"
    assert found["deploy/onnxruntime"]["drop"] is not None and len(copy.predictions()) == 16
    copy.run(
        "quantize",
        "runs/tiny/packages/00-train",
        "--method",
        "signs",
        "--set",
        "ignore=[layers.3]",
        "-o",
        "other",
        "-q",
    )
    manifest = json.loads((copy.work / "other/packages/01-signs/manifest.json").read_text())
    assert manifest["history"][-1]["meta"] == {"layers": ["layers.1"]}


def test_a_backend_goes_the_whole_way(copy: Copy) -> None:
    """Built, compared, judged by the task, timed and served beside another one."""
    copy.add("backends", "reference")
    pictures(copy.work)
    found = copy.whole_way(
        PICTURES + EXPORT % "onnxruntime, reference"
        + "infer: {data: pictures/test, backend: reference}\ngates: {max_drop: 0.0, backends: [reference]}\n"
    )  # fmt: skip
    row = found["deploy/reference"]
    assert row["backend"] == "reference" and row["status"] == "ran"
    assert row["latency"]["num_rounds"] == 3 and row["samples_per_s"] > 0
    assert row["test"]["value"] == found["deploy/onnxruntime"]["test"]["value"]
    part = copy.manifest("deploy/reference")["parts"]["model"]
    assert part["artifact"] == "model.plain" and part["parity"]["passed"] and part["meta"]["version"]
    assert len(copy.predictions()) == 16
    told = copy.run("infer", "pictures/test/light", "-m", "runs/tiny/deploy/reference/model.plain", "--format", "csv")
    assert told.splitlines()[0] == "input,class_name,class_index,score" and len(told.splitlines()) == 9
