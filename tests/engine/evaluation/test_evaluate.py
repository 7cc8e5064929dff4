"""The metric is the same wherever it runs, test data is read once per artifact, and bad outputs are refused."""

from __future__ import annotations

import dataclasses
import json
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.engine.evaluation.digits import GIVEN, SPEC, make_context, recipe, saved
from tests.engine.exporting import export, signature
from torch import nn

from bmctl.backends import eager, onnxruntime
from bmctl.core import scores
from bmctl.core.evaluation import Evaluation
from bmctl.core.runner import Bounds, Runner
from bmctl.engine.context import StageContext
from bmctl.engine.evaluation.evaluate import evaluate_artifact, evaluate_parts, find_evaluation, keep_evaluation
from bmctl.engine.loading.arrays import array_batches
from bmctl.engine.loading.data import open_split
from bmctl.errors import DivergedError, GateError, InterruptedRunError, PackageError, UsageError
from bmctl.inputs import Resolved
from bmctl.models import build
from bmctl.recipe import Recipe
from bmctl.tasks import TASKS, classify

HASH = "ab" * 32


@pytest.fixture
def context(tmp_path: Path) -> StageContext:
    return make_context(tmp_path)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 10))


Function = Callable[[np.ndarray], np.ndarray]


class Counting:
    """A runner of a function of arrays that counts how often it is called."""

    signature = signature(1, 8, 8)
    bounds: Mapping[str, Bounds] = {}

    def __init__(self, function: Function) -> None:
        self.calls, self._function = 0, function

    def run(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.calls += 1
        return {"logits": self._function(feed["input"])}


def eagerly(model: nn.Module) -> Function:
    runner = eager.open_module(model, signature=Counting.signature)
    return lambda x: runner.run({"input": x})["logits"]


def evaluate(source: StageContext | Recipe, runner: Runner, **changes: Any) -> Evaluation:
    return evaluate_parts(
        source, {"model": runner}, **{"split": "test", "given": GIVEN, "facts": None, "artifact": HASH} | changes
    )


def hits(found: Evaluation) -> np.ndarray:
    return classify.means(found.counts)["accuracy"]


def test_it_is_the_share_of_right_answers(context: StageContext, model: nn.Module) -> None:
    split = open_split(context.data, name="test", given=GIVEN)
    x, y = next(array_batches(split, batch_size=len(split))).values()
    with torch.no_grad():
        right = (model.eval()(torch.from_numpy(x)).argmax(1) == torch.from_numpy(y)).numpy()
    found = evaluate(context, Counting(eagerly(model)))
    assert len(found.counts) == 90
    assert found.value == pytest.approx(right.mean())
    assert np.array_equal(hits(found), right)


def test_a_module_is_evaluated_as_in_inference(context: StageContext, model: nn.Module) -> None:
    """Batch statistics would make the result depend on the batch size."""
    logits = eagerly(model)
    model.train()
    x = np.random.default_rng(0).random((6, 1, 8, 8), dtype=np.float32)
    assert np.allclose(logits(x)[:2], logits(x[:2]), atol=1e-5)


def test_the_graph_scores_as_the_module_does(context: StageContext, model: nn.Module, tmp_path: Path) -> None:
    graph = tmp_path / "model.onnx"
    export(model.eval(), torch.zeros(2, 1, 8, 8), graph)
    eager = evaluate(context, Counting(eagerly(model)), artifact=None)
    with onnxruntime.open(graph, config=onnxruntime.Config()) as runner:
        built = evaluate(context, runner, artifact=None, backend="onnxruntime")
    assert np.array_equal(hits(eager), hits(built))
    assert built.values["loss"] == pytest.approx(eager.values["loss"], rel=1e-4)


def test_the_data_is_read_once_per_artifact(context: StageContext, model: nn.Module) -> None:
    runner = Counting(eagerly(model))
    first = evaluate(context, runner)
    assert runner.calls == 2
    second = evaluate(context, runner)
    assert runner.calls == 2
    assert np.array_equal(first.counts, second.counts)
    assert (first.values, first.baseline) == (second.values, second.baseline)
    assert (context.run / "evaluations" / f"{HASH[:12]}-test.json").is_file()


def test_without_an_artifact_nothing_is_kept(context: StageContext, model: nn.Module) -> None:
    evaluate(context, Counting(eagerly(model)), artifact=None)
    evaluate(context.recipe, Counting(eagerly(model)), split="val")
    assert not (context.run / "evaluations").exists()


@pytest.mark.parametrize(
    ("changed", "option"),
    [
        ("artifact", {"artifact": HASH[:12] + "0" * 52}),
        ("backend", {"backend": "openvino"}),
        ("input", {"given": Resolved(GIVEN.spec.model_copy(update={"mean": (0.4,)}))}),
    ],
)
def test_an_evaluation_of_something_else_is_not_taken(
    context: StageContext, model: nn.Module, changed: str, option: dict[str, Any]
) -> None:
    runner = Counting(eagerly(model))
    evaluate(context, runner)
    before = runner.calls
    evaluate(context, runner, **option)
    assert runner.calls > before
    assert any("evaluating again" in text and changed in text for text in context.emit.notes())


def test_other_limits_are_other_samples(context: StageContext, model: nn.Module) -> None:
    runner = Counting(eagerly(model))
    evaluate(context, runner)
    found = evaluate(dataclasses.replace(context, recipe=recipe(test={"limit": 50})), runner)
    assert len(found.counts) == 50


@pytest.mark.parametrize("damage", ["truncated", "flipped", "foreign", "missing counts", "empty"])
def test_a_damaged_file_is_made_again_and_that_is_said(context: StageContext, model: nn.Module, damage: str) -> None:
    runner = Counting(eagerly(model))
    evaluate(context, runner)
    path = context.run / "evaluations" / f"{HASH[:12]}-test.json"
    text = path.read_text()
    content = json.loads(text)
    if damage == "flipped":
        content["counts"][1] = content["counts"][0]
    elif damage == "missing counts":
        del content["counts"][2]
    whole = json.dumps(content)
    path.write_text({"truncated": whole[:-20], "foreign": '{"a": 1}', "empty": ""}.get(damage, whole))
    before = runner.calls
    again = evaluate(context, runner)
    assert runner.calls > before
    assert any("not readable" in note for note in context.emit.notes())
    assert path.read_text() == text
    assert len(again.counts) == 90


def test_what_was_evaluated_earlier_can_be_filed(context: StageContext, model: nn.Module) -> None:
    where = {"artifact": HASH, "backend": "eager", "split": "val", "given": GIVEN}
    assert find_evaluation(context, **where) is None
    found = evaluate(context, Counting(eagerly(model)), artifact=None, split="val")
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
        evaluate(context, Counting(broken))
    with pytest.raises(GateError, match="not finite on onnxruntime"):
        evaluate(context, Counting(broken), backend="onnxruntime")
    assert not list(context.run.glob("evaluations/*.json"))


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_and_nothing_is_kept(
    context: StageContext, model: nn.Module, signum: signal.Signals, code: int
) -> None:
    logits = eagerly(model)

    def stopping(x: np.ndarray) -> np.ndarray:
        context.stop.request(signum)
        return logits(x)

    with pytest.raises(InterruptedRunError) as caught:
        evaluate(context, Counting(stopping))
    assert caught.value.exit_code == code
    assert not list(context.run.glob("evaluations/*.json"))


def test_progress_is_told(context: StageContext, model: nn.Module) -> None:
    evaluate(context, Counting(eagerly(model)))
    done = [(e["done"], e["total"]) for e in context.emit if e["event"] == "progress"]
    assert done == [(64, 90), (90, 90)]


def test_without_data_there_is_no_metric(model: nn.Module) -> None:
    with pytest.raises(UsageError, match="has no data"):
        evaluate(Recipe(name="bare"), Counting(eagerly(model)), split="val")


# -- what lies on disk ------------------------------------------------------------------------------


def test_a_package_is_evaluated_and_then_read(context: StageContext, monkeypatch: pytest.MonkeyPatch) -> None:
    package = saved(context.run)
    first = evaluate_artifact(context, package.path, split="val")
    monkeypatch.setattr("bmctl.engine.evaluation.evaluate.open_parts", None)  # would be called to evaluate again
    second = evaluate_artifact(context, context.run, split="val")
    assert np.array_equal(first.counts, second.counts)
    assert scores.path_of(context.run, artifact=package.hash, split="val").is_file()


def test_a_frozen_package_is_evaluated_as_its_graph(context: StageContext, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = build(SPEC).eval()
    graph = tmp_path / "foreign.onnx"
    export(model, torch.zeros(2, 1, 8, 8), graph)
    frozen = saved(context.run, graph=graph)
    found = evaluate_artifact(context, frozen.path, split="val")
    again = evaluate(context, Counting(eagerly(model)), split="val", artifact=None)
    assert np.array_equal(hits(found), hits(again))
    kept = scores.read(scores.path_of(context.run, artifact=frozen.hash, split="val"), tasks=TASKS)
    assert kept.key.backend == "onnxruntime"


def test_a_package_that_records_no_input_has_no_metric(context: StageContext) -> None:
    package = saved(context.run, given=None)
    with pytest.raises(UsageError, match="does not record how samples become its input"):
        evaluate_artifact(context, package.path, split="val")


def test_what_is_not_there_is_said(context: StageContext) -> None:
    with pytest.raises(PackageError, match="nowhere"):
        evaluate_artifact(context, context.run / "nowhere", split="val")
