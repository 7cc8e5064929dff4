"""Evaluations as they lie in RUN/evaluations: one JSON file per artifact and split, per-sample scores included.

torch-free, so that a report is written without it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from bmctl.core.evaluation import Evaluation
from bmctl.core.stats import is_binary
from bmctl.schema import Count, Strict

FOLDER = "evaluations"


class Key(Strict):
    """All that an evaluation depends on; two with the same key have the same result, two with the same `samples`
    were scored on the same samples.

    Attributes:
        artifact: SHA-256 that identifies what was evaluated: of a package's or artifact's manifest.
        backend: What ran it, such as ``eager``.
        data: The data's fingerprint.
        limit: Samples of the split that the recipe allows; None is all.
        task: The task's config.
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
        """Which samples, and how they are scored: equal for two artifacts whose scores may be paired."""
        return self.data, self.split, self.limit, json.dumps(self.task, sort_keys=True)


class Scored(Strict):
    """One file. `scores` is a hex string of bits for hits of 0 and 1, else one number per sample."""

    format: Literal[1] = 1
    key: Key
    metric: str
    value: float
    baseline: float
    extra: dict[str, float]
    num_samples: Count
    scores: str | list[float]


def pack(evaluation: Evaluation, *, key: Key) -> Scored:
    """The file's content for an evaluation."""
    scores = np.asarray(evaluation.scores, dtype=np.float32)
    bits = np.packbits(scores.astype(bool)).tobytes().hex() if is_binary(scores) else None
    return Scored(
        key=key,
        metric=evaluation.metric,
        value=float(evaluation.value),
        baseline=float(evaluation.baseline),
        extra={name: float(value) for name, value in evaluation.extra.items()},
        num_samples=len(scores),
        scores=scores.tolist() if bits is None else bits,
    )


def unpack(scored: Scored) -> Evaluation:
    """The evaluation of a file's content.

    Raises:
        ValueError: The scores do not fit their number.
    """
    return Evaluation(
        metric=scored.metric,
        value=scored.value,
        scores=unpack_scores(scored),
        baseline=scored.baseline,
        extra=scored.extra,
    )


def unpack_scores(scored: Scored) -> NDArray[np.float32]:
    """Per-sample scores, float32 [num_samples].

    Raises:
        ValueError: They do not fit `num_samples`, or their mean is not `value`.
    """
    if isinstance(scored.scores, str):
        packed = np.frombuffer(bytes.fromhex(scored.scores), dtype=np.uint8)
        if len(packed) != -(-scored.num_samples // 8):
            raise ValueError(f"{len(packed)} bytes of bits for {scored.num_samples} samples")
        scores = np.unpackbits(packed, count=scored.num_samples).astype(np.float32)
    else:
        scores = np.asarray(scored.scores, dtype=np.float32)
    if len(scores) != scored.num_samples:
        raise ValueError(f"{len(scores)} scores for {scored.num_samples} samples")
    if not np.isclose(scores.mean(dtype=np.float64), scored.value, rtol=1e-4, atol=1e-6):
        raise ValueError("the scores' mean is not the value")
    return scores


def path_of(run: Path, *, artifact: str, split: str) -> Path:
    """Where an evaluation of a run lies."""
    return run / FOLDER / f"{artifact[:12]}-{split}.json"


def read(path: Path) -> Scored:
    """Read one file.

    Raises:
        ValueError: Not such a file, or one whose scores do not fit.
        OSError: Not there, or not readable.
    """
    try:
        scored = Scored.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    unpack_scores(scored)
    return scored


def read_all(run: Path) -> Iterator[tuple[Path, Scored | str]]:
    """Every evaluation of a run; what is wrong with it in place of one that cannot be read."""
    for path in sorted((run / FOLDER).glob("*.json")):
        try:
            yield path, read(path)
        except (ValueError, OSError) as error:
            yield path, str(error)
