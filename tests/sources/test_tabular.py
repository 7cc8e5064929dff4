"""Rows of a table with something to predict."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from bmctl.errors import DataError
from bmctl.sources import tabular
from bmctl.sources.samples import ArraySamples

HEAD = "id,rooms,city,code,price"
ROWS = [f"{i},{i % 7 or ''},{('Bonn', 'Oslo', '')[i % 3]},{10 + i % 4},{100 + i * 3}" for i in range(80)]


def write(path: Path, rows: list[str] = ROWS, *, head: str = HEAD) -> Path:
    path.write_text("\n".join([head, *rows]) + "\n")
    return path


def config(path: Path, **fields: object) -> tabular.Config:
    return tabular.Config.model_validate({"path": str(path), "value": "price", "drop": ["id"], **fields})


def opened(tmp_path: Path, split: str = "train", **fields: object) -> ArraySamples:
    return tabular.open(config(write(tmp_path / "a.csv"), **fields), split=split)


def test_columns_are_numbers_or_words_and_empty_numbers_are_missing(tmp_path: Path) -> None:
    samples = opened(tmp_path)
    assert {name: column.kind for name, column in samples.columns.items()} == {
        "rooms": "real",
        "city": "text",
        "code": "real",
        "value": "real",
    }
    found = samples.read(range(len(samples)))
    assert np.isnan(found["rooms"]).any()
    assert set(found["city"]) == {"Bonn", "Oslo", ""}
    assert found["value"].dtype == np.float32


def test_codes_may_be_categories_and_columns_chosen(tmp_path: Path) -> None:
    columns = opened(tmp_path, categories=["code"], features=["code", "city"]).columns
    assert {name: column.kind for name, column in columns.items()} == {"city": "text", "code": "text", "value": "real"}


def test_the_target_knows_mean_and_deviation_in_every_split(tmp_path: Path) -> None:
    columns = [opened(tmp_path, split).columns["value"] for split in ("train", "val", "test")]
    assert columns[0] == columns[1] == columns[2]
    assert columns[0].mean == pytest.approx(100 + 3 * 39.5)


def test_splits_are_carved_by_row_and_equal_rows_stay_together(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", [*ROWS, *(f"{900 + i},{row.split(',', 1)[1]}" for i, row in enumerate(ROWS))])
    parts = [tabular.open(config(path, val=0.2, test=0.2), split=split) for split in ("train", "val", "test")]
    assert sum(map(len, parts)) == 2 * len(ROWS)
    seen = [set(part.identities(range(len(part)))) for part in parts]
    assert not seen[0] & seen[1]
    assert not seen[0] & seen[2]


def test_classes_in_place_of_a_number(tmp_path: Path) -> None:
    samples = opened(tmp_path, value=None, label="code")
    assert samples.columns["label"].names == ("10", "11", "12", "13")
    assert samples.arrays["label"].dtype == np.int64


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".tsv"])
def test_other_files_say_the_same(tmp_path: Path, suffix: str) -> None:
    header, *lines = [line.split(",") for line in (HEAD, *ROWS)]
    rows = [
        {name: (int(cell) if cell.isdigit() else cell or None) for name, cell in zip(header, line, strict=True)}
        for line in lines
    ]
    path = tmp_path / f"b{suffix}"
    if suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif suffix == ".tsv":
        write(path, [row.replace(",", "\t") for row in ROWS], head=HEAD.replace(",", "\t"))
    else:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert tabular.open(config(path), split="val").fingerprint == opened(tmp_path, "val").fingerprint


@pytest.mark.parametrize(
    ("rows", "fields", "said"),
    [
        ([], {}, "no rows in it"),
        (["1,2,Bonn,3,"], {}, "line 2: price, which is to be predicted, is missing"),
        (["1,2,Bonn,3,dear"], {}, "line 2: price, which is to be predicted, is 'dear', expected a number"),
        (["1,2,Bonn,3,inf"], {}, "is 'inf', expected a number"),
        (["1,2,Bonn,3,5"] * 3, {}, "price is 5.0 in every row"),
        (ROWS, {"value": "cost"}, "no column cost; its columns are id, rooms, city, code, price"),
        (ROWS, {"drop": ["id", "rooms", "city", "code"]}, "no column is left to predict from"),
        (["1,2,Bonn"], {}, "expected 5 fields"),
        (ROWS, {"value": None, "label": "city", "class_names": ["Bonn", "Oslo"]}, "the class is missing"),
        (ROWS, {"value": None, "label": "code", "class_names": ["10", "11"]}, "the class '12' is not one of"),
    ],
)
def test_bad_tables_are_refused(tmp_path: Path, rows: list[str], fields: dict, said: str) -> None:
    with pytest.raises(DataError, match=said):
        tabular.open(config(write(tmp_path / "a.csv", rows), **fields), split="train")


def test_words_among_the_numbers_of_a_test_file(tmp_path: Path) -> None:
    test = write(tmp_path / "test.csv", ["1,many,Bonn,3,4"])
    with pytest.raises(DataError, match=r"test\.csv, line 2: rooms is 'many'; in training it is a number"):
        opened(tmp_path, test_path=str(test))


def test_a_feature_called_like_the_target(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", head="id,value,city,code,price")
    with pytest.raises(DataError, match="the feature 'value' has the name that what is predicted goes by"):
        tabular.open(config(path), split="train")


@pytest.mark.parametrize("fields", [{"value": None}, {"label": "city"}])
def test_there_is_one_target(tmp_path: Path, fields: dict) -> None:
    with pytest.raises(ValidationError, match="either label"):
        config(tmp_path / "a.csv", **fields)


def test_rows_are_told_apart_by_where_their_words_end(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", ["1,23,5", "12,3,5", "1,23,5", "4,5,6"], head="user,item,price")
    fields = {"drop": [], "categories": ["user", "item"], "val": 0.01, "test": 0.01}
    parts = [tabular.open(config(path, **fields), split=split) for split in ("train", "val", "test")]
    found = [one for part in parts for one in part.identities(range(len(part)))]
    assert len(found) == 4
    assert len(set(found)) == 3
