"""Predictions: a model as it was found, an input as it was given, one line per sample."""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bmctl import store
from bmctl.core.requests import OnBad, Requests
from bmctl.core.runner import batch_axes
from bmctl.engine.artifacts.opening import task_of
from bmctl.engine.deployment.choose import Chosen, open_source
from bmctl.engine.deployment.requests import open_requests
from bmctl.errors import PackageError, UnsupportedError
from bmctl.inputs import INPUTS, specs
from bmctl.package import PART
from bmctl.processes.signals import Stop
from bmctl.schema import Emit, TensorSpec
from bmctl.tasks import TASKS, writes

STAGE = "infer"
EVENT_PERIOD_S = 0.5
Prediction = Mapping[str, Any]
"""JSON: ``input``, which sample it is of, such as a path or ``file.npz#3``; the rest is the task's."""


def _silent(event: Mapping[str, object]) -> None:
    pass


class Predictions:
    """What a model says of one sample after the other; to be read once.

    Attributes:
        columns: Of a table of them.
    """

    def __init__(self, found: Iterator[Prediction], task: Any) -> None:
        self._found, self._task = found, task
        self.columns: tuple[str, ...] = ("input", *task.COLUMNS)

    def __iter__(self) -> Iterator[Prediction]:
        return self._found

    def words(self, one: Prediction) -> str:
        """A prediction in a few words."""
        text: str = self._task.words(one)
        return text


def predict(
    artifact: Path,
    inputs: str | Path,
    *,
    backend: str = "auto",
    batch_size: int = 64,
    on_bad: OnBad = "refuse",
    film: Path | None = None,
    task: Any = None,
    emit: Emit = _silent,
    stop: Stop | None = None,
) -> Predictions:
    """Let the task predict every sample of `inputs`; samples are prepared as in training, by the manifest.

    The model and the list of inputs are opened before this returns; files are read as predictions are.

    Args:
        artifact: A run, a package, a deploy directory, an .onnx or an engine.
        inputs: What the input is pointed at, such as a folder of images; or an .npz of arrays.
        backend: `auto`, a backend's name, or `eager`.
        batch_size: Samples per call, within what the artifact takes.
        on_bad: What bad files among many do.
        film: Takes an animated GIF of the first sample, of a task that can draw one.
        task: Its Config in place of the model's own, where they are of one kind: how to predict, not what.
        emit: Notes (which artifact, and why) and progress.
        stop: Looked at before every batch.

    Raises:
        PackageError: The model is missing, corrupt or does not fit its record.
        DataError: The inputs are missing or do not fit; while reading: all bad files by name.
        UnsupportedError: Nobody knows what its outputs mean, or how to draw a sample.
        DivergedError: Its outputs are not finite.
        InterruptedRunError: A signal came.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    chosen = open_source(Path(artifact), backend=backend, batch_size=batch_size)
    try:
        emit({"event": "note", "stage": STAGE, "text": f"model: {chosen.why}"})
        read, options = _reader(chosen, asked=task)
        if film is not None and not hasattr(read, "film"):
            raise UnsupportedError("there is nothing to film in what this model predicts", hint="--format jsonl or csv")
        highs = [high for axes, (_, high) in map(batch_axes, chosen.runners.values()) if axes and high is not None]
        requests = open_requests(
            inputs,
            inputs=_asked(chosen),
            given=chosen.given,
            batch_size=min([batch_size, *highs]),
            on_bad=on_bad,
            emit=emit,
        )
    except BaseException:
        chosen.stack.close()
        raise
    return Predictions(
        _stream(chosen, requests, task=read, options=options, film=film, emit=emit, stop=stop or Stop()), read
    )


def _reader(chosen: Chosen, *, asked: Any) -> tuple[Any, dict[str, Any]]:
    """The task that reads the outputs, with its config and facts; a classifier where nobody says, and it looks so."""
    task = task_of(chosen.task)
    if task is None:
        outputs = chosen.runners[PART].signature.outputs
        if len(outputs) != 1 or len(outputs[0].shape) != 2:
            shapes = ", ".join(f"{spec.name!r} {list(spec.shape)}" for spec in outputs)
            raise UnsupportedError(f"the model gives {shapes}; a classifier gives one output [n, classes]")
        return TASKS["classify"], {"config": TASKS["classify"].Config(), "facts": None}
    own = task.Config.model_validate(chosen.task)
    config = asked if asked is not None and asked.kind == own.kind else own
    options: dict[str, Any] = {"config": config, "facts": task.Facts.model_validate(chosen.facts)}
    if writes(options["config"].kind) and chosen.given is not None:
        options["decode"] = partial(INPUTS[chosen.given.spec.kind].decode, given=chosen.given)
    else:
        _check_outputs(chosen, task, options["facts"])
    return task, options


def _asked(chosen: Chosen) -> Sequence[TensorSpec]:
    """What samples are made into: what the model takes, without a cache and the like, which are the task's affair."""
    inputs = next(iter(chosen.runners.values())).signature.inputs
    if chosen.given is None:
        return inputs
    of_input = specs(chosen.given)
    return of_input if {spec.name for spec in of_input} < {spec.name for spec in inputs} else inputs


def _check_outputs(chosen: Chosen, task: Any, facts: Any) -> None:
    """Raises:
    PackageError: A graph gives something else than the task makes of its facts.
    """
    told = task.signatures(next(iter(chosen.runners.values())).signature.inputs, facts)
    for part, runner in chosen.runners.items():
        for want, got in zip(told[part].outputs, runner.signature.outputs, strict=True):
            fixed = zip(want.shape, got.shape, strict=False)
            if any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in fixed):
                raise PackageError(
                    f"{part} gives {got.name!r} {list(got.shape)}, its manifest's facts {list(want.shape)}"
                )


def to_jsonl(predictions: Iterable[Prediction]) -> Iterator[str]:
    """One JSON object per sample, without line ends."""
    return (json.dumps(one) for one in predictions)


def to_csv(predictions: Iterable[Prediction], *, columns: Sequence[str]) -> Iterator[str]:
    """A header with the columns, then one line per sample, without line ends; what a sample has not is empty."""
    yield ",".join(columns)
    for one in predictions:
        line = io.StringIO()
        csv.writer(line, lineterminator="").writerow([_cell(one.get(name)) for name in columns])
        yield line.getvalue()


def _cell(value: object) -> object:
    return f"{value:.6f}" if isinstance(value, float) else value


def _stream(
    chosen: Chosen,
    requests: Requests,
    *,
    task: Any,
    options: Mapping[str, Any],
    film: Path | None,
    emit: Emit,
    stop: Stop,
) -> Iterator[Prediction]:
    start = told = time.monotonic()
    done = 0
    emit({"event": "start", "stage": STAGE, "steps": requests.num_samples})
    with chosen.stack:
        for batch in requests.batches:
            stop.check(STAGE)
            if film is not None and done == 0:
                store.write_atomic(film, task.film(chosen.runners, batch.fields, **options))
                emit({"event": "note", "stage": STAGE, "text": f"{batch.names[0]} is filmed in {film}"})
            found = task.predict(chosen.runners, batch.fields, **options)
            yield from ({"input": name, **one} for name, one in zip(batch.names, found, strict=True))
            done += len(batch.names)
            now = time.monotonic()
            if now - told >= EVENT_PERIOD_S:
                told = now
                emit(_progress(done, requests.num_samples, seconds=now - start))
    seconds = time.monotonic() - start
    emit({"event": "done", "stage": STAGE, "steps": done, "seconds": seconds, "backend": chosen.backend})


def _progress(done: int, total: int, *, seconds: float) -> dict[str, object]:
    rate = done / max(seconds, 1e-9)
    event = {"event": "step", "stage": STAGE, "step": done, "steps": total}
    return event | {"samples_per_s": rate, "eta_s": (total - done) / max(rate, 1e-9)}
