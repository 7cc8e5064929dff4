"""Recorded calls: what graphs are fed on real samples of a recipe's data, or on noise where there are none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch

from bmctl.core.noise import noise
from bmctl.core.runner import Batched, Runner, batch_axes
from bmctl.engine.artifacts.opening import task_of
from bmctl.engine.artifacts.recording import Call, Recorder
from bmctl.engine.context import StageContext
from bmctl.engine.loading.arrays import array_batches
from bmctl.engine.loading.data import data_fingerprint, open_split
from bmctl.inputs import Resolved, specs
from bmctl.package import ModelPackage
from bmctl.processes.signals import interrupted
from bmctl.schema import BATCH

Fields = dict[str, np.ndarray]

CALIBRATION_BATCH = 64
EXAMPLES = 2


def has_samples(context: StageContext, package: ModelPackage) -> bool:
    """Whether the package's graphs can be fed with real samples: data, a task, and the way between."""
    return context.recipe.data is not None and package.given is not None and package.manifest.task is not None


def validation_calls(
    context: StageContext, package: ModelPackage, runners: Mapping[str, Runner], *, num_samples: int
) -> list[Call]:
    """The calls that the task makes to predict so many validation samples at once; of noise where there are none.

    Args:
        runners: Of the package's parts, or of an artifact made of them; they compute what the calls give.
    """
    given = package.given
    batch = _batch(context, given, split="val", size=num_samples) if has_samples(context, package) and given else None
    return _recorded(context, package, runners, batch, num_samples=num_samples, whole=True)


def example_calls(context: StageContext, package: ModelPackage, runners: Mapping[str, Runner]) -> list[Call]:
    """The calls for two calibration samples, as the graphs are really fed; of noise where there are none."""
    given = package.given
    batch = _batch(context, given, split="calib", size=EXAMPLES) if has_samples(context, package) and given else None
    return _recorded(context, package, runners, batch, num_samples=EXAMPLES, whole=False)


def example_fields(context: StageContext, package: ModelPackage) -> dict[str, torch.Tensor]:
    """Two calibration samples as the model takes them, in its order; noise where there are none."""
    model = package.manifest.model
    assert model is not None
    given = package.given
    if has_samples(context, package) and given is not None:
        batch = _batch(context, given, split="calib", size=EXAMPLES)
        return {spec.name: torch.from_numpy(batch[spec.name]) for spec in specs(given)}
    sizes = {axis: EXAMPLES if axis == BATCH else _common(context, axis) for axis in _axes(model.given)}
    found = noise(model.given, sizes)
    return {name: torch.from_numpy(array) for name, array in found.items()}


def calibration_calls(
    context: StageContext, package: ModelPackage, runners: Mapping[str, Runner], *, part: str
) -> Iterator[Call]:
    """The calls of one graph over all calibration samples, batch by batch.

    Raises:
        InterruptedRunError: A signal came.
    """
    given = package.given
    assert given is not None
    for batch in array_batches(open_split(context.data, name="calib", given=given), batch_size=CALIBRATION_BATCH):
        if context.stop.requested is not None:
            raise interrupted(context.stop.requested, "stopped during calibration; run the same command again")
        calls = _recorded(context, package, runners, batch, num_samples=CALIBRATION_BATCH, whole=False)
        yield from (call for call in calls if call.part == part)


def calibration_record(context: StageContext, package: ModelPackage) -> dict[str, Any]:
    """What the calibration data is, as the manifest records it."""
    recipe, given = context.recipe, package.given
    assert recipe.data is not None and given is not None
    return {
        "source": recipe.data.model_dump(mode="json", include={"source"})["source"],
        "split": recipe.data.calib.split,
        "num_samples": len(open_split(context.data, name="calib", given=given)),
        "fingerprint": data_fingerprint(context.data),
    }


# -- details ----------------------------------------------------------------------------------------


def _recorded(
    context: StageContext,
    package: ModelPackage,
    runners: Mapping[str, Runner],
    batch: Fields | None,
    *,
    num_samples: int,
    whole: bool,
) -> list[Call]:
    """Calls in order.

    Args:
        batch: What is predicted; None takes noise.
        whole: Whether a call has all samples, or as many as its graph takes at once.
    """
    calls: list[Call] = []
    listening: dict[str, Runner] = {}
    for part, runner in runners.items():
        listening[part] = (
            Recorder(Batched(runner), part=part, calls=calls)
            if whole
            else Batched(Recorder(runner, part=part, calls=calls))
        )
    task = task_of(package.manifest.task)
    if batch is None or task is None:
        for part, runner in runners.items():
            listening[part].run(noise(runner.signature.inputs, _sizes(context, runner, num_samples=num_samples)))
        return calls
    config = task.Config.model_validate(package.manifest.task)
    facts = task.Facts.model_validate(package.manifest.facts)
    all(True for _ in task.predict(listening, batch, config=config, facts=facts))
    return calls


def _batch(context: StageContext, given: Resolved, *, split: str, size: int) -> Fields:
    """The first samples of a split as the model takes them, over again where there are fewer."""
    found = open_split(context.data, name=split, given=given)
    batch = next(islice(array_batches(found, batch_size=size), 1))
    return {name: np.take(array, np.arange(size) % len(array), axis=0) for name, array in batch.items()}


def _sizes(context: StageContext, runner: Runner, *, num_samples: int) -> dict[str, int]:
    """A size for every free axis: as many samples as the runner takes, and what the recipe says is most common."""
    _, (low, high) = batch_axes(runner)
    sizes = {axis: _common(context, axis) for axis in runner.signature.axes}
    if BATCH in sizes:
        sizes[BATCH] = max(low, num_samples if high is None else min(num_samples, high))
    return sizes


def _common(context: StageContext, axis: str) -> int:
    spans = context.recipe.export.axes
    return spans[axis].opt if axis in spans else 8


def _axes(specs_: Any) -> tuple[str, ...]:
    return tuple(dict.fromkeys(axis for spec in specs_ for axis in spec.shape if isinstance(axis, str)))
