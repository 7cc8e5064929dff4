"""The metric is the same wherever it runs, test data is read once per artifact, and bad outputs are refused."""

from __future__ import annotations

import dataclasses
import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.specs import image_spec
from torch import nn

from bmctl.backends import onnxruntime
from bmctl.core import scores
from bmctl.core.evaluation import Evaluation
from bmctl.engine.artifacts.graph import export_onnx
from bmctl.engine.context import StageContext
from bmctl.engine.evaluation.evaluate import (
    eager_part,
    evaluate_artifact,
    evaluate_part,
    find_evaluation,
    keep_evaluation,
    runner_part,
)
from bmctl.engine.loading.arrays import array_batches
from bmctl.engine.loading.data import open_split
from bmctl.engine.parallel import Group
from bmctl.errors import DivergedError, GateError, InterruptedRunError, PackageError, UsageError
from bmctl.inputs import Resolved
from bmctl.inputs.image import Spec
from bmctl.models import build
from bmctl.package import Manifest, ModelPackage, save_package
from bmctl.processes.signals import Stop
from bmctl.recipe import Recipe
from bmctl.schema import TensorSpec
from bmctl.tasks import TASKS, classify

PREPROCESS = Spec(size=(8, 8), channels=1, mean=(0.5,), std=(0.5,))
HASH = "ab" * 32
SPEC = image_spec("bmctl:mlp", size=(8, 8))


def recipe(**data: Any) -> Recipe:
    splits = {"val": {"limit": 70}, "test": {"limit": 90}} | data
    return Recipe.model_validate({"name": "digits", "data": {"source": {"kind": "digits"}, **splits}})


@pytest.fixture
def context(tmp_path: Path) -> StageContext:
    group = Group(rank=0, local_rank=0, world=1, device=torch.device("cpu"), threads=1)
    return StageContext(run=tmp_path, recipe=recipe(), group=group, stop=Stop(), emit=Events())


class Events(list[dict[str, Any]]):
    """Called with every event, and keeps them."""

    def __call__(self, event: Any) -> None:
        self.append(dict(event))

    def notes(self) -> list[str]:
        return [event["text"] for event in self if event["event"] == "note"]


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 10))


class Counting:
    """A part that counts how often it is run."""

    def __init__(self, part: Any) -> None:
        self.part, self.calls = part, 0

    def __call__(self, x: np.ndarray) -> np.ndarray:
        self.calls += 1
        result: np.ndarray = self.part(x)
        return result


def evaluate(context: StageContext, part: Any, **changes: Any) -> Evaluation:
    return evaluate_part(context, part, **{"split": "test", "preprocess": PREPROCESS, "artifact": HASH} | changes)


def hits(found: Evaluation) -> np.ndarray:
    return classify.means(found.counts)["accuracy"]


def test_it_is_the_share_of_right_answers(context: StageContext, model: nn.Module) -> None:
    split = open_split(context.data, name="test", given=Resolved(PREPROCESS))
    x, y = next(array_batches(split, batch_size=len(split))).values()
    with torch.no_grad():
        right = (model.eval()(torch.from_numpy(x)).argmax(1) == torch.from_numpy(y)).numpy()
    found = evaluate(context, eager_part(model))
    assert len(found.counts) == 90
    assert found.value == pytest.approx(right.mean())
    assert np.array_equal(hits(found), right)


def test_a_module_is_evaluated_as_in_inference(context: StageContext, model: nn.Module) -> None:
    """Batch statistics would make the result depend on the batch size."""
    part = eager_part(model)
    model.train()
    x = np.random.default_rng(0).random((6, 1, 8, 8), dtype=np.float32)
    assert np.allclose(part(x)[:2], part(x[:2]), atol=1e-5)


def test_the_graph_scores_as_the_module_does(context: StageContext, model: nn.Module, tmp_path: Path) -> None:
    graph = tmp_path / "model.onnx"
    export_onnx(model.eval(), example=torch.zeros(2, 1, 8, 8), out=graph)
    eager = evaluate(context, eager_part(model), artifact=None)
    with onnxruntime.open(graph, config=onnxruntime.Config()) as runner:
        built = evaluate(context, runner_part(runner), artifact=None, backend="onnxruntime")
    assert np.array_equal(hits(eager), hits(built))
    assert built.values["loss"] == pytest.approx(eager.values["loss"], rel=1e-4)


def test_a_short_batch_is_filled_up_and_cut_off() -> None:
    class Runner:
        inputs = (TensorSpec(name="input", shape=(None, 2), dtype="float32"),)
        outputs = (TensorSpec(name="logits", shape=(None, 2), dtype="float32"),)

        def run(self, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            assert len(feed["input"]) >= 4
            return {"logits": feed["input"] * 2}

    x = np.arange(6, dtype=np.float32).reshape(3, 2)
    assert np.array_equal(runner_part(Runner(), min_batch=4)(x), x * 2)


def test_the_data_is_read_once_per_artifact(context: StageContext, model: nn.Module) -> None:
    part = Counting(eager_part(model))
    first = evaluate(context, part, batch_size=32)
    assert part.calls == 3
    second = evaluate(context, part, batch_size=32)
    assert part.calls == 3
    assert np.array_equal(first.counts, second.counts)
    assert (first.values, first.baseline) == (second.values, second.baseline)
    assert (context.run / "evaluations" / f"{HASH[:12]}-test.json").is_file()


def test_without_an_artifact_nothing_is_kept(context: StageContext, model: nn.Module) -> None:
    evaluate(context, eager_part(model), artifact=None)
    evaluate_part(context.recipe, eager_part(model), split="val", preprocess=PREPROCESS, artifact=HASH)
    assert not (context.run / "evaluations").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"artifact": HASH[:12] + "0" * 52},
        {"backend": "openvino"},
        {"preprocess": PREPROCESS.model_copy(update={"mean": (0.4,)})},
    ],
    ids=["artifact", "backend", "preprocess"],
)
def test_an_evaluation_of_something_else_is_not_taken(
    context: StageContext, model: nn.Module, change: dict[str, Any]
) -> None:
    part = Counting(eager_part(model))
    evaluate(context, part)
    before = part.calls
    evaluate(context, part, **change)
    assert part.calls > before
    assert any("evaluating again" in text and next(iter(change)) in text for text in context.emit.notes())


def test_other_limits_are_other_samples(context: StageContext, model: nn.Module) -> None:
    part = Counting(eager_part(model))
    evaluate(context, part)
    found = evaluate(dataclasses.replace(context, recipe=recipe(test={"limit": 50})), part)
    assert len(found.counts) == 50


@pytest.mark.parametrize("damage", ["truncated", "flipped", "foreign", "missing counts", "empty"])
def test_a_damaged_file_is_made_again_and_that_is_said(context: StageContext, model: nn.Module, damage: str) -> None:
    part = Counting(eager_part(model))
    evaluate(context, part)
    path = context.run / "evaluations" / f"{HASH[:12]}-test.json"
    text = path.read_text()
    content = json.loads(text)
    if damage == "flipped":
        content["counts"][1] = content["counts"][0]
    elif damage == "missing counts":
        del content["counts"][2]
    whole = json.dumps(content)
    path.write_text({"truncated": whole[:-20], "foreign": '{"a": 1}', "empty": ""}.get(damage, whole))
    before = part.calls
    again = evaluate(context, part)
    assert part.calls > before
    assert any("not readable" in note for note in context.emit.notes())
    assert path.read_text() == text
    assert len(again.counts) == 90


def test_what_was_evaluated_earlier_can_be_filed(context: StageContext, model: nn.Module) -> None:
    where = {"artifact": HASH, "backend": "eager", "split": "val", "preprocess": PREPROCESS}
    assert find_evaluation(context, **where) is None
    found = evaluate(context, eager_part(model), artifact=None, split="val")
    keep_evaluation(context, found, **where)
    known = find_evaluation(context, **where)
    assert known is not None
    assert np.array_equal(known.counts, found.counts)


def broken(x: np.ndarray) -> np.ndarray:
    outputs = np.zeros((len(x), 10), dtype=np.float32)
    outputs[-1, 3] = np.inf
    return outputs


def test_outputs_that_are_not_finite_are_refused(context: StageContext) -> None:
    with pytest.raises(DivergedError, match="1 of 640 outputs"):
        evaluate(context, broken)
    with pytest.raises(GateError, match="not finite on onnxruntime"):
        evaluate(context, broken, backend="onnxruntime")
    assert not list(context.run.glob("evaluations/*.json"))


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_and_nothing_is_kept(
    context: StageContext, model: nn.Module, signum: signal.Signals, code: int
) -> None:
    part = eager_part(model)

    def stopping(x: np.ndarray) -> np.ndarray:
        context.stop.request(signum)
        return part(x)

    with pytest.raises(InterruptedRunError) as caught:
        evaluate(context, stopping, batch_size=16)
    assert caught.value.exit_code == code
    assert not list(context.run.glob("evaluations/*.json"))


def test_progress_is_told(context: StageContext, model: nn.Module) -> None:
    evaluate(context, eager_part(model), batch_size=45)
    done = [(e["done"], e["total"]) for e in context.emit if e["event"] == "progress"]
    assert done == [(45, 90), (90, 90)]


def test_without_data_there_is_no_metric(model: nn.Module) -> None:
    with pytest.raises(UsageError, match="has no data"):
        evaluate_part(Recipe(name="bare"), eager_part(model), split="val", preprocess=PREPROCESS)


# -- what lies on disk ------------------------------------------------------------------------------


def saved(run: Path, *, graph: Path | None = None, preprocess: Spec | None = PREPROCESS) -> ModelPackage:
    torch.manual_seed(1)
    return save_package(
        run / "packages" / ("00-import" if graph else "00-train"),
        manifest=Manifest(stage="train", key="k", model=SPEC, preprocess=preprocess),
        recipe_yaml="name: digits\n",
        model=None if graph else build(SPEC),
        graph=graph,
    )


def test_a_package_is_evaluated_and_then_read(context: StageContext, monkeypatch: pytest.MonkeyPatch) -> None:
    package = saved(context.run)
    first = evaluate_artifact(context, package.path, split="val")
    monkeypatch.setattr("bmctl.engine.evaluation.evaluate.load_model", None)  # would be called to evaluate again
    second = evaluate_artifact(context, context.run, split="val")
    assert np.array_equal(first.counts, second.counts)
    assert scores.path_of(context.run, artifact=package.hash, split="val").is_file()


def test_a_frozen_package_is_evaluated_as_its_graph(context: StageContext, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = build(SPEC).eval()
    graph = tmp_path / "foreign.onnx"
    export_onnx(model, example=torch.zeros(2, 1, 8, 8), out=graph)
    frozen = saved(context.run, graph=graph)
    found = evaluate_artifact(context, frozen.path, split="val")
    again = evaluate(context, eager_part(model), split="val", artifact=None)
    assert np.array_equal(hits(found), hits(again))
    kept = scores.read(scores.path_of(context.run, artifact=frozen.hash, split="val"), tasks=TASKS)
    assert kept.key.backend == "onnxruntime"


def test_a_package_without_preprocessing_has_no_metric(context: StageContext) -> None:
    package = saved(context.run, preprocess=None)
    with pytest.raises(UsageError, match="does not record how images become its input"):
        evaluate_artifact(context, package.path, split="val")


def test_what_is_not_there_is_said(context: StageContext) -> None:
    with pytest.raises(PackageError, match="nowhere"):
        evaluate_artifact(context, context.run / "nowhere", split="val")
