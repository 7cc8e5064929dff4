"""Rows of CSV, TSV and JSONL files; everything that is wrong with one is told by line."""

from __future__ import annotations

import csv
import gzip
from pathlib import Path

import pytest

from bmctl.core.tables import read_lines, read_rows, table_suffix
from bmctl.errors import DataError

HINT = "name the columns"


def rows(path: Path, **options: object) -> list[tuple[int, dict[str, str]]]:
    return [tuple(row) for row in read_rows(path, wanted=("text", "label"), hint=HINT, **options)]


def write(path: Path, content: str | bytes) -> Path:
    body = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(body) if path.suffix == ".gz" else body)
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", 'text,label\n"a, ""b""\nc",x\nd,y\n'),
        ("a.CSV.gz", 'text,label\r\n"a, ""b""\nc",x\r\n\r\nd,y\r\n'),
        ("a.csv", '\ufefftext,label\n"a, ""b""\nc",x\nd,y'),
        ("a.jsonl", '{"text": "a, \\"b\\"\\nc", "label": "x"}\n\n{"label": "y", "text": "d", "n": 1}\n'),
        ("a.ndjson.gz", '\ufeff{"text": "a, \\"b\\"\\nc", "label": "x"}\n{"label": "y", "text": "d"}'),
    ],
)
def test_quotes_newlines_marks_and_gzip(tmp_path: Path, name: str, content: str) -> None:
    found = rows(write(tmp_path / name, content))
    assert [(fields["text"], fields["label"]) for _, fields in found] == [('a, "b"\nc', "x"), ("d", "y")]


def test_a_tsv_knows_no_quotes(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", 'text\tlabel\n"a, "b\tx\n')
    assert rows(path) == [(2, {"text": '"a, "b', "label": "x"})]


def test_lines_in_front_are_passed_over_and_columns_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tab.gz", "Category\tText\nd\tstring\nclass\t\nx\ta\ny\tb\n")
    found = rows(path, names=("label", "text"), skip=3)
    assert found == [(4, {"label": "x", "text": "a"}), (5, {"label": "y", "text": "b"})]


def test_fields_may_be_long_and_the_limit_of_others_stays(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    path = write(tmp_path / "a.csv", f"text,label\n{'a' * 300_000},x\n")
    assert len(rows(path)[0][1]["text"]) == 300_000
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", "body,label\na,x\n", "no column text; its columns are body, label"),
        ("a.csv", "", "no column text and label; its columns are none"),
        ("a.csv", "text,label,text\na,x,b\n", "there are two columns text"),
        ("a.csv", "text,label\na,x\na, b,y\n", r"line 3: expected 2 fields \(text, label\), found 3"),
        ("a.csv", 'text,label\n"a,x\n', "not a CSV file in UTF-8"),
        ("a.csv", b"text,label\n\xe9,x\n", "not a CSV file in UTF-8"),
        ("a.csv", "text,label\na,x\n".encode("utf-16"), "not a CSV file in UTF-8"),
        ("a.tsv", "text\tlabel\na\0b\tx\n", "line 2: a NUL byte"),
        ("a.jsonl", '{"text": "a", "label": "x"}\n{"text": "b"}\n', "line 2: no label; there is text"),
        ("a.jsonl", '{"text": "a", "label": "x"}\n{', "line 2: not JSON"),
        ("a.jsonl", "[1]\n", "line 1: expected an object"),
        ("a.jsonl", '{"text": ["a"], "label": "x"}\n', r"line 1: text is \[\"a\"\], expected a text"),
        ("a.jsonl", '{"text": "\\ud800", "label": "x"}\n', "line 1: text is no text"),
        ("a.jsonl", '{"text": "\\u0000", "label": "x"}\n', "line 1: a NUL byte"),
        ("a.parquet", "PAR1", "not a Parquet file"),
        ("a.xlsx", "PK", r"expected \.csv, \.tsv"),
    ],
)
def test_bad_tables_are_refused(tmp_path: Path, name: str, content: str | bytes, said: str) -> None:
    with pytest.raises(DataError, match=said):
        rows(write(tmp_path / name, content))


def test_damaged_archives_and_missing_files_are_refused(tmp_path: Path) -> None:
    whole = gzip.compress(b"text,label\n" + b"".join(b"%d,x\n" % index for index in range(9999)))
    for body in (whole[: len(whole) // 2], b"text,label\na,x\n", whole[:50] + b"\0" * 50 + whole[100:]):
        (tmp_path / "a.csv.gz").write_bytes(body)
        with pytest.raises(DataError, match="damaged or cut off"):
            rows(tmp_path / "a.csv.gz")
    with pytest.raises(DataError, match="there is no file"):
        rows(tmp_path / "b.csv")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(DataError, match="there is no file"):
        rows(tmp_path / "folder.csv")


def test_lines_of_a_text_file(tmp_path: Path) -> None:
    assert list(read_lines(write(tmp_path / "a.txt", "\ufeffa, b\r\n\nc"))) == [(1, "a, b"), (2, ""), (3, "c")]
    with pytest.raises(DataError, match="not a text file in UTF-8"):
        list(read_lines(write(tmp_path / "b.txt", b"\xff\xfea\0")))


def test_suffixes() -> None:
    assert [table_suffix(Path(name)) for name in ("a.CSV.gz", "a.b.tsv", "a.gz", "a")] == [".csv", ".tsv", "", ""]
