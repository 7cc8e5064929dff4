"""A user's own .py in the place of plug-ins, the whole way; the files are those of docs/own-code.md."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from bmctl.cli import main
from bmctl.core import owncode
from bmctl.recipe import load_recipe, recipe_yaml

PAGE = Path(__file__).parents[1] / "docs" / "own-code.md"
FILES = dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", PAGE.read_text(), flags=re.DOTALL))
RECIPE = """
name: own
model: {name: "file:net.py:Net", args: {hidden: 8}}
data:
  source: {kind: tabular, path: FOLDER/homes.csv, value: price}
task: {kind: file, path: my_task.py, args: {quantile: 0.8}}
train: {epochs: 8, batch_size: 32, optimizer: {name: adamw, lr: 2.0e-2}}
compress:
  - {method: magnitude, sparsity: 0.2}
  - {method: ptq}
export:
  backends: [onnxruntime, openvino]
  axes: {batch: {min: 1, opt: 4, max: 16}}
  measure: {rounds: 3, batch_size: 4}
"""


@pytest.fixture(autouse=True)
def forget() -> None:
    """Nothing is trusted, and no file known, from another test."""
    owncode.trust(False)
    owncode._loaded.clear()


def write(folder: Path, **changes: str) -> Path:
    rng = np.random.default_rng(0)
    rows = [f"{size:.1f},{rooms},{1000 * size + 9000 * rooms:.0f}" for size, rooms in
            zip(rng.uniform(20, 200, 600), rng.integers(1, 7, 600), strict=True)]  # fmt: skip
    (folder / "homes.csv").write_text("\n".join(["size,rooms,price", *rows]))
    for name, code in (FILES | changes).items():
        (folder / name).write_text(code)
    (folder / "recipe.yaml").write_text(RECIPE.replace("FOLDER", str(folder)))
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    recipe = write(folder)
    assert main(["run", "--recipe", str(recipe), "-o", str(folder / "run"), "--quiet", "--trust-code"]) == 0
    for name in FILES:
        (folder / name).unlink()
    return folder / "run"


def test_the_example_is_as_short_as_it_is_called() -> None:
    assert set(FILES) == {"net.py", "my_task.py"}
    assert len(FILES["my_task.py"].splitlines()) < 60


def test_every_artifact_is_judged_by_the_own_metric(whole: Path) -> None:
    rows = {row["name"]: row for row in json.loads((whole / "report.json").read_text())["rows"]}
    for name in ("packages/00-train", "deploy/onnxruntime", "deploy/openvino"):
        test = rows[name]["test"]
        assert (test["name"], test["better"]) == ("covered", "higher")
        assert 0.5 < test["value"] <= 1
        assert {"rmse", "mae", "r2"} < set(
            rows[name]["metrics"]["test"] if "metrics" in rows[name] else ["rmse", "mae", "r2", "covered"]
        )


def test_the_code_goes_along_and_is_enough(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in (whole, whole / "packages/02-ptq", whole / "deploy/onnxruntime"):
        assert sorted(path.name.partition("-")[2] for path in (folder / "code").iterdir()) == [
            "my_task.py",
            "net.py",
        ] or (folder.name == "onnxruntime")
    shutil.copytree(whole / "packages/01-magnitude", tmp_path / "there")
    row = ["infer", '{"size": 100, "rooms": 3}', "--model", str(tmp_path / "there"), "--quiet"]
    assert main(row) == 5
    assert "code that would run with all your rights" in capsys.readouterr().err
    assert main([*row, "--trust-code"]) == 0
    assert 80_000 < json.loads(capsys.readouterr().out)["value"] < 250_000


def test_changed_code_is_not_what_made_the_package(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole / "packages/01-magnitude", tmp_path / "there")
    (net,) = (tmp_path / "there/code").glob("*net.py")
    net.write_text(net.read_text() + "\nprint('more')\n")
    assert main(["infer", '{"size": 1, "rooms": 3}', "--model", str(tmp_path / "there"), "--trust-code"]) == 5
    assert "is not the code that" in capsys.readouterr().err
    net.unlink()
    assert main(["infer", '{"size": 1, "rooms": 3}', "--model", str(tmp_path / "there"), "--trust-code"]) == 5
    assert "is gone" in capsys.readouterr().err


def test_a_recipe_alone_runs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write(tmp_path, **{"net.py": f"open({str(tmp_path / 'ran')!r}, 'w')\n"})
    for command in (["validate", str(recipe)], ["train", "-r", str(recipe), "-o", str(tmp_path / "run")]):
        assert main(command) == 5
        said = capsys.readouterr().err
        assert "net.py, code that would run with all your rights" in said
        assert "--trust-code" in said
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "run").exists()


def test_a_saved_recipe_says_the_same(tmp_path: Path) -> None:
    owncode.trust(True)
    found = load_recipe(write(tmp_path))
    assert found.task.quantile == 0.8
    text = recipe_yaml(found)
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved/recipe.yaml").write_text(text)
    owncode.keep(text, tmp_path / "saved")
    owncode._loaded.clear()
    again = load_recipe(tmp_path / "saved/recipe.yaml")
    assert recipe_yaml(again) == text
    assert again.task.quantile == 0.8


@pytest.mark.parametrize(
    ("changes", "override", "said"),
    [
        ({}, "task.args.quantile=1.5", "task.args.quantile"),
        ({}, "task.args.quantil=0.5", "quantil"),
        ({}, "task.path=gone.py", "there is no file"),
        ({}, "model.name=file:net.py", "names no class"),
        ({}, "model.name=file:net.py:Gone", "Gone"),
        ({"my_task.py": "x = 1\n"}, "seed=1", "it lacks"),
        ({"my_task.py": "BASE = 'regres'\n"}, "seed=1", "BASE is 'regres'"),
        ({"my_task.py": "BASE = 'regress'\nConfig = 3\n"}, "seed=1", "Config is no class"),
        ({"my_task.py": "\n1 / 0\n"}, "seed=1", "my_task.py, line 2: ZeroDivisionError"),
        ({"my_task.py": "def f(:\n"}, "seed=1", "my_task.py, line 1: SyntaxError"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, str], override: str, said: str
) -> None:
    recipe = write(tmp_path, **changes)
    assert main(["validate", str(recipe), "--trust-code", "--set", override]) == 3
    assert said in capsys.readouterr().err


SOURCE = """
import numpy as np

from bmctl.core.columns import Real
from bmctl.schema import Count, Strict
from bmctl.sources.samples import ArraySamples

INPUT = "tabular"


class Config(Strict):
    count: Count = 100


def open(config, *, split):
    size = np.random.default_rng(len(split)).uniform(-1, 1, config.count).astype(np.float32)
    columns = {"size": Real(), "value": Real(mean=0.0, std=1.0)}
    return ArraySamples(columns, {"size": size, "value": 3 * size}, f"{split}-{config.count}")
"""
METHOD = """
import torch

from bmctl.fit import ModuleStepConfig

VERB, LEVEL, CALIBRATES, QUANTIZES = "prune", "module", False, False


class Config(ModuleStepConfig):
    digits: int = 2


def apply(model, config, context):
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.mul(10**config.digits).round().div(10**config.digits))
    return {"digits": config.digits}


def restore(model, config, meta):
    assert meta["digits"] == config.digits
"""
OTHERS = """
name: others
model: bmctl:tabular
data: {source: {kind: file, path: source.py, args: {count: 64}}}
task: regress
train: {epochs: 2, batch_size: 16}
compress: [{method: file, path: method.py, name: rounded, args: {digits: 1}}]
"""


@pytest.mark.parametrize("flags", [[], pytest.param(["--set", "launch.nproc=2"], marks=pytest.mark.slow)])
def test_a_source_and_a_method_by_any_number_of_processes(tmp_path: Path, flags: list[str]) -> None:
    for name, code in {"source.py": SOURCE, "method.py": METHOD, "recipe.yaml": OTHERS}.items():
        (tmp_path / name).write_text(code)
    run = tmp_path / "run"
    assert main(["train", "-r", str(tmp_path / "recipe.yaml"), "-o", str(run), "-q", "--trust-code", *flags]) == 0
    for name in ("source.py", "method.py"):
        (tmp_path / name).unlink()
    owncode._loaded.clear()
    assert main(["compress", str(run), "-q", "--trust-code"]) == 0
    (package,) = (run / "packages").glob("01-rounded")
    manifest = json.loads((package / "manifest.json").read_text())
    assert manifest["history"][0]["step"]["args"] == {"digits": 1}
    assert owncode.is_own(manifest["history"][0]["step"]["method"])
    from safetensors.numpy import load_file

    weights = load_file(package / "weights.safetensors")
    assert all(np.allclose(10 * weight, np.round(10 * weight), atol=1e-5) for weight in weights.values())
    owncode._loaded.clear()
    owncode.trust(True)
    from bmctl.package import open_package
    from bmctl.restore import load_model

    load_model(open_package(package))
