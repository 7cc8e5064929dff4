"""A report as words and tables: the cells that the console shows, and the Markdown page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bmctl.core.evaluation import SHARE
from bmctl.report.numbers import (
    NOTHING,
    count_text,
    drop_text,
    drop_unit,
    drop_word,
    memory_text,
    ratio_text,
    score_text,
    size_text,
    value_text,
)
from bmctl.report.rows import Report, Row, Score

UNKNOWN = Score("metric", 0.0, None, None, None, unit=SHARE)
"""In the headers of a report without any score."""


@dataclass(frozen=True)
class Table:
    """Cells as text; the columns of `words`, by position, are read from the left, the others are numbers."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: tuple[int, ...] = (0,)


# -- tables --------------------------------------------------------------------------------------------

DETAILS = (2, 1, 0)
"""How much a table says: 2 every interval and percentile, 1 those of the drop, 0 no interval."""


def package_table(report: Report, *, detail: int = 2) -> Table:
    """One line per stage: what the model is, and what it is worth in eager fp32 or as its own graph."""
    main = _main(report)
    columns = ("stage", "params", "MACs", "size", f"val\n{main.name}", f"test\n{main.name}", _drop_header(main))
    rows = [
        (
            row.name.rpartition("/")[2],
            count_text(row.num_params),
            count_text(row.macs),
            size_text(row.size_bytes),
            score_text(row.val, interval=detail > 1),
            score_text(row.test, interval=detail > 1),
            drop_text(row.drop, unit=main.unit, interval=detail > 0) + _elsewhere(row, report),
        )
        for row in report.packages
    ]
    return Table("Packages", columns, tuple(rows))


def artifact_table(report: Report, *, detail: int = 2) -> Table:
    """One line per deployed artifact, the uncompressed model's beside the shipped one on each runtime."""
    main = _main(report)
    columns: tuple[str, ...] = (
        "runtime",
        "model",
        "size",
        f"{_split(report)}\n{main.name}",
        _drop_header(main),
        "p50 / p90 / p99\nms" if detail > 1 else "p50\nms",
        "samples\nper s",
        "speedup",
        "over fp32 on\nONNX Runtime" if detail > 1 else "over\nORT",
    )
    rows = [_artifact_cells(row, report, main.unit, detail) for row in report.artifacts]
    if detail > 1 and any(row.peak_memory_bytes for row in report.artifacts):
        columns = (*columns, "peak\nmemory")
        rows = [(*cells, memory_text(row.peak_memory_bytes)) for cells, row in zip(rows, report.artifacts, strict=True)]
    if detail == 0:  # speed and speed-up say what the median says
        rows, columns = [row[:5] + row[6:] for row in rows], columns[:5] + columns[6:]
    return Table("Artifacts", columns, tuple(rows), (0, 1))


def _artifact_cells(row: Row, report: Report, unit: str, detail: int) -> tuple[str, ...]:
    model = f"{row.precision or ''}{' original' if row.is_original else ''}".strip()
    head = (row.backend or row.name, model, size_text(row.size_bytes))
    if row.status != "ran":
        return (*head, "not run", NOTHING, NOTHING, NOTHING, NOTHING, NOTHING)
    latency = NOTHING
    if row.latency:
        times = (row.latency.p50_ms, row.latency.p90_ms, row.latency.p99_ms)
        latency = " / ".join(f"{time:.2f}" for time in (times if detail > 1 else times[:1]))
    return (
        *head,
        score_text(row.test if _split(report) == "test" else row.val, interval=detail > 1),
        drop_text(row.drop, unit=unit, interval=detail > 0) + _elsewhere(row, report),
        latency,
        f"{row.samples_per_s:,.0f}" if row.samples_per_s else NOTHING,
        ratio_text(row.speedup, interval=detail > 1),
        ratio_text(row.speedup_over_onnxruntime, interval=detail > 1),
    )


def gate_table(report: Report) -> Table:
    """One line per gate and artifact."""
    rows = [
        (
            "pass" if result.passed else "FAIL",
            result.name,
            result.artifact.removeprefix("deploy/"),
            result.limit_text,
            result.why,
        )
        for result in report.gates
    ]
    return Table("Gates", ("", "gate", "artifact", "limit", "measured"), tuple(rows), (0, 1, 2, 4))


def further_table(report: Report) -> Table:
    """One line per row and metric beside the main one, on test data."""
    names = dict.fromkeys(name for row in report.rows for name in list(row.test_metrics)[1:])
    rows = []
    for row in report.rows:
        for name in names:
            if score := row.test_metrics.get(name):
                drop, unit = row.test_drops.get(name), drop_unit(score.unit)
                worse = f"{drop_word(score)} {drop_text(drop, unit=score.unit)} {unit}".rstrip() if drop else NOTHING
                rows.append((row.name.removeprefix("packages/"), name, score_text(score), worse))
    return Table("Further metrics", ("model", "metric", "test", "against the first package"), tuple(rows), (0, 1))


def _drop_header(main: Score) -> str:
    unit = drop_unit(main.unit)
    return f"{drop_word(main)},\n{unit}" if unit else drop_word(main)


def _elsewhere(row: Row, report: Report) -> str:
    """Mark of a drop on another split than the table's, as of a package in between, which never sees test data."""
    return f" on {row.drop.split}" if row.drop and row.drop.split != _split(report) else ""


def _split(report: Report) -> str:
    return "test" if any(row.test for row in report.rows) else "val"


def _main(report: Report) -> Score:
    """Any score of the task's main metric: its name, unit and direction are those of all."""
    return next((score for row in report.rows for score in (row.test, row.val) if score), UNKNOWN)


# -- words ---------------------------------------------------------------------------------------------


def summary(report: Report) -> list[str]:
    """What a reader wants to know first, one sentence each."""
    sentences = []
    first = next(iter(report.packages), None)
    score = first and (first.test or first.val)
    if first and score:
        split = "test" if first.test else "val"
        count = f" on {score.num_samples:,} {split} samples" if score.num_samples else f" on {split}"
        sentences.append(f"{first.stage or first.name}: {score.name} {score_text(score)}{count}{_trivial(score)}.")
    ran = [row for row in report.artifacts if row.samples_per_s and not row.is_original]
    if ran:
        best = max(ran, key=lambda row: row.samples_per_s or 0)
        sentences.append(_praise(best, first))
    return sentences


def evaluation_text(scores: Mapping[str, Score], *, split: str) -> str:
    """``accuracy 89.5 % [88.6, 90.3] on 5,000 test samples, loss 0.31 nats [...]; a trivial predictor gets 10.0 %``."""
    main, *others = scores.values()
    more = "".join(f", {score.name} {score_text(score)}" for score in others)
    return f"{main.name} {score_text(main)} on {main.num_samples:,} {split} samples{more}{_trivial(main)}"


def _trivial(score: Score) -> str:
    return "" if score.trivial is None else f"; a trivial predictor gets {value_text(score.trivial, score.unit)}"


def unrun(report: Report) -> list[tuple[str, str]]:
    """What was built here and not run, each with the command for the machine that can, or the empty string."""
    return [
        (f"{row.name}: {row.status}{f' ({row.reason})' if row.reason else ''}", row.command_elsewhere)
        for row in report.artifacts
        if row.status != "ran"
    ]


def _praise(best: Row, first: Row | None) -> str:
    words = f"Fastest here: {best.backend} {best.precision or ''}, {best.samples_per_s:,.0f} samples/s".replace(
        " ,", ","
    )
    if best.speedup:
        words += f", {ratio_text(best.speedup)} the original on the same runtime"
    if best.speedup_over_onnxruntime and best.backend != "onnxruntime":
        words += f", {ratio_text(best.speedup_over_onnxruntime)} the original on ONNX Runtime"
    if first and first.size_bytes and best.size_bytes:
        words += f"; {size_text(best.size_bytes)}, {first.size_bytes / best.size_bytes:.1f} times smaller than trained"
    if best.drop:
        score = best.test or best.val or UNKNOWN
        worse = f"{drop_text(best.drop, unit=score.unit)} {drop_unit(score.unit)}".rstrip()
        words += f"; {score.name} {drop_word(score)}s by {worse}"
    return words + "."


_BY = {
    "wilson": "Wilson's for a share of samples; the adjusted Wald interval of matched pairs for {a}, which compares "
    "the same samples with the first package",
    "t": "Student's t for a mean over samples, and of matched pairs for {a}, which compares the same samples with the "
    "first package",
    "bootstrap": "a bootstrap over samples, and over matched pairs for {a}, which compares the same samples with the "
    "first package",
}


def how_to_read(report: Report) -> str:
    """What brackets and signs mean, by how the main metric's intervals were taken."""
    main = _main(report)
    word = drop_word(main)
    by = _BY[main.interval or "wilson"].format(a=f"{'an' if word == 'increase' else 'a'} {word}")
    text = (
        f"Brackets hold 95 % intervals: {by}; a bootstrap over interleaved rounds for a speedup, which compares "
        f"samples per second with the original on the same runtime. A positive {word} is a loss."
    )
    if any(len(row.test_metrics) > 1 for row in report.rows):
        text += (
            " Further metrics: the same for a share of samples, Student's t for another mean, a bootstrap over samples "
            "for what is none, all on matched pairs where two models are compared; a positive increase is a loss too."
        )
    return text


def to_markdown(report: Report) -> str:
    """The report as a page: what matters first, then tables, then what was not done, then how to read it."""
    lines = [f"# {report.run.rstrip('/').rpartition('/')[2]}", ""]
    lines += [f"- {sentence}" for sentence in summary(report)]
    failed = [result for result in report.gates if not result.passed]
    if report.gates:
        verdict = f"{len(failed)} of {len(report.gates)} gates failed." if failed else "All gates passed."
        lines.append(f"- {verdict}")
    for table in (package_table(report), artifact_table(report), gate_table(report), further_table(report)):
        if table.rows:
            lines += ["", f"## {table.title}", "", *_markdown_table(table)]
    not_run = [f"{text}{f'; there: `{command}`' if command else ''}" for text, command in unrun(report)]
    for title, items in (("Not run", not_run), ("Notes", report.notes)):
        if items:
            lines += ["", f"## {title}", "", *(f"- {item}" for item in items)]
    lines += ["", "## How to read this", "", how_to_read(report)]
    if report.batch_size:
        machine = ", ".join(f"{key} {value}" for key, value in report.machine.items())
        lines += ["", f"Latency is of one batch of {report.batch_size} samples, taken on: {machine or 'this machine'}."]
    return "\n".join([*lines, "", f"Made by bmctl {report.bmctl}.", ""])


def _markdown_table(table: Table) -> list[str]:
    rules = [":--" if position in table.words else "--:" for position in range(len(table.columns))]
    rows = [table.columns, rules, *table.rows]
    return ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in rows]
