"""Numbers of a report as text, with their units and intervals."""

from __future__ import annotations

import math

from bmctl.core.evaluation import SHARE, Metric
from bmctl.report.rows import Comparison, Score

NOTHING = "-"


def size_text(size_bytes: int | None) -> str:
    """``121 kB``; SI units, as disks are sold."""
    if size_bytes is None:
        return NOTHING
    if size_bytes < 1000:
        return f"{size_bytes} B"
    kilobytes = size_bytes / 1000
    return f"{kilobytes:,.0f} kB" if kilobytes < 10_000 else f"{kilobytes / 1000:,.1f} MB"


def memory_text(peak_bytes: int | None) -> str:
    """``44 MB``: a peak differs by a tenth from one run to the next."""
    return NOTHING if peak_bytes is None else f"{max(1, round(peak_bytes / 1e6)):,} MB"


def count_text(count: int | None) -> str:
    """``315 k``, ``11.7 M``."""
    if count is None:
        return NOTHING
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            digits = 0 if count >= 100 * size else 1
            return f"{count / size:.{digits}f} {unit}"
    return str(count)


def value_text(value: float, unit: str, *, digits: int | None = None) -> str:
    """``89.5 %`` for a share, ``0.3100 nats`` for anything else."""
    if unit == SHARE:
        return f"{_fixed(value * 100, 1 if digits is None else digits)} %"
    return f"{_fixed(value, _digits(value) if digits is None else digits)} {unit}".rstrip()


def score_text(score: Score | None, *, interval: bool = True) -> str:
    """``89.5 % [88.6, 90.3]``: a share in per cent, anything else on its own scale."""
    if score is None:
        return NOTHING
    scale, digits, unit = (
        (100, 1, " %") if score.unit == SHARE else (1, _digits(score.value), f" {score.unit}".rstrip())
    )
    return _with_interval(score, scale, digits, unit, interval=interval)


def drop_text(drop: Comparison | None, *, unit: str, interval: bool = True, digits: int | None = None) -> str:
    """``0.3 [-0.2, 0.8]``: points of a hundred for a share, else in the metric's unit; the unit is not said."""
    if drop is None:
        return NOTHING
    if unit == SHARE:
        return _with_interval(drop, 100, 1 if digits is None else digits, interval=interval)
    ends = [abs(one) for one in (drop.value, drop.low, drop.high) if one is not None and math.isfinite(one)]
    return _with_interval(drop, 1, _digits(max(ends, default=0.0)) if digits is None else digits, interval=interval)


def drop_unit(unit: str) -> str:
    """What a difference of a metric is counted in."""
    return "points" if unit == SHARE else unit


def drop_limit_text(limit: float, unit: str) -> str:
    """``1.00 points``, ``0.0500 nats``."""
    number = f"{limit * 100:.2f}" if unit == SHARE else _fixed(limit, _digits(limit))
    return f"{number} {drop_unit(unit)}".rstrip()


def drop_word(metric: Metric | Score) -> str:
    """What getting worse is called: a loss that is higher has not dropped."""
    return "drop" if metric.better == "higher" else "increase"


def ratio_text(ratio: Comparison | None, *, interval: bool = True, digits: int = 1) -> str:
    """``2.7x [2.5, 2.9]``, and ``0.02x [0.01, 0.03]`` of what became slower."""
    if ratio is None:
        return NOTHING
    return _with_interval(ratio, 1, max(digits, 2) if ratio.value < 1 else digits, "x", interval=interval)


def _with_interval(
    number: Score | Comparison, scale: float, digits: int, unit: str = "", *, interval: bool = True
) -> str:
    text = _fixed(number.value * scale, digits) + unit
    if not interval or number.low is None or number.high is None:
        return text
    return f"{text} [{_fixed(number.low * scale, digits)}, {_fixed(number.high * scale, digits)}]"


def _digits(value: float) -> int:
    """Decimals that leave about five figures: 4 around 1, none from 10,000 on, more for what is small."""
    if value == 0 or not math.isfinite(value):
        return 4
    exponent = math.floor(math.log10(abs(value)))
    return max(0, 4 - max(exponent, 0)) if exponent >= -2 else min(10, 2 - exponent)


def _fixed(value: float, digits: int) -> str:
    text = f"{value:,.{digits}f}"
    return text.lstrip("-") if math.isfinite(value) and float(text.replace(",", "")) == 0 else text  # no "-0.0"
