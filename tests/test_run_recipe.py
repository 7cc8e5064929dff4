"""A run's recipe is what its packages were made with: what a command says for this once leaves it."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.bad_input import fixtures

from bmctl import rundir
from bmctl.cli import main
from bmctl.recipe import Recipe, load_recipe

CHAIN = """
compress: [{method: magnitude, sparsity: 0.5}]
"""
BACKENDS = "[onnxruntime, {name: openvino, precision: auto}]"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, r.yaml, and run/, trained and compressed by it."""
    folder = tmp_path_factory.mktemp("made")
    fixtures.folder(folder, cache=folder)
    text = (folder / "r.yaml").read_text().replace("backends: [onnxruntime]", f"backends: {BACKENDS}")
    (folder / "r.yaml").write_text(text + CHAIN)
    with contextlib.chdir(folder):
        assert main(["train", "-r", "r.yaml", "-o", "run", "--set", "train.epochs=2", "-q"]) == 0
        assert main(["compress", "run", "-q"]) == 0
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of it, to work in."""
    shutil.copytree(made, tmp_path / "here")
    with contextlib.chdir(tmp_path / "here"):
        yield tmp_path / "here"


def own_files(run: Path) -> dict[str, bytes]:
    return {name: (run / name).read_bytes() for name in ("recipe.yaml", "manifest.json")}


def packages(run: Path) -> list[str]:
    return [path.name for path in sorted((run / "packages").iterdir())]


def recipe(run: Path) -> Recipe:
    return load_recipe(run / "recipe.yaml")


@pytest.mark.parametrize(
    "command",
    [
        "export run --backend onnxruntime",
        pytest.param("export run --backend onnxruntime --set gates.max_latency_ms=100000", marks=pytest.mark.slow),
        "evaluate run --set data.val.limit=2",
        pytest.param("prune run --method magnitude --set sparsity=0.7", marks=pytest.mark.slow),
        pytest.param("lowrank run/packages/00-train --set rank=1 --overwrite", marks=pytest.mark.slow),
        "infer data/test/a -m run --set infer.batch_size=2",
        pytest.param("train -r r.yaml -o run --set train.epochs=2 --device cpu", marks=pytest.mark.slow),
    ],
)
def test_what_is_said_for_this_once_is_not_kept(here: Path, command: str) -> None:
    before = own_files(here / "run")
    assert main([*command.split(), "-q"]) == 0
    assert own_files(here / "run") == before


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("export run --backend onnxruntime --set gates.max_latency_ms=1.0e-9", 8),
        ("export run --backend onnxrutnime", 2),
        pytest.param("export -r r.yaml -o run --set train.epochs=9", 2, marks=pytest.mark.slow),
        ("train -r r.yaml -o run --set train.epochs=9", 2),
        pytest.param("compress -o run --set compress.0.sparsity=0.9", 2, marks=pytest.mark.slow),
        ("train -r r.yaml -o run --set data.source.root=gone --overwrite", 4),
        pytest.param("import gone.pt -r r.yaml -o run", 5, marks=pytest.mark.slow),
        pytest.param("quantize run --method ptq --set samples=1000", 4, marks=pytest.mark.slow),
    ],
)
def test_a_failing_command_leaves_it(here: Path, command: str, code: int) -> None:
    before = own_files(here / "run")
    assert main([*command.split(), "-q"]) == code
    assert own_files(here / "run") == before


def test_a_run_begins_with_the_recipe_that_made_it(here: Path) -> None:
    kept = recipe(here / "run")
    assert kept.train is not None and kept.train.epochs == 2
    assert [step.method for step in kept.compress] == ["magnitude"]


def test_one_step_is_added_and_erases_nothing(here: Path) -> None:
    assert main(["prune", "run", "--method", "magnitude", "--set", "sparsity=0.7", "-q"]) == 0
    assert packages(here / "run") == ["00-train", "01-magnitude", "02-magnitude"]
    assert [step.sparsity for step in recipe(here / "run").compress] == [0.5]
    assert main(["compress", "-o", "run", "-q"]) == 0
    assert packages(here / "run") == ["00-train", "01-magnitude", "02-magnitude"]


def test_a_run_of_one_step_knows_it(here: Path) -> None:
    command = ["prune", "run/packages/00-train", "--method", "magnitude", "--set", "sparsity=0.7", "-o", "other", "-q"]
    assert main(command) == 0
    assert [step.sparsity for step in recipe(here / "other").compress] == [0.7]
    assert main(["compress", "-o", "other", "-q"]) == 0


@pytest.mark.slow
def test_one_backend_now_is_all_of_them_later_each_as_the_recipe_has_it(here: Path) -> None:
    assert main(["export", "run", "--backend", "openvino", "-q"]) == 0
    assert rundir.is_run(here / "run") and not (here / "run" / "deploy" / "onnxruntime").exists()
    assert main(["export", "run", "-q"]) == 0
    assert (here / "run" / "deploy" / "onnxruntime").is_dir()
    assert (here / "run" / "packages" / "01-magnitude").is_dir()


def test_steps_that_were_done_otherwise_are_the_runs_own(here: Path) -> None:
    assert main(["compress", "-o", "run", "--set", "compress.0.sparsity=0.9", "--overwrite", "-q"]) == 0
    assert [step.sparsity for step in recipe(here / "run").compress] == [0.9]
    assert main(["compress", "-o", "run", "-q"]) == 0


def test_another_recipe_of_the_same_stages_is_the_runs_own_once_it_has_succeeded(here: Path) -> None:
    text = (here / "r.yaml").read_text().replace("epochs: 1", "epochs: 2").replace(BACKENDS, "[onnxruntime]")
    (here / "other.yaml").write_text(text + "gates: {max_latency_ms: 1.0e-9}\n")
    before = own_files(here / "run")
    assert main(["export", "-r", "other.yaml", "-o", "run", "-q"]) == 8
    assert own_files(here / "run") == before
    (here / "other.yaml").write_text(text + "gates: {max_latency_ms: 100000}\n")
    assert main(["export", "-r", "other.yaml", "-o", "run", "-q"]) == 0
    assert recipe(here / "run").gates.max_latency_ms == 100000
    assert len(recipe(here / "run").export.backends) == 1


def test_the_newest_run_is_the_one_that_was_used_last(here: Path) -> None:
    (here / "runs").mkdir()
    for name in "ab":
        shutil.copytree("run", here / "runs" / name)
        for path in (here / "runs" / name, *(here / "runs" / name).iterdir()):
            os.utime(path, (1, 1 + "ab".index(name)))
    assert rundir.newest_run().name == "b"
    assert main(["evaluate", "runs/a", "-q"]) == 0
    assert rundir.newest_run().name == "a"
