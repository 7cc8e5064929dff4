"""Quality gates: what a shipped artifact must hold, judged on a report.

Gates are judged on point estimates: the interval tells how sure that is, and is part of the verdict, so that a
gate neither fails good artifacts for being measured on few samples nor hides that it was a close call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bmctl.errors import GateError
from bmctl.report.page import drop_text, limit_text, ratio_text, size_text
from bmctl.report.rows import Comparison, GateResult, Report, Row

if TYPE_CHECKING:
    from bmctl.recipe.sections import GatesConfig

NAMES = ("max_drop", "min_speedup", "max_size_bytes", "max_latency_ms")
ROUNDING = 1e-9
"""A drop of exactly the limit passes, whatever the last bit of a difference of means says."""


def check(gates: GatesConfig, report: Report) -> tuple[GateResult, ...]:
    """Judge every shipped artifact, never the original's, by every gate that the recipe sets.

    Args:
        gates: The recipe's section.
        report: What was measured. An artifact that was not run fails all gates but size, unless `gates.allow_unrun`.

    Returns:
        One result per gate and artifact that `gates.backends` names; a failed one per gate where it is not there.
    """
    limits = {name: float(limit) for name in NAMES if (limit := getattr(gates, name)) is not None}
    shipped = [row for row in report.artifacts if not row.is_original]
    chosen = [row for row in shipped if gates.backends is None or row.backend in gates.backends]
    absent = [f"deploy/{name}" for name in gates.backends or () if name not in {row.backend for row in shipped}]
    if not chosen and not absent:
        absent = ["-"]
    judged = [
        _judge(name, limit, row, allow_unrun=gates.allow_unrun) for row in chosen for name, limit in limits.items()
    ]
    missing = "no artifact was exported"
    return (
        *judged,
        *(GateResult(n, one, limit, None, False, missing) for one in absent for n, limit in limits.items()),
    )


def raise_for(results: Sequence[GateResult]) -> None:
    """Raise when a gate failed.

    Raises:
        GateError: Names every failed gate, with value and limit.
    """
    failed = [result for result in results if not result.passed]
    if not failed:
        return
    lines = [f"  {r.artifact} {r.name}: {r.why}, limit {limit_text(r.name, r.limit)}" for r in failed]
    unrun = [r for r in failed if r.value is None and r.why.startswith("built, not run")]
    hints = [f"compress less, recover longer, or change the limit: --set gates.{failed[0].name}=..."]
    if unrun:
        hints.append("--set gates.allow_unrun=true lets pass what was built and cannot be run here")
    raise GateError(
        "\n".join([f"{len(failed)} of {len(results)} gates failed:", *lines]),
        hint="; ".join(hints[1:] if len(unrun) == len(failed) else hints),
    )


def _judge(name: str, limit: float, row: Row, *, allow_unrun: bool) -> GateResult:
    if row.status != "ran" and name != "max_size_bytes":
        reason = f": {row.reason}" if row.reason else ""
        allowed = "; gates.allow_unrun lets it pass" if allow_unrun else ""
        return GateResult(name, row.name, limit, None, allow_unrun, f"{row.status}{reason}{allowed}")
    value, text, interval = _measured(name, row)
    if value is None:
        return GateResult(name, row.name, limit, None, False, text)
    passed = value >= limit - ROUNDING if name.startswith("min_") else value <= limit + ROUNDING
    return GateResult(name, row.name, limit, value, passed, text + _doubt(interval, limit))


def _measured(name: str, row: Row) -> tuple[float | None, str, Comparison | None]:
    """The value that a gate judges, in words, with its interval; None and why where there is none."""
    if name == "max_size_bytes":
        return row.size_bytes, size_text(row.size_bytes), None
    if name == "max_latency_ms":
        if row.latency is None:
            return None, "latency not measured", None
        return row.latency.p50_ms, f"{row.latency.p50_ms:.2f} ms, median of {row.latency.num_rounds} rounds", None
    if name == "min_speedup":
        if row.speedup is None:
            return None, "not timed beside the original on the same runtime (export.baseline)", None
        return row.speedup.value, ratio_text(row.speedup, digits=2), row.speedup
    if row.drop is None or row.drop.split != "test" or row.test is None:
        return None, "not compared with the first package on test data", None
    if not row.test.is_share:
        return row.drop.value, drop_text(row.drop, is_share=False), row.drop
    return row.drop.value, f"{drop_text(row.drop, is_share=True, digits=2)} points", row.drop


def _doubt(interval: Comparison | None, limit: float) -> str:
    """Where the interval holds the limit, the data could have said either."""
    if interval is None or interval.low is None or interval.high is None:
        return ""
    return " (close: the interval holds the limit)" if interval.low < limit < interval.high else ""
