"""Quality gates: what a shipped artifact must hold, judged on a report.

Gates are judged on point estimates: the interval tells how sure that is, and is part of the verdict, so that a
gate neither fails good artifacts for being measured on few samples nor hides that it was a close call.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bmctl.core.evaluation import SHARE, Metric
from bmctl.errors import GateError
from bmctl.report.numbers import (
    drop_limit_text,
    drop_text,
    drop_unit,
    drop_word,
    ratio_text,
    score_text,
    size_text,
    value_text,
)
from bmctl.report.rows import Comparison, GateResult, Report, Row, Score

if TYPE_CHECKING:
    from bmctl.recipe.sections import GatesConfig

NAMES = ("max_drop", "min_speedup", "max_size_bytes", "max_latency_ms")
METRIC_NAMES = ("min", "max", "max_drop")
ROUNDING = 1e-9
"""A drop of exactly the limit passes, whatever the last bit of a difference of means says."""


@dataclass(frozen=True)
class Gate:
    """One limit of the recipe.

    Attributes:
        name: Its place below `gates`, such as ``max_drop`` or ``metrics.macro_f1.min``.
        kind: One of NAMES or METRIC_NAMES.
        metric: What it is of; None where it is of no metric.
    """

    name: str
    kind: str
    limit: float
    metric: Metric | None = None

    @property
    def text(self) -> str:
        """The limit with its unit."""
        if self.metric is not None:
            say = drop_limit_text if self.kind == "max_drop" else _level_text
            return say(self.limit, self.metric.unit)
        if self.kind == "max_size_bytes":
            return size_text(int(self.limit))
        return f"{self.limit:.2f}x" if self.kind == "min_speedup" else f"{self.limit:.2f} ms"

    def result(self, artifact: str, value: float | None, passed: bool, why: str) -> GateResult:
        return GateResult(self.name, artifact, self.limit, value, passed, why, self.text)


def check(gates: GatesConfig, report: Report, *, metrics: Mapping[str, Metric]) -> tuple[GateResult, ...]:
    """Judge every shipped artifact, never the original's, by every gate that the recipe sets.

    Args:
        gates: The recipe's section.
        report: What was measured. An artifact that was not run fails all gates but size, unless `gates.allow_unrun`.
        metrics: The task's, the main one first; none where the recipe has no task.

    Returns:
        One result per gate and artifact that `gates.backends` names; a failed one per gate where it is not there.
    """
    asked = list(asked_for(gates, metrics))
    shipped = [row for row in report.artifacts if not row.is_original]
    chosen = [row for row in shipped if gates.backends is None or row.backend in gates.backends]
    absent = [f"deploy/{name}" for name in gates.backends or () if name not in {row.backend for row in shipped}]
    if not chosen and not absent:
        absent = ["-"]
    judged = [_judge(gate, row, allow_unrun=gates.allow_unrun) for row in chosen for gate in asked]
    missing = "no artifact was exported"
    return (*judged, *(gate.result(one, None, False, missing) for one in absent for gate in asked))


def asked_for(gates: GatesConfig, metrics: Mapping[str, Metric]) -> Iterator[Gate]:
    """Every limit that a recipe sets, in the order of its section."""
    main = next(iter(metrics.values()), Metric("metric", unit=SHARE))
    for name in NAMES:
        if (limit := getattr(gates, name)) is not None:
            yield Gate(name, name, float(limit), main if name == "max_drop" else None)
    for of, limits in gates.metrics.items():
        for kind in METRIC_NAMES:
            if (limit := getattr(limits, kind)) is not None:
                yield Gate(f"metrics.{of}.{kind}", kind, float(limit), metrics.get(of, Metric(of)))


def raise_for(results: Sequence[GateResult]) -> None:
    """Raise when a gate failed.

    Raises:
        GateError: Names every failed gate, with value and limit.
    """
    failed = [result for result in results if not result.passed]
    if not failed:
        return
    lines = [f"  {r.artifact} {r.name}: {r.why}, limit {r.limit_text}" for r in failed]
    unrun = [r for r in failed if r.value is None and r.why.startswith("built, not run")]
    hints = [f"compress less, recover longer, or change the limit: --set gates.{failed[0].name}=..."]
    if unrun:
        hints.append("--set gates.allow_unrun=true lets pass what was built and cannot be run here")
    raise GateError(
        "\n".join([f"{len(failed)} of {len(results)} gates failed:", *lines]),
        hint="; ".join(hints[1:] if len(unrun) == len(failed) else hints),
    )


def _judge(gate: Gate, row: Row, *, allow_unrun: bool) -> GateResult:
    if row.status != "ran" and gate.kind != "max_size_bytes":
        reason = f": {row.reason}" if row.reason else ""
        allowed = "; gates.allow_unrun lets it pass" if allow_unrun else ""
        return gate.result(row.name, None, allow_unrun, f"{row.status}{reason}{allowed}")
    value, text, interval = _measured(gate, row)
    if value is None:
        return gate.result(row.name, None, False, text)
    at_least = gate.kind.startswith("min")
    passed = value >= gate.limit - ROUNDING if at_least else value <= gate.limit + ROUNDING
    return gate.result(row.name, value, passed, text + _doubt(interval, gate.limit))


def _measured(gate: Gate, row: Row) -> tuple[float | None, str, Comparison | Score | None]:
    """The value that a gate judges, in words, with its interval; None and why where there is none."""
    if gate.kind == "max_size_bytes":
        return row.size_bytes, size_text(row.size_bytes), None
    if gate.kind == "max_latency_ms":
        if row.latency is None:
            return None, "latency not measured", None
        return row.latency.p50_ms, f"{row.latency.p50_ms:.2f} ms, median of {row.latency.num_rounds} rounds", None
    if gate.kind == "min_speedup":
        if row.speedup is None:
            return None, "not timed beside the original on the same runtime (export.baseline)", None
        return row.speedup.value, ratio_text(row.speedup, digits=2), row.speedup
    assert gate.metric is not None  # all others are of one
    return _drop(gate.metric, row) if gate.kind == "max_drop" else _level(gate.metric, row)


def _drop(metric: Metric, row: Row) -> tuple[float | None, str, Comparison | None]:
    drop = row.test_drops.get(metric.name)
    if drop is None:
        return None, "not compared with the first package on test data", None
    text = drop_text(drop, unit=metric.unit, digits=2 if metric.unit == SHARE else None)
    rise = f"{drop_word(metric)} of " if metric.better == "lower" else ""
    return drop.value, f"{rise}{text} {drop_unit(metric.unit)}".rstrip(), drop


def _level(metric: Metric, row: Row) -> tuple[float | None, str, Score | None]:
    score = row.test_metrics.get(metric.name)
    return (None, "not evaluated on test data", None) if score is None else (score.value, score_text(score), score)


def _level_text(limit: float, unit: str) -> str:
    return value_text(limit, unit, digits=2 if unit == SHARE else None)


def _doubt(interval: Comparison | Score | None, limit: float) -> str:
    """Where the interval holds the limit, the data could have said either."""
    if interval is None or interval.low is None or interval.high is None:
        return ""
    return " (close: the interval holds the limit)" if interval.low < limit < interval.high else ""
