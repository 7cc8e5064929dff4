"""From evaluations to a report's numbers: every metric with its interval, and how much worse than the original."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bmctl.report.rows import Comparison, Row, Score
from bmctl.tasks import TASKS

if TYPE_CHECKING:
    from bmctl.core.comparing import Sampled
    from bmctl.core.evaluation import Evaluation
    from bmctl.core.scores import Filed

SPLITS = ("test", "val")
"""Drops are on the first that both have."""


@dataclass(frozen=True)
class Judged:
    """An evaluation of one row: which samples it is of, and what intervals are taken from."""

    samples: object
    sampled: Sampled


def judged(filed: Filed) -> Judged:
    """What a report makes of a file of RUN/evaluations."""
    from bmctl.core.comparing import Sampled

    return Judged(filed.key.samples, Sampled(filed.evaluation, TASKS[filed.evaluation.task]))


def scores_of(sampled: Sampled) -> dict[str, Score]:
    """Every metric of an evaluation by name, the main one first."""
    return {name: _score(sampled, name) for name in sampled.evaluation.values}


def evaluated(evaluation: Evaluation) -> dict[str, Score]:
    """The same of an evaluation that was just made."""
    from bmctl.core.comparing import Sampled

    return scores_of(Sampled(evaluation, TASKS[evaluation.task]))


def manifest_score(value: Mapping[str, Any] | None) -> Score | None:
    """The main metric as a package's manifest records it; None where it has none."""
    if not value:
        return None
    return Score(
        name=value["metric"],
        value=value["value"],
        low=value.get("low"),
        high=value.get("high"),
        num_samples=value.get("num_samples"),
        trivial=value.get("baseline"),
        better=value.get("better", "higher"),
        unit=value.get("unit", ""),
        interval=value.get("interval"),
    )


def with_scores(row: Row, found: Mapping[str, Judged]) -> Row:
    """The row with what its evaluations say, by split; what its manifest says of others stays."""
    test = scores_of(found["test"].sampled) if "test" in found else {}
    val = found["val"].sampled if "val" in found else None
    return dataclasses.replace(
        row,
        val=_score(val, val.evaluation.name) if val else row.val,
        test=next(iter(test.values()), row.test),
        test_metrics=test,
    )


def with_drops(row: Row, found: Mapping[str, Mapping[str, Judged]], *, versus: Row, note: Callable[[str], None]) -> Row:
    """The row with how much worse it is than `versus`, on the same samples.

    Args:
        found: By row and split.
        note: Told what could not be compared.
    """
    if row.name == versus.name:
        return row
    for split in SPLITS:
        mine, theirs = found[row.name].get(split), found[versus.name].get(split)
        if mine is None or theirs is None:
            continue
        if mine.samples != theirs.samples:
            note(f"{row.name} and {versus.name} were scored on other {split} samples: no drop is given")
            continue
        main = mine.sampled.evaluation.name
        names = mine.sampled.evaluation.values if split == "test" else (main,)
        drops = {name: _drop(mine.sampled, theirs.sampled, name, versus=versus.name, split=split) for name in names}
        return dataclasses.replace(row, drop=drops[main], test_drops=drops if split == "test" else {})
    return row


def _score(sampled: Sampled, name: str) -> Score:
    from bmctl.core.comparing import interval

    metric, found = sampled.task.METRICS[name], sampled.evaluation
    (low, high), by = interval(sampled, name)
    trivial = found.baseline if name == found.name else None
    return Score(name, found.values[name], low, high, len(found.counts), trivial, metric.better, metric.unit, by)


def _drop(mine: Sampled, theirs: Sampled, name: str, *, versus: str, split: str) -> Comparison:
    from bmctl.core.comparing import worse_by

    value, (low, high) = worse_by(mine, theirs, mine.task.METRICS[name])
    return Comparison(value, low, high, versus=versus, split=split)
