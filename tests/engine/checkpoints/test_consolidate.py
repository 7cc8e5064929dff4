"""Packages of checkpoints: any of them, also of several processes, also of a run that did not end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine.intake.imports import WITH_DATA, make_context, rescnn
from tests.engine.ranks import on_ranks
from tests.specs import classifier, image_spec
from torch.distributed.fsdp import fully_shard

from bmctl import package, pipeline
from bmctl.engine.checkpoints.checkpoint import Identity, Snapshot, State
from bmctl.engine.checkpoints.consolidate import About
from bmctl.engine.checkpoints.saver import Saver
from bmctl.engine.intake.importing import import_stage
from bmctl.engine.parallel import Group
from bmctl.errors import PackageError, UsageError
from bmctl.inputs.image import Spec
from bmctl.methods import METHODS, MethodContext
from bmctl.recipe import Recipe, recipe_yaml
from bmctl.restore import load_model
from bmctl.session import Options

NAMES = tuple(f"kind {number}" for number in range(10))
RECIPE = {"name": "small", "model": {"name": "bmctl:rescnn"}, **WITH_DATA}
ABOUT = About(
    **classifier(image_spec("bmctl:rescnn"), class_names=NAMES),
    input=Spec(size=(28, 28), channels=1, mean=(0.5,), std=(0.5,)),
    data_fingerprint="d",
    recipe=Recipe.model_validate(RECIPE).model_dump(mode="json"),
)
ALONE = Group(rank=0, local_rank=0, world=1, device=torch.device("cpu"), threads=1)


def weights_of(factor: float) -> dict[str, torch.Tensor]:
    state = rescnn().state_dict()
    return {name: tensor * factor if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def save(run: Path, *, group: Group = ALONE, best_step: int | None = None, about: Any = None, **given: Any) -> Path:
    """Step 7; the weights are the model's, the average is half of them, the best are a quarter."""
    folder = run / "checkpoints" / "train"
    saver = Saver(folder, group=group, keep=2, asynchronous=False, note=print)
    snapshot = Snapshot(**{"model": weights_of(1), "optimizer": {}, "state": State(step=7), **given})
    fields = {"stage": "train", "best_step": best_step, "num_steps": 9, "threads": 1, "device": "cpu"}
    fields["identity"] = Identity(optimizer="adamw", data_fingerprint="d", settings={})
    saver.begin(snapshot, step=7, fields=fields | {"about": ABOUT.to_json() if about is None else about})
    return folder / "step-00000007"


def weights(found: package.ModelPackage) -> dict[str, torch.Tensor]:
    return dict(load_model(found).state_dict())


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("given", "best_step", "factor", "says"),
    [
        ({}, None, 1, "its weights are the weights of that step"),
        ({}, 7, 1, "the weights of that step, the best so far"),
        ({"ema": 0.5}, 7, 0.5, "the average of the weights of that step, the best so far"),
        ({"best": 0.25}, 3, 0.25, "the best so far, of step 3"),
        ({"ema": 0.5, "best": 0.25}, 3, 0.25, "the best so far, of step 3"),
    ],
)
def test_which_weights(tmp_path: Path, given, best_step, factor, says: str) -> None:
    path = save(tmp_path, best_step=best_step, **{kind: weights_of(number) for kind, number in given.items()})
    context = make_context(tmp_path)
    found = import_stage(context, str(path))
    assert same(weights(found), weights_of(factor))
    assert "step 7 of 9" in context.emit.text
    assert says in context.emit.text
    manifest = package.open_package(found.path).manifest
    assert (manifest.task, manifest.facts, manifest.data_fingerprint) == (ABOUT.task, ABOUT.facts, "d")
    assert (manifest.parts, manifest.input) == (ABOUT.parts, ABOUT.input)
    assert "val" not in manifest.metrics
    assert "bmctl:rescnn" in (found.path / "recipe.yaml").read_text()  # so that it can be compressed and evaluated


def test_a_sharded_checkpoint_becomes_a_package_on_one_process(tmp_path: Path) -> None:
    def work(group: Group) -> None:
        model = rescnn()
        for module in model.children():
            if list(module.parameters()):
                fully_shard(module)
        fully_shard(model)
        save(tmp_path, group=group, model=dict(model.state_dict()))

    told = on_ranks(2, work)
    assert [(one.code, one.value) for one in told] == [(0, None)] * 2
    assert len(list((tmp_path / "checkpoints" / "train" / "latest").glob("model-rank-*.safetensors"))) == 2
    found = import_stage(make_context(tmp_path), str(tmp_path / "checkpoints" / "train" / "latest"))
    assert same(weights(found), weights_of(1))


def test_it_is_evaluated_on_the_recipes_data(tmp_path: Path) -> None:
    context = make_context(tmp_path, **{key: RECIPE[key] for key in ("model", "data", "task")})
    found = import_stage(context, str(save(tmp_path)))
    assert found.manifest.metrics["val"]["num_samples"] == 100
    assert found.manifest.facts is not None
    assert found.manifest.facts["class_names"] != list(NAMES)  # the data's own count
    again = import_stage(context, str(tmp_path / "checkpoints" / "train" / "latest"))
    assert again.hash == found.hash


def test_a_pruned_model_keeps_its_structure(tmp_path: Path) -> None:
    model, method = rescnn(), METHODS["svd"]
    config = method.Config.model_validate({"method": "svd", "ratio": 0.5})
    meta = method.apply(model, config, MethodContext({"input": torch.zeros(2, 1, 28, 28)}, lambda: iter(()), {}))
    step = {"step": config.model_dump(mode="json"), "meta": meta}
    about = ABOUT.to_json() | {"history": [step]}
    found = import_stage(make_context(tmp_path), str(save(tmp_path, model=dict(model.state_dict()), about=about)))
    assert same(weights(found), dict(model.state_dict()))
    assert found.manifest.history[0].meta == json.loads(json.dumps(meta))


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "run")
    (tmp_path / "run" / "recipe.yaml").write_text(recipe_yaml(Recipe.model_validate(RECIPE)))
    with pytest.raises(UsageError) as caught:
        pipeline.import_model(Options(), source="run/checkpoints/train/latest", model=None, match="name")
    assert "-o" in caught.value.hint
    with pytest.raises(UsageError, match="says itself what it is"):
        options = Options(output="other")
        pipeline.import_model(options, source="run/checkpoints/train/latest", model="bmctl:mlp", match="name")
    options = Options(output="other2", quiet=True)
    assert pipeline.import_model(options, source="run/checkpoints/train/latest", model=None, match="name") == 0
    assert "bmctl:rescnn" in (tmp_path / "other2" / "recipe.yaml").read_text()
    found = package.find_package("other2")
    assert found.manifest.metrics["val"]["num_samples"] == 100
    assert not (tmp_path / "run" / "packages").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({}, "does not say of which model"),
        ({**ABOUT.to_json(), "more": 1}, "about.more"),
        ({"facts": {}}, "about.model"),
        (
            {**ABOUT.to_json(), "model": {**ABOUT.model.model_dump(mode="json"), "name": "os:system"}},
            "about.model|built",
        ),
        (
            {**ABOUT.to_json(), "model": {**ABOUT.model.model_dump(mode="json"), "told": {"num_classes": 11}}},
            "does not fit",
        ),
        ({**ABOUT.to_json(), "history": [{"step": {"method": "none"}, "meta": {}}]}, "no module can go through"),
        ({**ABOUT.to_json(), "history": [{"step": {"method": "ptq"}, "meta": {}}]}, "no module can go through"),
        ({**ABOUT.to_json(), "recipe": {"name": 1}}, "recipe"),
    ],
)
def test_what_it_is_not_made_of(tmp_path: Path, change: dict, says: str) -> None:
    with pytest.raises(PackageError, match=says):
        import_stage(make_context(tmp_path), str(save(tmp_path, about=change)))


@pytest.mark.parametrize("name", ["model-rank-0.safetensors", "index.json", "state.json", "manifest.json"])
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, name: str) -> None:
    path = save(tmp_path)
    (path / name).unlink()
    with pytest.raises(PackageError, match=name.replace(".", r"\.")):
        import_stage(make_context(tmp_path), str(path))
    assert path.is_dir()  # it is named, so nothing is set aside
