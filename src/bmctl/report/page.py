"""A report as words and tables: the cells that the console shows, and the Markdown page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bmctl.report.rows import Comparison, Metric, Report, Row

if TYPE_CHECKING:
    from bmctl.core.evaluation import Evaluation

NOTHING = "-"


@dataclass(frozen=True)
class Table:
    """Cells as text; the columns of `words`, by position, are read from the left, the others are numbers."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: tuple[int, ...] = (0,)


# -- numbers as text ----------------------------------------------------------------------------------


def size_text(size_bytes: int | None) -> str:
    """``121 kB``; SI units, as disks are sold."""
    if size_bytes is None:
        return NOTHING
    if size_bytes < 1000:
        return f"{size_bytes} B"
    kilobytes = size_bytes / 1000
    return f"{kilobytes:,.0f} kB" if kilobytes < 10_000 else f"{kilobytes / 1000:,.1f} MB"


def count_text(count: int | None) -> str:
    """``315 k``, ``11.7 M``."""
    if count is None:
        return NOTHING
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            digits = 0 if count >= 100 * size else 1
            return f"{count / size:.{digits}f} {unit}"
    return str(count)


def metric_text(metric: Metric | None, *, interval: bool = True) -> str:
    """``89.5 % [88.6, 90.3]``: a share of samples in per cent, anything else on its own scale."""
    if metric is None:
        return NOTHING
    scale, unit, digits = (100, " %", 1) if metric.is_share else (1, "", 4)
    return _with_interval(metric, scale, digits, unit, interval=interval)


def trivial_text(metric: Metric) -> str:
    """``10.0 %``: what a predictor that ignores its input gets."""
    if metric.trivial is None:
        return NOTHING
    return f"{metric.trivial * 100:.1f} %" if metric.is_share else f"{metric.trivial:.4f}"


def drop_text(drop: Comparison | None, *, is_share: bool, interval: bool = True, digits: int | None = None) -> str:
    """``0.3 [-0.2, 0.8]``: points of a hundred for a share of samples."""
    if drop is None:
        return NOTHING
    scale, usual = (100, 1) if is_share else (1, 4)
    return _with_interval(drop, scale, digits or usual, interval=interval)


def ratio_text(ratio: Comparison | None, *, interval: bool = True, digits: int = 1) -> str:
    """``2.7x [2.5, 2.9]``, and ``0.02x [0.01, 0.03]`` of what became slower."""
    if ratio is None:
        return NOTHING
    return _with_interval(ratio, 1, max(digits, 2) if ratio.value < 1 else digits, "x", interval=interval)


def limit_text(name: str, limit: float) -> str:
    """A gate's limit with its unit."""
    if name == "max_drop":
        return f"{limit * 100:.2f} points"
    if name == "max_size_bytes":
        return size_text(int(limit))
    return f"{limit:.2f}x" if name == "min_speedup" else f"{limit:.2f} ms"


def _with_interval(
    number: Metric | Comparison, scale: float, digits: int, unit: str = "", *, interval: bool = True
) -> str:
    text = _fixed(number.value * scale, digits) + unit
    if not interval or number.low is None or number.high is None:
        return text
    return f"{text} [{_fixed(number.low * scale, digits)}, {_fixed(number.high * scale, digits)}]"


def _fixed(value: float, digits: int) -> str:
    text = f"{value:,.{digits}f}"
    return text.lstrip("-") if float(text.replace(",", "")) == 0 else text  # no "-0.0"


# -- tables --------------------------------------------------------------------------------------------

DETAILS = (2, 1, 0)
"""How much a table says: 2 every interval and percentile, 1 those of the drop, 0 no interval."""


def package_table(report: Report, *, detail: int = 2) -> Table:
    """One line per stage: what the model is, and what it is worth in eager fp32 or as its own graph."""
    name, share = _metric_name(report)
    columns = ("stage", "params", "MACs", "size", f"val\n{name}", f"test\n{name}", _drop_header(share))
    rows = [
        (
            row.name.rpartition("/")[2],
            count_text(row.num_params),
            count_text(row.macs),
            size_text(row.size_bytes),
            metric_text(row.val, interval=detail > 1),
            metric_text(row.test, interval=detail > 1),
            drop_text(row.drop, is_share=share, interval=detail > 0) + _elsewhere(row, report),
        )
        for row in report.packages
    ]
    return Table("Packages", columns, tuple(rows))


def artifact_table(report: Report, *, detail: int = 2) -> Table:
    """One line per deployed artifact, the uncompressed model's beside the shipped one on each runtime."""
    name, share = _metric_name(report)
    columns: tuple[str, ...] = (
        "runtime",
        "model",
        "size",
        f"{_split(report)}\n{name}",
        _drop_header(share),
        "p50 / p90 / p99\nms" if detail > 1 else "p50\nms",
        "samples\nper s",
        "speedup",
        "over fp32 on\nONNX Runtime" if detail > 1 else "over\nORT",
    )
    rows = [_artifact_cells(row, report, share, detail) for row in report.artifacts]
    if detail == 0:  # speed and speed-up say what the median says
        rows, columns = [row[:5] + row[6:] for row in rows], columns[:5] + columns[6:]
    return Table("Artifacts", columns, tuple(rows), (0, 1))


def _artifact_cells(row: Row, report: Report, share: bool, detail: int) -> tuple[str, ...]:
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
        metric_text(row.test if _split(report) == "test" else row.val, interval=detail > 1),
        drop_text(row.drop, is_share=share, interval=detail > 0) + _elsewhere(row, report),
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
            limit_text(result.name, result.limit),
            result.why,
        )
        for result in report.gates
    ]
    return Table("Gates", ("", "gate", "artifact", "limit", "measured"), tuple(rows), (0, 1, 2, 4))


def _drop_header(share: bool) -> str:
    return "drop,\npoints" if share else "drop"


def _elsewhere(row: Row, report: Report) -> str:
    """Mark of a drop on another split than the table's, as of a package in between, which never sees test data."""
    return f" on {row.drop.split}" if row.drop and row.drop.split != _split(report) else ""


def _split(report: Report) -> str:
    return "test" if any(row.test for row in report.rows) else "val"


def _metric_name(report: Report) -> tuple[str, bool]:
    metric = next((m for row in report.rows for m in (row.test, row.val) if m), None)
    return (metric.name, metric.is_share) if metric else ("metric", True)


# -- words ---------------------------------------------------------------------------------------------


def summary(report: Report) -> list[str]:
    """What a reader wants to know first, one sentence each."""
    sentences = []
    first = next(iter(report.packages), None)
    metric = first and (first.test or first.val)
    if first and metric:
        split = "test" if first.test else "val"
        trivial = f"; a trivial predictor gets {trivial_text(metric)}" if metric.trivial is not None else ""
        count = f" on {metric.num_samples:,} {split} samples" if metric.num_samples else f" on {split}"
        sentences.append(f"{first.stage or first.name}: {metric.name} {metric_text(metric)}{count}{trivial}.")
    ran = [row for row in report.artifacts if row.samples_per_s and not row.is_original]
    if ran:
        best = max(ran, key=lambda row: row.samples_per_s or 0)
        sentences.append(_praise(best, first))
    return sentences


def metric_of(found: Evaluation) -> Metric:
    """An evaluation as a report's number, with its interval."""
    from bmctl.core.stats import is_binary, mean_interval

    low, high = mean_interval(found.scores)
    return Metric(found.metric, found.value, low, high, len(found.scores), found.baseline, is_binary(found.scores))


def evaluation_text(metric: Metric, *, split: str, extra: Mapping[str, float]) -> str:
    """``accuracy 89.5 % [88.6, 90.3] on 5,000 test samples, loss 0.31; a trivial predictor gets 10.0 %``."""
    more = "".join(f", {name} {value:.4g}" for name, value in extra.items())
    text = f"{metric.name} {metric_text(metric)} on {metric.num_samples:,} {split} samples"
    return f"{text}{more}; a trivial predictor gets {trivial_text(metric)}"


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
        metric = best.test or best.val
        share = metric is None or metric.is_share
        name = metric.name if metric else "metric"
        words += f"; {name} drops by {drop_text(best.drop, is_share=share)}{' points' if share else ''}"
    return words + "."


HOW_TO_READ = (
    "Brackets hold 95 % intervals: Wilson's for a share of samples; the adjusted Wald interval of matched pairs for a "
    "drop, which compares the same samples with the first package; a bootstrap over interleaved rounds for a speedup, "
    "which compares samples per second with the original on the same runtime. A positive drop is a loss."
)


def to_markdown(report: Report) -> str:
    """The report as a page: what matters first, then tables, then what was not done, then how to read it."""
    lines = [f"# {report.run.rstrip('/').rpartition('/')[2]}", ""]
    lines += [f"- {sentence}" for sentence in summary(report)]
    failed = [result for result in report.gates if not result.passed]
    if report.gates:
        verdict = f"{len(failed)} of {len(report.gates)} gates failed." if failed else "All gates passed."
        lines.append(f"- {verdict}")
    for table in (package_table(report), artifact_table(report), gate_table(report)):
        if table.rows:
            lines += ["", f"## {table.title}", "", *_markdown_table(table)]
    not_run = [f"{text}{f'; there: `{command}`' if command else ''}" for text, command in unrun(report)]
    for title, items in (("Not run", not_run), ("Notes", report.notes)):
        if items:
            lines += ["", f"## {title}", "", *(f"- {item}" for item in items)]
    lines += ["", "## How to read this", "", HOW_TO_READ]
    if report.batch_size:
        machine = ", ".join(f"{key} {value}" for key, value in report.machine.items())
        lines += ["", f"Latency is of one batch of {report.batch_size} samples, taken on: {machine or 'this machine'}."]
    return "\n".join([*lines, "", f"Made by bmctl {report.bmctl}.", ""])


def _markdown_table(table: Table) -> list[str]:
    rules = [":--" if position in table.words else "--:" for position in range(len(table.columns))]
    rows = [table.columns, rules, *table.rows]
    return ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in rows]
