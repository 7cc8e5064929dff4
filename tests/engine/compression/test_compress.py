"""Chains of steps on a real run: what is published, what is done again, and what is refused."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bmctl import models, package
from bmctl.core import masks
from bmctl.core.scores import read_all
from bmctl.engine.compression import compress, step
from bmctl.engine.context import StageContext
from bmctl.engine.evaluation import appraise
from bmctl.engine.parallel import join
from bmctl.engine.training.train_stage import train_stage
from bmctl.errors import (
    InterruptedRunError,
    PackageError,
    PreemptedError,
    RecipeError,
    UnsupportedError,
    UsageError,
)
from bmctl.package import ModelPackage
from bmctl.processes.signals import Stop
from bmctl.recipe import LaunchConfig, Recipe
from bmctl.restore import load_model
from bmctl.tasks import TASKS

RECOVER = {"fit": {"epochs": 1, "batch_size": 16, "max_steps": 3, "precision": "fp32"}}
STRUCTURED = {"method": "structured", "ratio": 0.5}
MAGNITUDE = {"method": "magnitude", "sparsity": 0.5}
PTQ = {"method": "ptq", "samples": 8}


def recipe(steps: Sequence[Mapping[str, Any]], **changes: Any) -> Recipe:
    fields = {
        "name": "tiny",
        "model": {"name": "bmctl:rescnn", "args": {"width": 4}},
        "data": {
            "source": {"kind": "bundled"},
            "train": {"limit": 64},
            "val": {"limit": 50},
            "calib": {"limit": 8},
        },
        "task": {"kind": "classify"},
        "train": {"epochs": 1, "batch_size": 16, "precision": "fp32"},
        "compress": list(steps),
    }
    return Recipe.model_validate_json(json.dumps(fields | changes))


@pytest.fixture
def events() -> list[Mapping[str, object]]:
    return []


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with one trained package."""
    run = tmp_path_factory.mktemp("trained")
    train_stage(make_context(run, recipe([]), []))
    return run


def make_context(run: Path, recipe: Recipe, events: list[Mapping[str, object]]) -> StageContext:
    group = join(LaunchConfig(device="cpu", threads=1))
    return StageContext(run=run, recipe=recipe, group=group, stop=Stop(), emit=events.append)


@pytest.fixture
def make(
    trained: Path, tmp_path: Path, events: list[Mapping[str, object]]
) -> Callable[..., tuple[StageContext, ModelPackage]]:
    """A context over a copy of the trained run, and its first package."""
    run = tmp_path / "run"
    shutil.copytree(trained, run)

    def build(*steps: Mapping[str, Any], **changes: Any) -> tuple[StageContext, ModelPackage]:
        context = make_context(run, recipe(steps, **changes), events)
        return context, package.open_package(package.list_packages(run)[0])

    return build


def kinds(events: Sequence[Mapping[str, object]], kind: str) -> list[Mapping[str, object]]:
    return [event for event in events if event["event"] == kind]


def test_a_whole_chain(make, events) -> None:
    context, start = make(STRUCTURED | {"recover": RECOVER}, MAGNITUDE | {"name": "sparse"}, PTQ)
    found = compress.run_steps(context, start=start)
    assert [one.path.name for one in found] == ["01-structured", "02-sparse", "03-ptq"]
    assert [one.manifest.parent for one in found] == [start.hash, found[0].hash, found[1].hash]
    assert {one.manifest.original for one in found} == {start.hash}
    assert [one.manifest.frozen for one in found] == [False, False, True]
    assert [len(one.manifest.history) for one in found] == [1, 2, 3]
    pruned, sparse, quantized = (one.manifest.metrics for one in found)
    first = start.manifest.metrics
    assert pruned["num_params"] < 0.5 * first["num_params"]
    assert pruned["macs"] < 0.5 * first["macs"]
    assert pruned["recover"]["teacher"] == start.hash
    assert pruned["recover"]["steps"] == 3
    assert set(pruned["val_before_recover"]) == set(pruned["val"])
    assert sparse["num_nonzero"] < sparse["num_params"] == pruned["num_params"]
    assert quantized["precision"] == "int8"
    assert quantized["macs"] == pruned["macs"]
    for one in found:
        metrics = one.manifest.metrics
        assert metrics["val"]["num_samples"] == 50
        assert metrics["val"]["low"] <= metrics["val"]["value"] <= metrics["val"]["high"]
        assert metrics["latency_ms"] == metrics["latency"]["p50_ms"] > 0
        (data,) = one.graphs.values() if one.manifest.frozen else [one.weights]
        assert metrics["size_bytes"] == data.stat().st_size
    assert found[2].manifest.calibration["used"] == 8
    assert [event["stage"] for event in kinds(events, "stage_done")] == ["01-structured", "02-sparse", "03-ptq"]
    filed = {scored.key.artifact for _, scored in read_all(context.run, tasks=TASKS)}
    assert {one.hash for one in found} <= filed
    assert not any((context.run / "work").iterdir())
    assert masks.masked_layers(load_model(found[1]))


def test_the_metric_is_the_packages(make) -> None:
    context, start = make(STRUCTURED)
    (found,) = compress.run_steps(context, start=start)
    assert found.given is not None
    again = appraise.score_module(context, load_model(found), found.manifest, found.given)
    assert appraise.metric_of(again) == found.manifest.metrics["val"]


def test_masks_hold_through_recovery(make) -> None:
    context, start = make(MAGNITUDE | {"recover": RECOVER})
    (found,) = compress.run_steps(context, start=start)
    layers = masks.masked_layers(load_model(found))
    before = load_model(start)
    for name, layer in layers.items():
        assert bool((layer.weight[~masks.get_mask(layer)] == 0).all())
        assert not torch.equal(
            layer.weight[masks.get_mask(layer)], before.get_submodule(name).weight[masks.get_mask(layer)]
        )
    total = sum(layer.weight.numel() for layer in layers.values())
    assert sum(int((~masks.get_mask(layer)).sum()) for layer in layers.values()) == round(total * 0.5)


def test_a_finished_step_is_not_run_again(make, events, monkeypatch) -> None:
    context, start = make(STRUCTURED, PTQ)
    first = compress.run_steps(context, start=start)
    events.clear()
    monkeypatch.setattr(compress, "run_step", lambda work: pytest.fail("run again"))
    again = compress.run_steps(context, start=start)
    assert [one.hash for one in again] == [one.hash for one in first]
    assert [event["stage"] for event in kinds(events, "skip")] == ["01-structured", "02-ptq"]


def test_a_longer_recipe_goes_on_where_it_ended(make, events) -> None:
    context, start = make(STRUCTURED)
    (first,) = compress.run_steps(context, start=start)
    context, start = make(STRUCTURED, MAGNITUDE)
    found = compress.run_steps(context, start=start)
    assert found[0].hash == first.hash
    assert found[1].manifest.parent == first.hash
    assert [event["stage"] for event in kinds(events, "stage_done")] == ["01-structured", "02-magnitude"]


@pytest.mark.parametrize(
    "change",
    [
        {"steps": [STRUCTURED | {"ratio": 0.25}]},
        {"steps": [MAGNITUDE]},
        {"steps": [STRUCTURED], "seed": 5},
        {"steps": [STRUCTURED], "task": {"kind": "classify", "label_smoothing": 0.1}},
    ],
)
def test_other_inputs_need_overwrite(change: dict, make) -> None:
    context, start = make(STRUCTURED, PTQ)
    first = compress.run_steps(context, start=start)
    changes = {key: value for key, value in change.items() if key != "steps"}
    context, start = make(*change["steps"], **changes)
    with pytest.raises(UsageError, match="is finished, and the step") as caught:
        compress.run_steps(context, start=start)
    assert "--overwrite" in caught.value.hint
    assert package.open_package(first[0].path).hash == first[0].hash
    found = compress.run_steps(replace(context, overwrite=True), start=start)
    assert [path.name for path in package.list_packages(context.run)] == ["00-train", found[0].path.name]


def test_the_same_step_twice_gives_the_same_weights(make) -> None:
    context, start = make(STRUCTURED | {"recover": RECOVER})
    (first,) = compress.run_steps(context, start=start)
    digest = first.manifest.files["weights.safetensors"].sha256
    (second,) = compress.run_steps(replace(context, overwrite=True), start=start)
    assert second.manifest.files["weights.safetensors"].sha256 == digest
    assert second.manifest.key == first.manifest.key


def test_a_corrupt_finished_step_is_told(make) -> None:
    context, start = make(STRUCTURED)
    (found,) = compress.run_steps(context, start=start)
    with found.weights.open("r+b") as file:
        file.seek(200)
        file.write(b"\xff\xff")
    with pytest.raises(PackageError, match=r"weights\.safetensors"):
        compress.run_steps(context, start=start)


def test_module_methods_need_weights(make) -> None:
    context, start = make(PTQ)
    (frozen,) = compress.run_steps(context, start=start)
    for step_config in (STRUCTURED, MAGNITUDE, {"method": "svd", "rank": 2}):
        context, _ = make(step_config)
        with pytest.raises(UnsupportedError, match="holds a graph, not weights") as caught:
            compress.run_steps(context, start=frozen)
        assert start.hash[:12] in caught.value.hint
        assert "its parent, package" in caught.value.hint


def test_a_module_step_after_a_graph_step_is_refused_before_anything_runs(make) -> None:
    context, start = make(PTQ, STRUCTURED)
    with pytest.raises(UnsupportedError, match="ptq before it leaves a graph"):
        compress.run_steps(context, start=start)
    assert package.list_packages(context.run) == [start.path]


def test_quantizing_twice_is_refused(make) -> None:
    context, start = make(PTQ, PTQ | {"name": "again"})
    with pytest.raises(UnsupportedError, match="already quantized"):
        compress.run_steps(context, start=start)
    context, start = make(PTQ)
    (frozen,) = compress.run_steps(context, start=start)
    with pytest.raises(UnsupportedError, match="already quantized"):
        compress.run_steps(context, start=frozen)


def test_a_package_of_another_run_becomes_the_first(make, tmp_path: Path) -> None:
    context, start = make(STRUCTURED)
    other = replace(context, run=tmp_path / "other")
    other.run.mkdir()
    (found,) = compress.run_steps(other, start=start)
    assert [path.name for path in package.list_packages(other.run)] == ["00-train", "01-structured"]
    assert package.open_package(other.run / "packages" / "00-train").hash == start.hash == found.manifest.parent
    compress.run_steps(other, start=start)
    pruned = package.open_package(found.path)
    with pytest.raises(UsageError, match="starts from another package"):
        compress.run_steps(context, start=pruned)


def test_it_stops_between_two_steps(make, monkeypatch) -> None:
    context, start = make(STRUCTURED, MAGNITUDE)
    run_step = step.run_step

    def stopped(work: step.Work) -> ModelPackage:
        done = run_step(work)
        context.stop.request(signal.SIGTERM)
        return done

    monkeypatch.setattr(compress, "run_step", stopped)
    with pytest.raises(PreemptedError):
        compress.run_steps(context, start=start)
    assert [path.name for path in package.list_packages(context.run)] == ["00-train", "01-structured"]
    context.stop.requested = signal.SIGINT
    with pytest.raises(InterruptedRunError) as caught:
        compress.run_steps(context, start=start)
    assert caught.value.exit_code == 130
    found = compress.run_steps(replace(context, stop=Stop()), start=start)
    assert [one.path.name for one in found] == ["01-structured", "02-magnitude"]


def test_a_stopped_recovery_resumes_to_the_same_weights(make, tmp_path: Path) -> None:
    context, start = make(STRUCTURED | {"recover": RECOVER})
    whole = replace(context, run=tmp_path / "whole")
    whole.run.mkdir()
    (expected,) = compress.run_steps(whole, start=start)

    def stop_after_the_first_step(event: Mapping[str, object]) -> None:
        if event["event"] == "start":
            context.stop.request(signal.SIGTERM)

    with pytest.raises(PreemptedError):
        compress.run_steps(replace(context, emit=stop_after_the_first_step), start=start)
    assert [path.name for path in package.list_packages(context.run)] == ["00-train"]
    with pytest.raises(UsageError, match="checkpoints"):
        compress.run_steps(replace(context, stop=Stop()), start=start)
    (found,) = compress.run_steps(replace(context, stop=Stop(), resume=True), start=start)
    digests = [one.manifest.files["weights.safetensors"].sha256 for one in (found, expected)]
    assert digests[0] == digests[1]


def test_without_data_the_rest_is_measured_and_said(make, tmp_path: Path, events) -> None:
    context, start = make(STRUCTURED, data=None, task=None, train=None)
    (found,) = compress.run_steps(context, start=start)
    metrics = found.manifest.metrics
    assert "val" not in metrics
    assert metrics["num_params"] < start.manifest.metrics["num_params"]
    assert metrics["macs"] > 0 < metrics["latency_ms"]
    assert any("no task and no data" in note for note in found.manifest.notes)
    assert any("no task and no data" in str(event["text"]) for event in kinds(events, "note"))


def test_recovery_without_data_is_refused(make) -> None:
    context, start = make(STRUCTURED | {"recover": RECOVER}, data=None, task=None, train=None)
    with pytest.raises(RecipeError, match="recovers by training"):
        compress.run_steps(context, start=start)


def test_recovery_without_a_teacher(make) -> None:
    context, start = make(STRUCTURED | {"recover": RECOVER | {"teacher": "none"}})
    (found,) = compress.run_steps(context, start=start)
    assert found.manifest.metrics["recover"]["teacher"] is None


def test_a_failed_step_leaves_the_run_as_it_was(make) -> None:
    context, start = make(STRUCTURED | {"ratio": 0.999})
    with pytest.raises(UnsupportedError, match="nothing would be left"):
        compress.run_steps(context, start=start)
    assert [path.name for path in package.list_packages(context.run)] == ["00-train"]
    assert package.open_package(start.path).hash == start.hash


def test_notes_of_a_method_reach_the_manifest(make) -> None:
    context, start = make(MAGNITUDE, {"method": "svd", "ratio": 0.5})
    found = compress.run_steps(context, start=start)
    assert any("mask is dropped" in note for note in found[1].manifest.notes)


def test_a_step_is_applied_to_what_its_parent_holds(make) -> None:
    """Not to a model whose weights are fresh: the teacher and the parent are loaded from their packages."""
    context, start = make({"method": "magnitude", "sparsity": 0.01})
    (found,) = compress.run_steps(context, start=start)
    fresh = models.build(start.manifest.model)
    mine, theirs = load_model(found).state_dict(), load_model(start).state_dict()
    assert torch.equal(mine["head.bias"], theirs["head.bias"])
    assert not torch.equal(mine["head.bias"], fresh.state_dict()["head.bias"])
