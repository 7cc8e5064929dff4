"""Evaluations as they lie in RUN/evaluations: one JSON file per artifact and split, per-sample counts included.

torch-free, so that a report is written without it.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from bmctl.core.evaluation import Counting, Evaluation
from bmctl.core.stats import is_binary
from bmctl.schema import Count, Many, Strict

FOLDER = "evaluations"

Dtype = Literal["bits", "u1", "u2", "u4", "i4", "f4", "f8"]
_NUMBERS: tuple[Dtype, ...] = ("u1", "u2", "u4", "i4", "f4", "f8")


class Key(Strict):
    """All that an evaluation depends on; two with the same key have the same result, two with the same `samples`
    were scored on the same samples.

    Attributes:
        artifact: SHA-256 that identifies what was evaluated: of a package's or artifact's manifest.
        backend: What ran it, such as ``eager``.
        data: The data's fingerprint.
        limit: Samples of the split that the recipe allows; None is all.
        task: The task's config; its `kind` names whose counts these are.
        input: From sample to input.
    """

    artifact: str
    backend: str
    data: str
    split: str
    limit: Count | None
    task: dict[str, Any]
    input: dict[str, Any]

    @property
    def samples(self) -> tuple[str, str, int | None, str]:
        """Which samples, and how they are scored: equal for two artifacts whose counts may be paired."""
        return self.data, self.split, self.limit, json.dumps(self.task, sort_keys=True)


class Column(Strict):
    """One column of the counts, in the smallest type that holds all of its numbers exactly.

    Attributes:
        dtype: Little-endian; `bits` are zeros and ones, the first sample in the highest bit.
        data: base64.
    """

    dtype: Dtype
    data: str


class Scored(Strict):
    """One file. `values` are what the task's metrics make of the counts; the main one comes first."""

    format: Literal[2] = 2
    key: Key
    values: dict[str, float]
    baseline: float
    num_samples: Count
    counts: Many[Column]


@dataclass(frozen=True)
class Filed:
    """One file, read and found to be right."""

    key: Key
    evaluation: Evaluation


def pack(evaluation: Evaluation, *, key: Key) -> Scored:
    """The file's content for an evaluation.

    Raises:
        ValueError: A count is not finite.
    """
    counts = np.asarray(evaluation.counts, dtype=np.float64)
    if not np.isfinite(counts).all():
        raise ValueError("counts must be finite")
    return Scored(
        key=key,
        values={name: float(value) for name, value in evaluation.values.items()},
        baseline=float(evaluation.baseline),
        num_samples=len(counts),
        counts=tuple(_pack_column(column) for column in counts.T),
    )


def unpack(scored: Scored, *, tasks: Mapping[str, Counting]) -> Evaluation:
    """The evaluation of a file's content.

    Args:
        tasks: By kind, to find the one that `key.task` names.

    Raises:
        ValueError: No such task, or the counts fit neither their number nor the values.
    """
    kind = str(scored.key.task.get("kind"))
    if kind not in tasks:
        raise ValueError(f"key.task.kind: no task {kind!r}")
    task, number = tasks[kind], scored.num_samples
    if not scored.counts:
        raise ValueError("counts: no columns")
    counts = np.stack([_unpack_column(column, number=number) for column in scored.counts], axis=1)
    try:
        found = task.metrics(counts)
    except (ValueError, IndexError, ArithmeticError) as error:  # columns of another task, or nonsense in them
        raise ValueError(f"counts: {error}") from error
    if list(found) != list(scored.values):
        raise ValueError(f"values: {', '.join(scored.values)} instead of {', '.join(found)}")
    for name, value in found.items():
        if not np.isclose(value, scored.values[name], rtol=1e-6, atol=1e-9):
            raise ValueError(f"values: {name} is {scored.values[name]}, but the counts make {value}")
    return Evaluation(kind, counts, scored.values, scored.baseline)


def path_of(run: Path, *, artifact: str, split: str) -> Path:
    """Where an evaluation of a run lies."""
    return run / FOLDER / f"{artifact[:12]}-{split}.json"


def read(path: Path, *, tasks: Mapping[str, Counting]) -> Filed:
    """Read one file.

    Raises:
        ValueError: Not such a file, or one whose counts do not fit.
        OSError: Not there, or not readable.
    """
    try:
        scored = Scored.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    return Filed(scored.key, unpack(scored, tasks=tasks))


def read_all(run: Path, *, tasks: Mapping[str, Counting]) -> Iterator[tuple[Path, Filed | str]]:
    """Every evaluation of a run; what is wrong with it in place of one that cannot be read."""
    for path in sorted((run / FOLDER).glob("*.json")):
        try:
            yield path, read(path, tasks=tasks)
        except (ValueError, OSError) as error:
            yield path, str(error)


def _pack_column(values: NDArray[np.float64]) -> Column:
    if is_binary(values):
        return Column(dtype="bits", data=_text(np.packbits(values.astype(bool))))
    with np.errstate(invalid="ignore", over="ignore"):  # what does not fit is found by its value
        tried = ((dtype, values.astype(f"<{dtype}")) for dtype in _NUMBERS)
        dtype, smallest = next(one for one in tried if np.array_equal(one[1].astype(np.float64), values))
    return Column(dtype=dtype, data=_text(smallest))


def _unpack_column(column: Column, *, number: int) -> NDArray[np.float64]:
    try:
        data = base64.b64decode(column.data, validate=True)
    except binascii.Error as error:
        raise ValueError(f"counts: {error}") from error
    bits = column.dtype == "bits"
    width = 1 if bits else np.dtype(column.dtype).itemsize
    if len(data) != (-(-number // 8) if bits else number * width):
        raise ValueError(f"counts: {len(data)} bytes of {column.dtype} for {number} samples")
    if bits:
        return np.unpackbits(np.frombuffer(data, dtype=np.uint8), count=number).astype(np.float64)
    return np.frombuffer(data, dtype=f"<{column.dtype}").astype(np.float64)


def _text(values: NDArray[Any]) -> str:
    return base64.b64encode(values.tobytes()).decode("ascii")
