"""What a report is made of: one row per stage and artifact, as plain data, and its JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

from bmctl.schema import Count, Many, Positive, Strict

ORIGINAL = "baseline"
"""Folder below RUN/deploy that holds the uncompressed model's artifacts."""

# -- the measurements that a pipeline leaves for the report -----------------------------------------


class Timing(Strict):
    """One artifact's latency of one batch, in rounds interleaved with the others'.

    Attributes:
        samples_ms: One timing per round, in the order of the rounds.
        throughput: Samples per second.
        artifact: Hash of the artifact's manifest, so that a rebuilt one is not given an older one's speed.
        peak_memory_bytes: That opening it and one batch took of the process; None where that says nothing, as on GPUs.
    """

    p50_ms: Positive
    p90_ms: Positive
    p99_ms: Positive
    samples_ms: Many[Positive]
    throughput: Positive
    artifact: str | None = None
    peak_memory_bytes: Annotated[int, Field(ge=1)] | None = None


class Measurements(Strict):
    """RUN/measurements.json. Artifacts are named by their path below RUN/deploy, such as ``baseline/onnxruntime``."""

    batch_size: Count
    machine: dict[str, Any]
    artifacts: dict[str, Timing]


# -- the report --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """One of a task's metrics on one split, with its 95 % interval.

    Attributes:
        trivial: What a predictor that ignores its input gets; of the main metric alone.
        better: Which way is better.
        unit: ``share`` is shown in per cent, and its differences in points.
        interval: How the interval was taken.
    """

    name: str
    value: float
    low: float | None
    high: float | None
    num_samples: int | None
    trivial: float | None = None
    better: Literal["higher", "lower"] = "higher"
    unit: str = ""
    interval: Literal["wilson", "t", "bootstrap"] | None = None


@dataclass(frozen=True)
class Comparison:
    """A paired comparison with its 95 % interval: a drop of the metric, or a ratio of speeds.

    Attributes:
        value: Of a drop: by how much it is worse, in the metric's unit, whichever way is better.
        versus: Name of the row compared with.
        split: Of a drop: the split that both were scored on.
    """

    value: float
    low: float | None
    high: float | None
    versus: str
    split: str | None = None


@dataclass(frozen=True)
class LatencyRow:
    """Of one batch of the report's batch size."""

    p50_ms: float
    p90_ms: float
    p99_ms: float
    num_rounds: int


@dataclass(frozen=True)
class Row:
    """One package (a stage's result) or one deployed artifact.

    Attributes:
        name: Path below the run, such as ``packages/00-train`` or ``deploy/openvino``.
        stage: Of a package: its stage.
        backend: Of an artifact: its runtime.
        is_original: The first package, or an artifact of it, that the others are compared with.
        precision: Such as ``fp32`` or ``int8``.
        val: The task's main metric; so are `test` and `drop`.
        drop: Of the metric against the first package, on the same samples; positive is worse.
        speedup: In samples per second over the original on the same runtime, in the same rounds.
        speedup_over_onnxruntime: The same over the original on ONNX Runtime.
        peak_memory_bytes: Of an artifact: what opening it and one batch took of the process's memory.
        status: ``built, not run`` is an artifact that this machine cannot run.
        reason: Why it was not run.
        command_elsewhere: What proves it, or builds its sibling, on the machine that can.
        test_metrics: Every metric of the task by name, the main one first.
        test_drops: Their drops on the same test samples.
    """

    name: str
    kind: Literal["package", "artifact"]
    stage: str | None
    backend: str | None
    is_original: bool
    precision: str | None
    num_params: int | None
    macs: int | None
    size_bytes: int | None
    val: Score | None = None
    test: Score | None = None
    drop: Comparison | None = None
    latency: LatencyRow | None = None
    samples_per_s: float | None = None
    speedup: Comparison | None = None
    speedup_over_onnxruntime: Comparison | None = None
    peak_memory_bytes: int | None = None
    status: str = "ran"
    reason: str = ""
    command_elsewhere: str = ""
    test_metrics: Mapping[str, Score] = field(default_factory=dict)
    test_drops: Mapping[str, Comparison] = field(default_factory=dict)


@dataclass(frozen=True)
class GateResult:
    """One gate on one artifact.

    Attributes:
        name: Of the gate in the recipe, such as ``max_drop`` or ``metrics.macro_f1.min``.
        artifact: Name of the row, or ``-`` where there was none to judge.
        limit: What the recipe allows.
        value: What was measured; None where nothing was.
        why: The verdict in words, with its interval.
        limit_text: The limit with its unit.
    """

    name: str
    artifact: str
    limit: float
    value: float | None
    passed: bool
    why: str
    limit_text: str


@dataclass(frozen=True)
class Report:
    """Everything that is known about a run.

    Attributes:
        batch_size: Of all latencies and speeds; None where nothing was timed.
        machine: Where they were taken.
        rows: Packages in order of their stages, then artifacts.
        notes: What was skipped, or could not be compared, and why.
    """

    run: str
    bmctl: str
    batch_size: int | None
    machine: dict[str, Any]
    rows: tuple[Row, ...]
    gates: tuple[GateResult, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def packages(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.kind == "package")

    @property
    def artifacts(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.kind == "artifact")


def with_gates(report: Report, results: tuple[GateResult, ...]) -> Report:
    """The same report with the gates' verdicts in it."""
    return dataclasses.replace(report, gates=results)


def to_json(report: Report) -> str:
    """The report as one JSON document; what is unknown is null."""
    document = {"format": 1, **dataclasses.asdict(report)}
    return json.dumps(finite(document), indent=2, allow_nan=False, ensure_ascii=False)


def finite(value: Any) -> Any:
    """Plain data with null for what JSON has no number for, such as an interval without an end."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
