"""Recorded calls: what graphs are fed on real samples of a recipe's data, or on noise where there are none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bmctl.core.noise import complete_axes, noise
from bmctl.core.runner import Batched, Runner
from bmctl.engine.artifacts.opening import task_of
from bmctl.engine.artifacts.recording import Call, Recorder, of_part
from bmctl.engine.artifacts.samples import NUM_SAMPLES, foreign_feeds, of_batch
from bmctl.engine.context import StageContext
from bmctl.engine.loading.arrays import array_batches
from bmctl.engine.loading.data import data_fingerprint, open_split
from bmctl.errors import RecipeError
from bmctl.inputs import INPUTS
from bmctl.package import Manifest, ModelPackage
from bmctl.schema import BATCH, Signature, Span

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

    Noise comes at the most common sizes and at the smallest, of as many samples as cost little.

    Args:
        runners: Of the package's parts, or of an artifact made of them; they compute what the calls give.
    """
    batch = _batch(context, package, split="val", size=num_samples)
    return _recorded(context, package, runners, batch, num_noise=None, whole=True)


def timing_calls(
    context: StageContext, package: ModelPackage, runners: Mapping[str, Runner], *, num_samples: int
) -> list[Call]:
    """The same for timings: so many samples also of noise, and of the most common sizes alone.

    Of samples only what the model takes: a task that could go on from there, such as to the end of an episode, is timed
    for one decision.
    """
    batch = _batch(context, package, split="val", size=num_samples, alone=True)
    calls = _recorded(context, package, runners, batch, num_noise=num_samples, whole=True)
    return calls if batch is not None else [next(of_part(calls, part)) for part in runners]


def example_calls(context: StageContext, package: ModelPackage, runners: Mapping[str, Runner]) -> list[Call]:
    """The calls for two calibration samples, of what the model takes alone; of noise where there are none."""
    batch = _batch(context, package, split="calib", size=EXAMPLES, alone=True)
    return _recorded(context, package, runners, batch, num_noise=EXAMPLES, whole=False)


def example_fields(context: StageContext, package: ModelPackage) -> dict[str, torch.Tensor]:
    """Two calibration samples as the model takes them, in its order; noise where there are none."""
    model = package.manifest.model
    assert model is not None
    batch = _batch(context, package, split="calib", size=EXAMPLES)
    if batch is not None:
        return {spec.name: torch.from_numpy(batch[spec.name]) for spec in model.given}
    taken = Signature(inputs=model.given, outputs=())
    found = noise(taken, sizes=_sizes(axes_of(context, package.manifest, taken), num_samples=EXAMPLES))
    return {name: torch.from_numpy(array) for name, array in found.items()}


def axes_of(context: StageContext, manifest: Manifest, signature: Signature) -> dict[str, Span]:
    """Sizes of a graph's free axes: the recipe's, else the input's or those found at the import, else usual ones.

    Raises:
        RecipeError: The recipe asks for more than the input ever gives.
    """
    of_input = INPUTS[manifest.input.kind].axes(manifest.input) if manifest.input is not None else {}
    of_input = {**of_input, **_axes_of_task(manifest)}
    asked = context.recipe.export.axes
    for axis, most in of_input.items():
        if axis in asked and asked[axis].max > most.max:
            raise RecipeError(
                f"export.axes.{axis}.max: {asked[axis].max}, but the model takes at most {most.max}",
                hint=f"--set export.axes.{axis}.max={most.max}",
            )
    usual = {axis: Span() for axis in signature.axes if "+" not in axis}
    return complete_axes(signature, usual | manifest.axes | dict(of_input) | asked)


def _axes_of_task(manifest: Manifest) -> dict[str, Span]:
    """Sizes of the axes that the task brings along, such as the length of a cache."""
    task = task_of(manifest.task)
    if task is None or not hasattr(task, "axes"):
        return {}
    found: dict[str, Span] = task.axes(task.Facts.model_validate(manifest.facts))
    return found


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
        context.stop.check("calibration")
        calls = _recorded(context, package, runners, batch, num_noise=None, whole=False)
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
    num_noise: int | None,
    whole: bool,
) -> list[Call]:
    """Calls in order.

    Args:
        batch: What is predicted; None takes noise.
        num_noise: Samples of noise at the most common sizes; None takes as many as cost little.
        whole: Whether a call has all samples, or as many as its graph takes at once.
    """
    context.stop.check("the recording of samples")
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
            for feed in _noise(context, package, runner, part=part, num_samples=num_noise):
                listening[part].run(feed)
        return calls
    config = task.Config.model_validate(package.manifest.task)
    facts = task.Facts.model_validate(package.manifest.facts)
    if hasattr(task, "rehearse"):
        task.rehearse(listening, batch, config=config, facts=facts)
    else:
        all(True for _ in task.predict(listening, batch, config=config, facts=facts))
    return calls


def _batch(
    context: StageContext, package: ModelPackage, *, split: str, size: int, alone: bool = False
) -> Fields | None:
    """The first samples of a split, over again where there are fewer; None without data.

    Args:
        alone: What the model takes, without the task's targets.
    """
    given = package.given
    if given is None or not has_samples(context, package):
        return None
    samples = open_split(context.data, name=split, given=given)
    batch = next(iter(array_batches(samples, batch_size=size)))
    names = [spec.name for spec in samples.specs] if alone else list(batch)
    return {name: np.take(batch[name], np.arange(size) % len(batch[name]), axis=0) for name in names}


def _noise(
    context: StageContext, package: ModelPackage, runner: Runner, *, part: str, num_samples: int | None
) -> Iterator[Fields]:
    """What a graph of which no data are known is fed: of its most common sizes first."""
    signature, sample = runner.signature, context.recipe.export.sample
    axes = axes_of(context, package.manifest, signature)
    if not package.manifest.frozen:
        yield noise(signature, sizes=_sizes(axes, num_samples=num_samples or NUM_SAMPLES))
        return
    graph = package.graphs[part]
    path = Path(sample) if sample is not None else None
    usual, *others = foreign_feeds(graph, Batched(runner), signature=signature, axes=axes, sample=path)
    yield usual if num_samples is None else of_batch(usual, signature=signature, size=num_samples)
    yield from others


def _sizes(axes: Mapping[str, Span], *, num_samples: int) -> dict[str, int]:
    return {axis: num_samples if axis == BATCH else span.opt for axis, span in axes.items()}
