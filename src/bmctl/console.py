"""The only importer of rich: progress, headings, notes, tables and errors.

stdout carries data, everything else goes to stderr. Bars are drawn on a terminal alone; anywhere else, and with
NO_COLOR, CI or TERM=dumb, the same is said in plain lines.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TextIO

from rich.console import Console as Rich
from rich.padding import Padding
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table as Grid
from rich.text import Text

from bmctl.errors import BmctlError, InterruptedRunError, RecipeError
from bmctl.report import page, rows, scoring, wording

if TYPE_CHECKING:
    from bmctl.core.evaluation import Evaluation
    from bmctl.doctor import Check
    from bmctl.report.rows import Report

Part = str | tuple[str, str]
"""A piece of text, or one with its style."""

PLAIN_SECONDS = 5.0
"""At most so often does a loop report where no bar can be drawn."""
PIPE_COLUMNS = 100
NARROW = 60
GAP = "  "
MARKS = {"ok": ("✓", "green"), "warn": ("!", "yellow"), "missing": ("✗", "red")}


def is_live(stream: TextIO | None) -> bool:
    """Whether bars may be drawn and redrawn there."""
    if stream is None or os.environ.get("NO_COLOR") or os.environ.get("CI"):
        return False
    with suppress(ValueError, OSError):  # a closed stream
        return stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb", "unknown")
    return False


def is_ascii(stream: TextIO | None) -> bool:
    """Whether a stream, or the C locale that was asked for, takes no more than ASCII."""
    locale = next((os.environ[k] for k in ("LC_ALL", "LC_CTYPE", "LANG") if os.environ.get(k)), "")
    encoding = (getattr(stream, "encoding", None) or "ascii").lower()
    return locale in ("C", "POSIX") or not encoding.startswith("utf")


class Stream:
    """A stream that outlives its reader: once nobody listens, what is written is dropped."""

    def __init__(self, stream: TextIO | None) -> None:
        self.stream = stream
        self.gone = stream is None
        self.ascii = is_ascii(stream)
        self.encoding = "ascii" if self.ascii else "utf-8"

    def write(self, text: str) -> int:
        if self.stream is not None and not self.gone:
            try:
                self.stream.write(wording.to_ascii(text) if self.ascii else text)
                self.stream.flush()
            except BrokenPipeError:
                self.gone = True  # nobody reads
            except (OSError, ValueError):
                self.gone = True  # closed, or full, which a second flush would not say again: `main` finds it closed
                with suppress(OSError, ValueError):
                    self.stream.close()
        return len(text)

    def flush(self) -> None:
        """`write` has."""

    def isatty(self) -> bool:
        return is_live(self.stream)

    def fileno(self) -> int:
        if self.stream is None:
            raise OSError("no stream")
        return self.stream.fileno()


class Console:
    """One command's voice.

    Args:
        quiet: Only errors and data.
        verbose: Also events that are otherwise kept to the run's metrics.jsonl.
        as_json: stdout carries one JSON document; errors go there as fields as well.
    """

    def __init__(self, *, quiet: bool = False, verbose: bool = False, as_json: bool = False) -> None:
        self.quiet, self.verbose, self.as_json = quiet, verbose, as_json
        self.out, self.err = Stream(sys.stdout), Stream(sys.stderr)
        self.live = is_live(sys.stderr)
        self.rich = _rich(self.err, live=self.live)
        self.bar: Progress | None = None
        self.task = TaskID(0)
        self.said_at: dict[str, float] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.clear()

    # -- data -----------------------------------------------------------------------------------

    def data(self, text: str) -> bool:
        """Write lines to stdout.

        Returns:
            Whether somebody still reads: a loop that only writes may stop when not.
        """
        self.clear()
        self.out.write(text if text.endswith("\n") else text + "\n")
        return not self.out.gone

    def evaluation(self, found: Evaluation, *, split: str) -> None:
        """The metrics of one artifact on one split, on stdout."""
        scores = scoring.evaluated(found)
        if self.as_json:
            metrics = {name: dataclasses.asdict(score) for name, score in scores.items()}
            fields = {"split": split, **metrics[found.name], "metrics": metrics}
            self.data(json.dumps(rows.finite(fields), indent=2))
        elif not self.quiet:
            self.data(page.evaluation_text(scores, split=split))

    def report(self, report: Report) -> None:
        """A report as tables, on stdout."""
        if self.quiet:
            return
        self.clear()
        show = _rich(self.out, live=is_live(sys.stdout))
        for sentence in page.summary(report):
            show.print(_text(sentence))
        for make in (page.package_table, page.artifact_table):
            tables = [make(report, detail=detail) for detail in page.DETAILS]
            _show_table(show, next((table for table in tables if _width(table) <= show.width), tables[-1]))
        _show_table(show, page.gate_table(report))
        for title, lines in (("Not run", page.unrun(report)), ("Notes", [(note, "") for note in report.notes])):
            if lines:
                show.print(_text((f"\n{title}", "bold")))
            for text, command in lines:
                _show_wrapped(show, _text(text))
                if command:
                    show.print(_text(f"    there: {command}"), soft_wrap=True)

    def checks(self, checks: Sequence[Check]) -> None:
        """What `doctor` found, on stdout."""
        show = _rich(self.out, live=is_live(sys.stdout))
        width = max((len(check.name) for check in checks), default=0)
        for check in checks:
            mark, style = MARKS[check.status]
            show.print(_text((f"{mark} ", style), (f"{check.name:<{width}}  ", "bold"), check.value), soft_wrap=True)
            if check.hint:
                show.print(_text((f"  {'':<{width}}  {check.hint}", "dim")), soft_wrap=True)

    # -- everything else -------------------------------------------------------------------------

    def heading(self, name: str, text: str = "") -> None:
        """The start of a stage."""
        self.clear()
        self._say(
            (f"▸ {name}", "bold cyan"), f"  {text}" if text else "", plain=f"{name}: {text or 'starts'}", indent=0
        )

    def note(self, text: str, *, stage: str = "") -> None:
        """Something worth knowing."""
        self._say(("note: ", "yellow"), text, plain=f"{stage}: note: {text}" if stage else f"note: {text}")

    def line(self, text: str, *, stage: str = "") -> None:
        """A result, in one line."""
        self._say(text, plain=f"{stage}: {text}" if stage else text)

    def error(self, error: BaseException, *, debug: bool = False) -> None:
        """What went wrong, where, and what mends it: on stderr, and with `as_json` as fields on stdout too.

        stdout has one document: where a report with the failed gates stands there already, nothing is added.
        """
        self.clear()
        if debug:
            self.err.write(wording.printable("".join(traceback.format_exception(error))))
        known = error if isinstance(error, BmctlError) else _as_known(error)
        if self.as_json and not known.has_document:
            self.data(json.dumps(known.to_dict(), indent=2))
        parts: list[Part] = [("error: ", "bold red"), known.message]
        for problem in known.problems if isinstance(known, RecipeError) else ():
            parts.append("\n  " + str(problem).replace("\n", "\n  "))
        if known.hint:
            parts += ["\n  ", ("hint: ", "bold cyan"), known.hint]
        self._say(*parts, always=True)

    def emit(self, event: Mapping[str, object]) -> None:
        """Show one event of the engine, as far as it is for people; see schema.Emit."""
        show = SHOWN.get(str(event.get("event")))
        if show is not None:
            show(self, event, str(event.get("stage", "")))
        elif self.verbose:
            fields = " ".join(f"{key}={value}" for key, value in event.items() if key != "event")
            self.line(f"{event.get('event')} {fields}")

    def clear(self) -> None:
        """Take the bar away, as before anything else is written."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def progress(self, event: Mapping[str, object]) -> None:
        """Draw or move the bar; where none can be drawn, say a line now and then."""
        if self.quiet:
            return
        if not self.live:
            self._say_now_and_then(event)
            return
        left, right = wording.bar_words(event, width=self.rich.width)
        done = wording.share_done(event) or 0.0
        fields: dict[str, Any] = {"completed": done, "left": wording.printable(left), "right": right}
        if self.bar is None:
            self.bar = _bar(self.rich)
            self.task = self.bar.add_task("", total=1.0, **fields)
            self.bar.start()
        self.bar.update(self.task, refresh=True, **fields)
        if event["event"] == "progress" and done == 1.0:
            self.clear()

    def _say_now_and_then(self, event: Mapping[str, object]) -> None:
        now = time.monotonic()
        about = f"{event.get('stage', '')} {event.get('text', '')}"
        if now - self.said_at.setdefault(about, now) >= PLAIN_SECONDS:
            self.said_at[about] = now
            self.line(wording.step_line(event), stage=str(event.get("stage", "")))

    def _say(self, *parts: Part, plain: str | None = None, always: bool = False, indent: int = 2) -> None:
        if self.quiet and not always:
            return
        if self.live:
            # An error's paths and commands are to be copied: the terminal may break their lines, we do not.
            text = _text(*parts)
            self.rich.print(text, soft_wrap=True) if always else _show_wrapped(self.rich, text, indent=indent)
        else:
            self.err.write(wording.printable(_text(*parts).plain if plain is None else plain).rstrip() + "\n")


def _finish(console: Console, event: Mapping[str, object], stage: str) -> None:
    console.clear()
    console.line(wording.done_line(event), stage=stage)
    if split := wording.split_line(event):
        console.line(split, stage=stage)


def _as_known(error: BaseException) -> BmctlError:
    """What is nobody's fault but ours, or Ctrl-C, in the same form as all errors."""
    if isinstance(error, KeyboardInterrupt):
        return InterruptedRunError("interrupted")
    notes = "".join(f"\n  {note}" for note in getattr(error, "__notes__", ()))
    return BmctlError(
        f"a bug in bmctl: {type(error).__name__}: {error}{notes}",
        hint="please report it with the output of the same command and --debug",
    )


# What the engine's events look like; any other is for metrics.jsonl alone.
SHOWN: Mapping[str, Callable[[Console, Mapping[str, object], str], None]] = {
    "stage": lambda console, event, stage: console.heading(stage, str(event.get("text", ""))),
    "start": lambda console, event, stage: console.heading(stage, wording.start_line(event)),
    "step": lambda console, event, stage: console.progress(event),
    "progress": lambda console, event, stage: console.progress(event),
    "evaluation": lambda console, event, stage: console.line(wording.evaluation_line(event), stage=stage),
    "note": lambda console, event, stage: console.note(str(event.get("text", "")), stage=stage),
    "skip": lambda console, event, stage: console.heading(stage, wording.skip_line(event)),
    "stage_done": lambda console, event, stage: console.line(wording.stage_done_line(event), stage=stage),
    "done": _finish,
}


def _text(*parts: Part) -> Text:
    """Text without markup: brackets and control characters of messages are shown as they are."""
    clean = [wording.printable(p) if isinstance(p, str) else (wording.printable(p[0]), p[1]) for p in parts]
    return Text.assemble(*clean)


def _rich(stream: Stream, *, live: bool) -> Rich:
    width = None if live else int(os.environ["COLUMNS"]) if os.environ.get("COLUMNS", "").isdigit() else PIPE_COLUMNS
    return Rich(
        file=stream,  # type: ignore[arg-type]
        force_terminal=live,
        no_color=not live,
        width=width,
        markup=False,
        highlight=False,
        emoji=False,
    )


def _bar(show: Rich) -> Progress:
    """A bar that is redrawn by events, not by a thread of its own: loader workers fork from this process."""
    columns = [TextColumn("  {task.fields[left]}"), BarColumn(bar_width=None), TextColumn("{task.fields[right]}")]
    for column in columns:
        column.get_table_column().no_wrap = True
    return Progress(*columns, console=show, transient=True, expand=True, auto_refresh=False, redirect_stdout=False)


def _show_wrapped(show: Rich, text: Text, *, indent: int = 2) -> None:
    """Wrapped at words, every line but a long word's indented alike."""
    show.print(Padding(text, (0, 0, 0, min(indent, show.width // 4)), expand=False))


def _width(table: page.Table) -> int:
    """Columns that a table takes with nothing cut."""
    cells = zip(*([cell.split("\n") for cell in row] for row in (table.columns, *table.rows)), strict=True)
    return sum(max(len(line) for cell in column for line in cell) + len(GAP) for column in cells) - len(GAP)


def _show_table(show: Rich, table: page.Table) -> None:
    """Columns, or one block of ``column: cell`` lines per row where they would not be legible."""
    if not table.rows:
        return
    show.print(_text((f"\n{table.title}", "bold")))
    is_prose = len(table.columns) - 1 in table.words  # the last column may wrap
    if _width(table) > show.width and not (is_prose and show.width >= NARROW):
        names = [column.replace("\n", " ") for column in table.columns]
        for first, *others in table.rows:
            show.print(_text((first, "dim")))
            for name, cell in zip(names[1:], others, strict=True):
                _show_wrapped(show, _text(f"{name}: {cell}"))
        return
    grid = Grid(box=None, pad_edge=False, padding=(0, len(GAP), 0, 0), header_style="dim")
    for position, column in enumerate(table.columns):
        is_word, is_last = position in table.words, position == len(table.columns) - 1
        justify: Literal["left", "right"] = "left" if is_word else "right"
        grid.add_column(column, justify=justify, vertical="top", no_wrap=not (is_last and is_prose))
    for row in table.rows:
        grid.add_row(*(_text(cell) for cell in row), style="red" if row[0] == "FAIL" else "")
    show.print(grid)
