"""CSV lists of images, as people and spreadsheets write them."""

from __future__ import annotations

from pathlib import Path

import pytest

from bmctl.errors import DataError
from bmctl.sources import csv

from .conftest import SaveImages


def config(path: Path, **fields: object) -> csv.Config:
    return csv.Config.model_validate({"kind": "csv", "path": str(path), **fields})


@pytest.fixture
def images(tmp_path: Path, save_images: SaveImages) -> list[str]:
    return [f"img/{path.name}" for path in save_images(tmp_path / "img", 20)]


def write(tmp_path: Path, lines: list[str], *, encoding: str = "utf-8", head: str = "path,label") -> Path:
    path = tmp_path / "list.csv"
    path.write_bytes("\r\n".join([head, *lines, ""]).encode(encoding))
    return path


def rows(images: list[str]) -> list[str]:
    return [f"{path},{'ab'[index % 2]}" for index, path in enumerate(images)]


def test_a_list_is_carved_without_overlap(tmp_path: Path, images: list[str]) -> None:
    path = write(tmp_path, rows(images))
    parts = [csv.open(config(path), split=split) for split in csv.SPLITS]
    assert [len(part) for part in parts] == [16, 2, 2]
    assert len({each for part in parts for each in part.paths}) == 20
    assert parts[0].columns["label"].names == ("a", "b")
    assert parts[0].read([0])["picture"][0].size == (6, 6)


def test_a_split_column_is_followed(tmp_path: Path, images: list[str]) -> None:
    splits = ["train"] * 14 + ["val"] * 4 + ["test"] * 2
    lines = [f"{row},{split},ignored" for row, split in zip(rows(images), splits, strict=True)]
    path = write(tmp_path, lines, head="path,label,split,remark")
    assert [len(csv.open(config(path), split=split)) for split in csv.SPLITS] == [14, 4, 2]


def test_a_mark_in_front_and_quoted_newlines(tmp_path: Path, images: list[str]) -> None:
    odd = tmp_path / "img" / "two\nlines.png"
    (tmp_path / images[0]).rename(odd)
    lines = ['"img/two\nlines.png","a, or not"', *rows(images)[1:]]
    path = write(tmp_path, lines, encoding="utf-8-sig", head='"path","label"')
    samples = csv.open(config(path, val=0.01, test=0.01), split="train")
    assert samples.columns["label"].names == ("a", "a, or not", "b")
    assert odd in samples.paths


def test_whole_numbers_are_sorted_by_value(tmp_path: Path, images: list[str]) -> None:
    path = write(tmp_path, [f"{name},{10 - index % 4}" for index, name in enumerate(images)])
    assert csv.open(config(path), split="train").columns["label"].names == ("7", "8", "9", "10")


def test_named_classes_keep_their_order(tmp_path: Path, images: list[str]) -> None:
    path = write(tmp_path, rows(images))
    assert csv.open(config(path, class_names=["b", "a"]), split="train").columns["label"].names == ("b", "a")
    with pytest.raises(DataError, match="line 3: label 'b' is not one of"):
        csv.open(config(path, class_names=["a", "c"]), split="train")


BAD = {
    "no column label; its columns are path, class": ("path,class", ["{0},a"]),
    "no rows": ("path,label", []),
    "line 2: the label is missing": ("path,label", ["{0},"]),
    "line 2: expected 2 fields": ("path,label", ["{0}"]),
    "line 3: expected 2 fields": ("path,label", ["{0},a", "{1},b,c"]),
    "line 2: split 'dev', expected train, val or test": ("path,label,split", ["{0},a,dev"]),
    r"line 2: '.*gone\.png' cannot be read \(No such file": ("path,label", ["img/gone.png,a"]),
    "line 2: '.*img' is not a regular file": ("path,label", ["img,a"]),
    r"line 4: 'img/\./0\.png' stands in line 2 already": (
        "path,label,split",
        ["{0},a,train", "{1},b,train", "img/./0.png,a,val"],
    ),
    "all images are of one class, 'a'": ("path,label", ["{0},a", "{1},a"]),
    "no column path and label; its columns are none": ("", []),
    "not a CSV file in UTF-8": ("path,label", ['"{0},a']),
}


@pytest.mark.parametrize("said", BAD)
def test_bad_lists_are_refused(tmp_path: Path, images: list[str], said: str) -> None:
    head, lines = BAD[said]
    path = write(tmp_path, [line.format(*images) for line in lines], head=head)
    with pytest.raises(DataError, match=said):
        csv.open(config(path), split="train")


def test_other_encodings_and_missing_lists_are_refused(tmp_path: Path, images: list[str]) -> None:
    path = write(tmp_path, ["img/é.png,a"], encoding="latin-1")
    with pytest.raises(DataError, match="not a CSV file in UTF-8"):
        csv.open(config(path), split="train")
    with pytest.raises(DataError, match="is not a file"):
        csv.open(config(tmp_path / "gone.csv"), split="train")
    path.write_bytes(b"path,label\nimg/\0.png,a\n")
    with pytest.raises(DataError):
        csv.open(config(path), split="train")
