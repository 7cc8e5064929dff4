"""Recorded calls: what a task's graphs are fed on real samples, whatever it calls and how often; noise without data."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tests.engine.evaluation.digits import GIVEN, make_context, recipe, saved

from bmctl.core.runner import Bounds, Runner
from bmctl.engine.artifacts.opening import open_parts
from bmctl.engine.context import StageContext
from bmctl.engine.evaluation import feeds
from bmctl.engine.loading.data import open_split
from bmctl.errors import InterruptedRunError
from bmctl.package import PART, ModelPackage
from bmctl.recipe import Recipe
from bmctl.schema import Signature, TensorSpec
from bmctl.tasks import classify


@pytest.fixture
def context(tmp_path) -> StageContext:
    return make_context(tmp_path, recipe(calib={"limit": 100}))


@pytest.fixture
def package(context: StageContext) -> ModelPackage:
    return saved(context.run)


@pytest.fixture
def runners(package: ModelPackage) -> Iterator[Mapping[str, Runner]]:
    with ExitStack() as stack:
        yield open_parts(package, stack)


def samples(context: StageContext, split: str, num: int) -> np.ndarray:
    opened = open_split(context.data, name=split, given=GIVEN)
    return opened.arrays([i % len(opened) for i in range(num)]).fields["input"]


@pytest.mark.parametrize("num", [8, 100])
def test_parity_is_looked_at_on_real_samples_in_one_call(context, package, runners, num: int) -> None:
    """There are 70: the rest are the first ones again."""
    (call,) = feeds.validation_calls(context, package, runners, num_samples=num)
    assert (call.part, call.signature) == (PART, package.manifest.parts[PART])
    np.testing.assert_array_equal(call.feed["input"], samples(context, "val", num))
    np.testing.assert_array_equal(call.outputs["logits"], runners[PART].run(call.feed)["logits"])


def test_examples_are_two_samples(context, package, runners) -> None:
    (call,) = feeds.example_calls(context, package, runners)
    fields = feeds.example_fields(context, package)
    assert list(fields) == ["input"]
    for found in (call.feed["input"], fields["input"].numpy()):
        np.testing.assert_array_equal(found, samples(context, "calib", 2))


def test_calibration_sees_every_sample_once(context, package, runners) -> None:
    calls = feeds.calibration_calls(context, package, runners, part=PART)
    found = np.concatenate([call.feed["input"] for call in calls])
    np.testing.assert_array_equal(found, samples(context, "calib", 100))
    assert feeds.calibration_record(context, package)["num_samples"] == 100


def test_a_signal_ends_calibration(context, package, runners) -> None:
    calls = feeds.calibration_calls(context, package, runners, part=PART)
    next(calls)
    context.stop.request(signal.SIGTERM)
    with pytest.raises(InterruptedRunError):
        list(calls)


@pytest.mark.parametrize("num", [8, 3])
def test_without_data_it_is_noise(tmp_path, package, runners, num: int) -> None:
    bare = make_context(tmp_path, Recipe(name="bare"))
    assert not feeds.has_samples(bare, package)
    (call,) = feeds.timing_calls(bare, package, runners, num_samples=num)
    assert call.feed["input"].shape == (num, 1, 8, 8)
    assert call.feed["input"].std() > 0.5
    assert feeds.example_fields(bare, package)["input"].shape == (2, 1, 8, 8)


# -- a task of several graphs -------------------------------------------------------------------------


class Doubling:
    """A graph of four samples at once."""

    def __init__(self, name: str) -> None:
        x, y = (TensorSpec(name=f"{name}.{each}", dtype="float32", shape=("batch", 1, 8, 8)) for each in "xy")
        self.signature = Signature(inputs=(x,), outputs=(y,))
        self.bounds: Mapping[str, Bounds] = {"batch": (1, 4)}

    def run(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        (x,), (y,) = feed.values(), self.signature.outputs
        return {y.name: 2 * x}


def predict(runners: Mapping[str, Runner], batch: Mapping[str, np.ndarray], **_: Any) -> Iterator[dict[str, Any]]:
    """Encodes once, and decodes twice, each time what came before."""
    y = runners["encoder"].run({"encoder.x": batch["input"]})["encoder.y"]
    for _ in range(2):
        y = runners["decoder"].run({"decoder.x": y})["decoder.y"]
    yield from ({} for _ in y)


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> Mapping[str, Runner]:
    task = SimpleNamespace(Config=classify.Config, Facts=classify.Facts, predict=predict)
    monkeypatch.setattr(feeds, "task_of", lambda config: task)
    return {name: Doubling(name) for name in ("encoder", "decoder")}


def test_every_graph_is_fed_what_the_task_feeds_it(context, package, two) -> None:
    calls = feeds.validation_calls(context, package, two, num_samples=6)
    x = samples(context, "val", 6)
    assert [call.part for call in calls] == ["encoder", "decoder", "decoder"]
    for call, factor in zip(calls, (1, 2, 4), strict=True):
        np.testing.assert_array_equal(call.feed[f"{call.part}.x"], factor * x)
        np.testing.assert_array_equal(call.outputs[f"{call.part}.y"], 2 * factor * x)


def test_calibration_is_in_calls_that_a_graph_takes_and_of_one_graph(context, package, two) -> None:
    calls = list(feeds.calibration_calls(context, package, two, part="decoder"))
    assert {call.part for call in calls} == {"decoder"}
    assert {len(call.feed["decoder.x"]) for call in calls} == {4}
    assert len(calls) == 2 * 100 / 4
