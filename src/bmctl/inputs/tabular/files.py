"""Rows to be predicted: those of a table, or one that stands on the command line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bmctl.core.requests import OnBad, Requested, Requests, path_name
from bmctl.core.tables import as_number, as_text, read_rows
from bmctl.errors import DataError
from bmctl.inputs.tabular.rows import encode, unknown
from bmctl.inputs.tabular.spec import CATEGORIES, Spec
from bmctl.schema import Emit

if TYPE_CHECKING:
    from bmctl.inputs import Resolved

MAX_NAMED = 20
Row = tuple[str, dict[str, Any]]


def requests(source: str | Path, *, given: Resolved, batch_size: int, on_bad: OnBad, emit: Emit) -> Requests:
    """See bmctl.inputs.tabular.requests."""
    rows, bad = [], []
    for name, fields in _found(source, given.spec):
        try:
            rows.append((name, _parsed(fields, given.spec, where=name)))
        except DataError as error:
            bad.append(error.message)
    if not rows and not bad:
        raise DataError(f"{source}: there are no rows in it")
    if bad and (on_bad == "refuse" or not rows):
        more = f"; and {len(bad) - MAX_NAMED} more" if len(bad) > MAX_NAMED else ""
        raise DataError("; ".join(bad[:MAX_NAMED]) + more, hint="mend the rows, or leave them out with --on-bad skip")
    if bad:
        emit({"event": "note", "stage": "infer", "text": f"left out: {'; '.join(bad[:MAX_NAMED])}"})
    _tell_unknown(rows, given.spec, emit)
    return Requests(len(rows), _batches(rows, given=given, batch_size=batch_size))


def _found(source: str | Path, spec: Spec) -> Iterator[tuple[str, Mapping[str, str]]]:
    """Each row's name, and its fields as text."""
    wanted = list(spec.names)
    if isinstance(source, str) and source.lstrip().startswith("{"):
        yield "row", _literal(source, wanted)
        return
    path = Path(source)
    if path.is_dir():
        raise DataError(f"{path} is a folder", hint="name a table, or give a row as JSON")
    name = path_name(Path(path.name))
    rows = read_rows(path, wanted=wanted, hint="the table needs the columns that the model was trained with")
    yield from ((f"{name}:{row.line}", row.fields) for row in rows)


def _literal(source: str, wanted: list[str]) -> dict[str, str]:
    try:
        found = json.loads(source)
    except (ValueError, RecursionError) as error:
        raise DataError(f"the row is not JSON ({error})", hint=f'such as {{"{wanted[0]}": ...}}') from error
    missing = [name for name in wanted if name not in found]
    if missing:
        raise DataError(f"the row has no {', no '.join(missing)}", hint=f"it needs {', '.join(wanted)}")
    return {name: as_text(found[name], name=name, where="the row") for name in wanted}


def _parsed(fields: Mapping[str, str], spec: Spec, *, where: str) -> dict[str, Any]:
    """Numbers as float, words as they are.

    Raises:
        DataError: No number where there has to be one.
    """
    row: dict[str, Any] = {one.name: fields[one.name] for one in spec.categories}
    for one in spec.numbers:
        value = as_number(fields[one.name])
        if value is None or (np.isnan(value) and not one.missing):
            text = fields[one.name].strip()
            raise DataError(
                f"{where}: {one.name} is {text[:40]!r}, expected a number"
                if text
                else f"{where}: {one.name} is missing"
            )
        row[one.name] = value
    return row


def _tell_unknown(rows: list[Row], spec: Spec, emit: Emit) -> None:
    columns = {one.name: [fields[one.name] for _, fields in rows] for one in spec.categories}
    for name, words in unknown(columns, spec).items():
        shown = ", ".join(repr(word[:30]) for word in words[:5]) + (", ..." if len(words) > 5 else "")
        emit({"event": "note", "stage": "infer", "text": f"{name}: training never saw {shown}; read as unknown"})


def _batches(rows: list[Row], *, given: Resolved, batch_size: int) -> Iterator[Requested]:
    waiting = iter(rows)
    while batch := list(islice(waiting, batch_size)):
        fields = encode({name: [row[name] for _, row in batch] for name in given.spec.names}, spec=given.spec)
        if CATEGORIES in fields:
            fields[CATEGORIES] = fields[CATEGORIES].astype(np.int64)  # as finished
        yield Requested([name for name, _ in batch], fields)
