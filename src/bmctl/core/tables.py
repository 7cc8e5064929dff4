"""Rows of text files with columns: CSV, TSV and JSONL, gzipped or not, in UTF-8; whatever is wrong is told by line."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from bmctl.errors import DataError

DELIMITERS = {".csv": ",", ".tsv": "\t", ".tab": "\t"}
JSON_LINES = (".jsonl", ".ndjson")
SUFFIXES = (*DELIMITERS, *JSON_LINES)
_MOST_FIELD = 2**31 - 1


class Line(NamedTuple):
    """Attributes:
    line: Number of the line on which it ends, from 1.
    fields: Text by column.
    """

    line: int
    fields: dict[str, str]


def table_suffix(path: Path) -> str:
    """``.csv`` of ``a.CSV.gz``."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def read_rows(
    path: Path, *, wanted: Sequence[str], names: Sequence[str] | None = None, skip: int = 0, hint: str
) -> Iterator[Line]:
    """Rows in the order in which they stand.

    A .tsv or .tab knows no quotes; in a .csv fields may be quoted, with newlines inside. Empty lines at the end pass.

    Args:
        path: One of SUFFIXES, or that and .gz.
        wanted: Columns that there must be.
        names: Of the columns, where the first line does not say them; not for JSON.
        skip: Lines to pass over first.
        hint: What to do where a column is missing.

    Raises:
        DataError: Not there, damaged, not UTF-8, without a wanted column, or with a row of other columns.
    """
    suffix = table_suffix(path)
    if suffix not in SUFFIXES:
        raise DataError(f"{path}: expected {', '.join(SUFFIXES)}, or one of these and .gz", hint="rename the file")
    with _opened(path) as file:
        for _ in range(skip):
            file.readline()
        if suffix in JSON_LINES:
            yield from _json_rows(file, path=path, wanted=wanted, skip=skip)
        else:
            quoting: Any = csv.QUOTE_MINIMAL if suffix == ".csv" else csv.QUOTE_NONE
            reader = csv.reader(file, delimiter=DELIMITERS[suffix], quoting=quoting, strict=True)
            yield from _csv_rows(reader, path=path, wanted=wanted, names=names, skip=skip, hint=hint)


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number, from 1, and text of each line, without its end.

    Raises:
        DataError: Not there, damaged, or not UTF-8.
    """
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            _check_nul(line, where=f"{path}, line {number}")
            yield number, line.rstrip("\r\n")


def _csv_rows(
    reader: Any, *, path: Path, wanted: Sequence[str], names: Sequence[str] | None, skip: int, hint: str
) -> Iterator[Line]:
    columns = list(names) if names is not None else next(reader, [])
    missing = [name for name in wanted if name not in columns]
    if missing:
        raise DataError(
            f"{path}: no column {' and '.join(missing)}; its columns are {', '.join(columns) or 'none'}", hint=hint
        )
    twice = sorted({name for name in columns if columns.count(name) > 1 and name in wanted})
    if twice:
        raise DataError(f"{path}: there are two columns {twice[0]}", hint="rename one of them")
    for fields in reader:
        where = f"{path}, line {skip + reader.line_num}"
        if not fields:
            continue
        if len(fields) != len(columns):
            raise DataError(
                f"{where}: expected {len(columns)} fields ({', '.join(columns)}), found {len(fields)}",
                hint='quote fields with commas or newlines in them: "a, b"' if len(fields) > len(columns) else "",
            )
        for each in fields:
            _check_nul(each, where=where)
        yield Line(skip + reader.line_num, dict(zip(columns, fields, strict=True)))


def _json_rows(file: TextIO, *, path: Path, wanted: Sequence[str], skip: int) -> Iterator[Line]:
    for number, line in enumerate(file, skip + 1):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not JSON ({error})", hint="one object on each line") from error
        if not isinstance(found, dict):
            raise DataError(f"{where}: expected an object", hint='such as {"text": "...", "label": "..."}')
        missing = [name for name in wanted if name not in found]
        if missing:
            raise DataError(
                f"{where}: no {' and no '.join(missing)}; there is {', '.join(found) or 'nothing'}",
                hint="--set data.source.text=NAME, data.source.label=NAME",
            )
        fields = {name: _text(value, name=name, where=where) for name, value in found.items() if name in wanted}
        yield Line(number, fields)


def _text(value: Any, *, name: str, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise DataError(f"{where}: {name} is {json.dumps(value)[:40]}, expected a text", hint="see the line")
    _check_nul(str(value), where=where)
    try:
        str(value).encode()
    except UnicodeEncodeError as error:  # JSON may hold half of a character
        raise DataError(f"{where}: {name} is no text ({error.reason})", hint="see the line") from error
    return str(value)


def _check_nul(text: str, *, where: str) -> None:
    if "\0" in text:
        raise DataError(f"{where}: a NUL byte in the text", hint="is it a binary file, or UTF-16? save it as UTF-8")


def _kind(path: Path) -> str:
    suffix = table_suffix(path)
    return "CSV file" if suffix in DELIMITERS else "JSONL file" if suffix in JSON_LINES else "text file"


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    """A file for reading, without the mark that spreadsheets put in front; its errors in our words."""
    if not path.is_file():
        raise DataError(f"there is no file {path}", hint="check the path; it is relative to where bmctl is started")
    before = csv.field_size_limit(_MOST_FIELD)
    try:
        # newline="" leaves quoted newlines alone.
        with (
            gzip.open(path, "rt", encoding="utf-8-sig", newline="")
            if path.suffix.lower() == ".gz"
            else path.open(encoding="utf-8-sig", newline="")
        ) as file:
            yield file
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: damaged or cut off ({error})", hint="fetch the file again") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})", hint="check its permissions") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not a {_kind(path)} in UTF-8 ({error})", hint="save it as UTF-8") from error
    except csv.Error as error:
        raise DataError(f"{path}: not a CSV file in UTF-8 ({error})", hint="save it as CSV, UTF-8") from error
    finally:
        csv.field_size_limit(before)
