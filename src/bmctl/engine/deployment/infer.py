"""Predictions: a model as it was found, an input as it was given, one line per sample."""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bmctl.core.requests import OnBad, Requests
from bmctl.core.runner import Batched, batch_axes
from bmctl.engine.deployment.choose import Chosen, choose_runner, open_source
from bmctl.engine.deployment.requests import open_requests
from bmctl.errors import DivergedError, PackageError, UnsupportedError
from bmctl.inputs import Resolved
from bmctl.schema import Emit

__all__ = ["COLUMNS", "Prediction", "choose_runner", "predict", "to_csv", "to_jsonl"]

COLUMNS = ("input", "class_name", "class_index", "score")
EVENT_PERIOD_S = 0.5


@dataclass(frozen=True)
class Prediction:
    """What the model says of one sample.

    Attributes:
        input: The image's path, or `file.npz#3` for the fourth sample of an array.
        class_name: The likeliest class; its index as text where the classes have no names.
        score: Softmax of its logit.
        top: The likeliest classes with their scores, best first.
    """

    input: str
    class_name: str
    class_index: int
    score: float
    top: tuple[tuple[str, float], ...]


def _silent(event: Mapping[str, object]) -> None:
    pass


def predict(
    artifact: Path,
    inputs: str | Path,
    *,
    backend: str = "auto",
    batch_size: int = 64,
    top: int = 5,
    on_bad: OnBad = "refuse",
    emit: Emit = _silent,
) -> Iterator[Prediction]:
    """Classify every sample of `inputs`; preprocessing is the training's, from the manifest.

    The model and the list of inputs are opened before this returns; images are decoded as predictions are read.

    Args:
        artifact: A run, a package, a deploy directory, an .onnx or an engine.
        inputs: An image, a folder, an .npz, a .csv or ``bundled:samples``; see requests.open_requests.
        backend: `auto`, a backend's name, or `eager`.
        batch_size: Samples per call, within what the artifact takes.
        top: Classes in `Prediction.top`.
        on_bad: What bad images among many do.
        emit: Notes (which artifact, and why) and progress.

    Raises:
        PackageError: The model is missing, corrupt or does not fit its record.
        DataError: The inputs are missing or do not fit; while reading: all bad images by name.
        UnsupportedError: It is no classifier.
        DivergedError: Its outputs are not finite.
    """
    if batch_size < 1 or top < 1:
        raise ValueError(f"batch_size and top must be at least 1, got {batch_size} and {top}")
    chosen = open_source(Path(artifact), backend=backend, batch_size=batch_size)
    try:
        emit({"event": "note", "stage": "infer", "text": f"model: {chosen.why}"})
        _check_classifier(chosen)
        _, (_, high) = batch_axes(chosen.runner)
        requests = open_requests(
            inputs,
            inputs=chosen.runner.signature.inputs,
            given=Resolved(chosen.preprocess) if chosen.preprocess is not None else None,
            batch_size=min(batch_size, high or batch_size),
            on_bad=on_bad,
            emit=emit,
        )
    except BaseException:
        chosen.runner.__exit__(None, None, None)
        raise
    return _stream(chosen, requests, top=top, emit=emit)


def to_jsonl(predictions: Iterable[Prediction]) -> Iterator[str]:
    """One JSON object per sample, without line ends: input, class_name, class_index, score, top."""
    for one in predictions:
        best = [{"class_name": name, "score": round(score, 6)} for name, score in one.top]
        record = {"input": one.input, "class_name": one.class_name, "class_index": one.class_index}
        yield json.dumps(record | {"score": round(one.score, 6), "top": best})


def to_csv(predictions: Iterable[Prediction]) -> Iterator[str]:
    """A header with COLUMNS, then one line per sample, without line ends."""
    yield ",".join(COLUMNS)
    for one in predictions:
        line = io.StringIO()
        csv.writer(line, lineterminator="").writerow([one.input, one.class_name, one.class_index, f"{one.score:.6f}"])
        yield line.getvalue()


def _check_classifier(chosen: Chosen) -> None:
    outputs = chosen.runner.signature.outputs
    if len(outputs) != 1 or len(outputs[0].shape) != 2:
        shapes = ", ".join(f"{spec.name!r} {list(spec.shape)}" for spec in outputs)
        raise UnsupportedError(f"the model gives {shapes}; a classifier gives one output [n, classes]")
    num_classes, num_names = outputs[0].shape[1], len(chosen.class_names)
    if num_names and isinstance(num_classes, int) and num_classes != num_names:
        raise PackageError(f"the model has {num_classes} classes, its manifest names {num_names}")


def _stream(chosen: Chosen, requests: Requests, *, top: int, emit: Emit) -> Iterator[Prediction]:
    start = told = time.monotonic()
    done = 0
    emit({"event": "start", "stage": "infer", "steps": requests.num_samples})
    batched = Batched(chosen.runner)
    with chosen.runner:
        for batch in requests.batches:
            logits = batched.run(batch.fields)[chosen.runner.signature.outputs[0].name]
            yield from _read(logits, names=batch.names, class_names=chosen.class_names, top=top)
            done += len(batch.names)
            now = time.monotonic()
            if now - told >= EVENT_PERIOD_S:
                told = now
                emit(_progress(done, requests.num_samples, seconds=now - start))
    seconds = time.monotonic() - start
    emit({"event": "done", "stage": "infer", "steps": done, "seconds": seconds, "backend": chosen.backend})


def _progress(done: int, total: int, *, seconds: float) -> dict[str, object]:
    rate = done / max(seconds, 1e-9)
    event = {"event": "step", "stage": "infer", "step": done, "steps": total}
    return event | {"samples_per_s": rate, "eta_s": (total - done) / max(rate, 1e-9)}


def _read(logits: np.ndarray, *, names: Iterable[str], class_names: tuple[str, ...], top: int) -> Iterator[Prediction]:
    """Softmax in double precision; equal scores keep the order of the classes.

    Args:
        logits: float [n, classes].
    """
    if not np.isfinite(logits).all():
        raise DivergedError("the model's outputs hold nan or inf", hint="bmctl evaluate tells which stage broke it")
    z = logits.astype(np.float64)
    scores = np.exp(z - z.max(axis=1, keepdims=True))
    scores /= scores.sum(axis=1, keepdims=True)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :top]
    labels = class_names or tuple(str(i) for i in range(logits.shape[1]))
    for name, row, best in zip(names, scores, order, strict=True):
        ranked = tuple((labels[i], float(row[i])) for i in best)
        yield Prediction(input=name, class_name=ranked[0][0], class_index=int(best[0]), score=ranked[0][1], top=ranked)
