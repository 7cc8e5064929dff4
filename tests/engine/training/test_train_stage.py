"""The stage: a recipe in, the run's first package out, and nothing done twice."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.engine.runs import Seen, make_context, make_recipe

from bmctl.engine.loading.arrays import array_batches
from bmctl.engine.loading.data import Data, open_split
from bmctl.engine.training.train_stage import train_stage
from bmctl.errors import RecipeError, UsageError
from bmctl.package import find_package
from bmctl.restore import load_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stage")
    train_stage(make_context(folder / "run", make_recipe(folder, "train.epochs=2")))
    return folder


def test_the_package_is_worth_what_it_says(folder: Path) -> None:
    recipe, package = make_recipe(folder, "train.epochs=2"), find_package(folder / "run")
    manifest = package.manifest
    assert package.path.name == "00-train"
    assert (manifest.parent, manifest.frozen, len(manifest.facts["class_names"])) == (None, False, 10)
    assert manifest.model.name == "bmctl:mlp"
    assert manifest.metrics["num_params"] == 784 * 512 + 512 + 512 * 256 + 256 + 256 * 10 + 10
    assert manifest.metrics["size_bytes"] == package.weights.stat().st_size
    model = load_model(package)
    assert package.given is not None
    split = open_split(Data(recipe), name="val", given=package.given)
    hits = [
        (model(torch.from_numpy(batch["input"])).argmax(1).numpy() == batch["label"]).sum()
        for batch in array_batches(split, batch_size=50)
    ]
    val = manifest.metrics["val"]
    assert val["value"] == sum(hits) / 100
    assert val["low"] < val["value"] < val["high"]
    assert list((folder / "run" / "evaluations").iterdir())


def test_a_finished_stage_is_not_run_again(folder: Path) -> None:
    seen = Seen()
    context = make_context(folder / "run", make_recipe(folder, "train.epochs=2"), seen=seen)
    before = find_package(folder / "run").hash
    assert train_stage(context).hash == before
    assert [event["event"] for event in seen.events] == ["skip"]


@pytest.mark.parametrize("override", ["train.epochs=1", "data.train.limit=330", "seed=1", "task.label_smoothing=0.1"])
def test_another_recipe_is_not_mixed_in(folder: Path, override: str) -> None:
    context = make_context(folder / "run", make_recipe(folder, "train.epochs=2", override))
    with pytest.raises(UsageError, match="another recipe or on other data") as caught:
        train_stage(context)
    assert "--overwrite" in caught.value.hint


def test_overwrite_does_it_again(tmp_path: Path) -> None:
    hashes = []
    for seed in (0, 1):
        recipe = make_recipe(tmp_path, "train.epochs=1", f"seed={seed}")
        hashes.append(train_stage(make_context(tmp_path / "run", recipe, overwrite=bool(seed))).hash)
    assert hashes[0] != hashes[1] == find_package(tmp_path / "run").hash
    assert [path.name for path in (tmp_path / "run" / "packages").iterdir()] == ["00-train"]


def test_a_recipe_without_training(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path).model_copy(update={"train": None, "task": None})
    with pytest.raises(RecipeError, match="no task and no train section"):
        train_stage(make_context(tmp_path / "run", recipe))
