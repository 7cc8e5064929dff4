"""Rows of files with columns: CSV, TSV and JSONL, gzipped or not, in UTF-8, and Parquet; what is wrong is told by line.

Every field comes as text, whatever the file is, so that all of them are read alike: what is missing is the empty text.
"""

from __future__ import annotations

import csv
import gzip
import json
import math
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from bmctl.errors import DataError, DependencyError

DELIMITERS = {".csv": ",", ".tsv": "\t", ".tab": "\t", ".inter": "\t"}
JSON_LINES = (".jsonl", ".ndjson")
PARQUET = ".parquet"
SUFFIXES = (*DELIMITERS, *JSON_LINES, PARQUET)
MISSING = frozenset(("", "na", "n/a", "nan", "null", "none", "?"))
"""Small letters of what stands for a number that is not there."""
_MOST_FIELD = 2**31 - 1


class Line(NamedTuple):
    """Attributes:
    line: Number of the line on which it ends, or of the row in a Parquet file, from 1.
    fields: Text by column.
    """

    line: int
    fields: dict[str, str]


def table_suffix(path: Path) -> str:
    """``.csv`` of ``a.CSV.gz``."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def read_rows(
    path: Path, *, wanted: Sequence[str] | None, names: Sequence[str] | None = None, skip: int = 0, hint: str
) -> Iterator[Line]:
    """Rows in the order in which they stand.

    A .tsv or .tab knows no quotes; in a .csv fields may be quoted, with newlines inside. Empty lines at the end pass.

    Args:
        path: One of SUFFIXES, or that and .gz.
        wanted: Columns that there must be; None takes those of the header, or of the first object.
        names: Of the columns, where the first line does not say them; not for JSON.
        skip: Lines to pass over first.
        hint: What to do where a column is missing.

    Raises:
        DataError: Not there, damaged, not UTF-8, without a wanted column, or with a row of other columns.
        DependencyError: Parquet is not read here.
    """
    suffix = table_suffix(path)
    if suffix not in SUFFIXES:
        raise DataError(f"{path}: expected {', '.join(SUFFIXES)}, or one of these and .gz", hint="rename the file")
    if suffix == PARQUET:
        yield from _parquet_rows(path, wanted=wanted, skip=skip, hint=hint)
        return
    with _opened(path) as file:
        for _ in range(skip):
            file.readline()
        if suffix in JSON_LINES:
            yield from _json_rows(file, path=path, wanted=wanted, skip=skip, hint=hint)
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


def read_text(path: Path) -> str:
    """All of a file as it is, line ends and all; gzipped where it is called .gz.

    Raises:
        DataError: Not there, damaged, binary, or not UTF-8.
    """
    with _opened(path, encoding="utf-8") as file:
        text = file.read()
    _check_nul(text, where=str(path))
    return text


def _csv_rows(
    reader: Any, *, path: Path, wanted: Sequence[str] | None, names: Sequence[str] | None, skip: int, hint: str
) -> Iterator[Line]:
    columns = list(names) if names is not None else next(reader, [])
    wanted = columns if wanted is None else wanted
    _check_there(wanted, columns, path=path, hint=hint)
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


def _check_there(wanted: Sequence[str], columns: Sequence[str], *, path: Path, hint: str) -> None:
    missing = [name for name in wanted if name not in columns]
    if missing:
        raise DataError(
            f"{path}: no column {' and '.join(missing)}; its columns are {', '.join(columns) or 'none'}", hint=hint
        )


def _parquet_rows(path: Path, *, wanted: Sequence[str] | None, skip: int, hint: str) -> Iterator[Line]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DependencyError(f"{path}: Parquet needs pyarrow", hint="pip install 'bmctl[parquet]'") from error
    if not path.is_file():
        raise DataError(f"there is no file {path}", hint="check the path; it is relative to where bmctl is started")
    try:
        with parquet.ParquetFile(path) as file:
            wanted = file.schema_arrow.names if wanted is None else wanted
            _check_there(wanted, file.schema_arrow.names, path=path, hint=hint)
            number = 0
            for batch in file.iter_batches(columns=list(wanted)):
                for row in batch.to_pylist():
                    number += 1
                    where = f"{path}, row {number}"
                    if number > skip:
                        yield Line(number, {name: as_text(row[name], name=name, where=where) for name in wanted})
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a Parquet file ({error})", hint="fetch the file again") from error


def _json_rows(file: TextIO, *, path: Path, wanted: Sequence[str] | None, skip: int, hint: str) -> Iterator[Line]:
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
        wanted = list(found) if wanted is None else wanted
        missing = [name for name in wanted if name not in found]
        if missing:
            raise DataError(
                f"{where}: no {' and no '.join(missing)}; there is {', '.join(found) or 'nothing'}", hint=hint
            )
        yield Line(number, {name: as_text(found[name], name=name, where=where) for name in wanted})


def as_text(value: Any, *, name: str, where: str) -> str:
    """A value of JSON or Parquet as a CSV file would hold it: nothing is the empty text, numbers come back exactly.

    Raises:
        DataError: A list, an object, bytes, or what is no text.
    """
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | dict | bytes):
        raise DataError(
            f"{where}: {name} is {json.dumps(value, default=str)[:40]}, expected a text or a number",
            hint="see the line",
        )
    text = str(value)
    _check_nul(text, where=where)
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON may hold half of a character
        raise DataError(f"{where}: {name} is no text ({error.reason})", hint="see the line") from error
    return text


def as_number(text: str) -> float | None:
    """A finite number, nan where it is missing, None where it is neither."""
    text = text.strip()
    if text.lower() in MISSING:
        return math.nan
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and "_" not in text else None


def _check_nul(text: str, *, where: str) -> None:
    if "\0" in text:
        raise DataError(f"{where}: a NUL byte in the text", hint="is it a binary file, or UTF-16? save it as UTF-8")


def _kind(path: Path) -> str:
    suffix = table_suffix(path)
    return "CSV file" if suffix in DELIMITERS else "JSONL file" if suffix in JSON_LINES else "text file"


@contextmanager
def _opened(path: Path, *, encoding: str = "utf-8-sig") -> Iterator[TextIO]:
    """A file for reading, without the mark that spreadsheets put in front; its errors in our words."""
    if not path.is_file():
        raise DataError(f"there is no file {path}", hint="check the path; it is relative to where bmctl is started")
    before = csv.field_size_limit(_MOST_FIELD)
    try:
        # newline="" leaves quoted newlines alone.
        with (
            gzip.open(path, "rt", encoding=encoding, newline="")
            if path.suffix.lower() == ".gz"
            else path.open(encoding=encoding, newline="")
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
