"""Texts with a label in a table."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from bmctl.errors import DataError
from bmctl.sources import table

ROWS = [(f"text number {index}", "abc"[index % 3]) for index in range(60)]


def write(path: Path, rows: list[tuple[str, str]] = ROWS, *, head: str = "text\tlabel\n") -> Path:
    body = (head + "".join(f"{text}\t{label}\n" for text, label in rows)).encode()
    path.write_bytes(gzip.compress(body) if path.suffix == ".gz" else body)
    return path


def config(path: Path, **fields: object) -> table.Config:
    return table.Config.model_validate({"path": str(path), **fields})


def texts(config: table.Config, split: str) -> list[tuple[str, str]]:
    samples = table.open(config, split=split)
    names = samples.columns["label"].names
    found = samples.read(range(len(samples)))
    return [(text, names[label]) for text, label in zip(found["text"], found["label"], strict=True)]


def test_a_table_is_carved_without_overlap(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv")
    parts = [texts(config(path, val=0.2, test=0.2), split) for split in ("train", "val", "test")]
    assert sorted(row for part in parts for row in part) == sorted(ROWS)
    assert [len(part) for part in parts] == [36, 12, 12]
    assert texts(config(path, val=0.2, test=0.2, seed=1), "val") != parts[1]


def test_a_new_row_moves_no_other(tmp_path: Path) -> None:
    before = set(texts(config(write(tmp_path / "a.tsv"), val=0.2), "val"))
    after = set(texts(config(write(tmp_path / "a.tsv", [("another one", "a"), *ROWS]), val=0.2), "val"))
    assert len(before - after) <= 1


def test_a_file_for_each_split_as_in_r8(tmp_path: Path) -> None:
    head = "Category\tText\nd\tstring\nclass\t\n"
    swapped = [(label, text) for text, label in ROWS]
    fields = {"skip": 3, "columns": ["label", "text"], "test_path": str(tmp_path / "test.tab.gz")}
    write(tmp_path / "test.tab.gz", swapped[:9], head=head)
    found = config(write(tmp_path / "train.tab.gz", swapped[9:], head=head), **fields)
    assert texts(found, "test") == ROWS[:9]
    assert sorted(texts(found, "train") + texts(found, "val")) == sorted(ROWS[9:])


def test_named_columns_and_classes(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", head="body\ttopic\n")
    found = table.open(config(path, text="body", label="topic", class_names=["c", "b", "a"]), split="train")
    assert found.columns["label"].names == ("c", "b", "a")
    assert found.columns["text"].kind == "text"


def test_the_fingerprint_follows_texts_and_labels(tmp_path: Path) -> None:
    others = {f"{name}_path": str(write(tmp_path / f"{name}.tsv", ROWS[:3])) for name in ("val", "test")}

    def fingerprint(rows: list[tuple[str, str]], name: str) -> str:
        return table.open(config(write(tmp_path / name, rows), **others), split="train").fingerprint

    assert fingerprint(ROWS, "a.tsv") == fingerprint(ROWS, "b.tsv")
    changed = [("other", "a"), *ROWS[1:]], [(ROWS[0][0], "b"), *ROWS[1:]], [("text", "a"), ("number 0", "a"), *ROWS[1:]]
    assert len({fingerprint(rows, "a.tsv") for rows in (ROWS, *changed)}) == 4


@pytest.mark.parametrize(
    ("rows", "fields", "said"),
    [
        ([("", "a"), *ROWS], {}, "line 2: the text is empty"),
        ([*ROWS, ("  ", "a")], {}, "line 62: the text is empty"),
        ([("one", " "), *ROWS], {}, "line 2: the label is missing"),
        (ROWS, {"class_names": ["a", "b"]}, r"line 4: label 'c' is not one of data\.source\.class_names"),
        (ROWS, {"class_names": ["a", "b", "c", "d"]}, "no training texts of the class 'd'"),
        ([("one", "a"), ("two", "a")], {}, "all texts are of one class, 'a'"),
        ([], {}, "no texts in it"),
        (ROWS, {"label": "topic"}, "no column topic; its columns are text, label"),
    ],
)
def test_bad_tables_are_refused(tmp_path: Path, rows: list, fields: dict, said: str) -> None:
    with pytest.raises(DataError, match=said):
        table.open(config(write(tmp_path / "a.tsv", rows), **fields), split="train")


def test_a_label_of_the_test_file_alone_is_refused(tmp_path: Path) -> None:
    test = write(tmp_path / "test.tsv", [("one", "d")])
    with pytest.raises(DataError, match=r"test\.tsv, line 2: label 'd' is not one of the labels of the training file"):
        table.open(config(write(tmp_path / "a.tsv"), test_path=str(test)), split="train")
