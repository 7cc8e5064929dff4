"""Records that are read in order: CSV rows of pixels and JSON lines, zipped or not."""

from __future__ import annotations

import base64
import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest

from bmctl.errors import DataError
from bmctl.sources import stream
from bmctl.sources.shards import SPLITS

from .conftest import png, write_lines

RNG = np.random.default_rng(0)
ROWS = RNG.integers(0, 256, (20, 12), np.uint8)


def config(path: Path | str, **fields: object) -> stream.Config:
    return stream.Config.model_validate({"kind": "stream", "path": str(path), **fields})


def write_csv(path: Path, rows: np.ndarray = ROWS, *, last: bool = False, heading: str = "") -> Path:
    lines = [heading] if heading else []
    for index, row in enumerate(rows.tolist()):
        fields = [*row, index % 2] if last else [index % 2, *row]
        lines.append(",".join(map(str, fields)))
    body = "\n".join([*lines, ""]).encode()
    path.write_bytes(gzip.compress(body) if path.suffix == ".gz" else body)
    return path


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("heading", ["", "label" + ",pixel" * 12])
def test_rows_of_pixels(tmp_path: Path, name: str, last: bool, heading: str) -> None:
    path = write_csv(tmp_path / name, last=last, heading=heading)
    label = "last" if last else "first"
    parts = [stream.open(config(path, shape=[4, 3], label=label), split=split) for split in SPLITS]
    assert [len(part) for part in parts] == [16, 2, 2]
    for part in parts:
        rows = part.lines - bool(heading)
        assert np.array_equal(part.labels, rows % 2)
        assert np.array_equal(np.stack(part.read(range(len(rows)))["picture"]), ROWS[rows].reshape(-1, 4, 3))
    assert len({line for part in parts for line in part.lines.tolist()}) == 20


def test_colour_is_last(tmp_path: Path) -> None:
    found = stream.open(config(write_csv(tmp_path / "a.csv"), shape=[2, 2, 3]), split="train")
    assert np.array_equal(found.read([3])["picture"][0], ROWS[found.lines[3]].reshape(2, 2, 3))


def test_lines_of_json_in_several_files(tmp_path: Path) -> None:
    for part in range(3):
        write_lines(tmp_path / f"{part}.jsonl.gz", count=10, first=10 * part)
    found = stream.open(config(tmp_path / "{0..2}.jsonl.gz", val=0.05, test=0.05), split="train")
    assert found.columns["label"].names == ("0", "1", "2")
    order = RNG.permutation(len(found))
    for index, image in zip(order, found.pictures(order), strict=True):
        number = int(found.parts[index]) * 10 + int(found.lines[index])
        assert found.labels[index] == number % 3
        assert np.array_equal(np.asarray(image), np.random.default_rng(number).integers(0, 256, (6, 6), np.uint8))


def test_any_order_can_be_had_and_repeats_too(tmp_path: Path) -> None:
    found = stream.open(config(write_csv(tmp_path / "a.csv.gz"), shape=[4, 3]), split="train")
    wanted = [9, 2, 2, 15, 0, 9, 2]
    assert np.array_equal(np.stack(found.read(wanted)["picture"]), ROWS[found.lines[wanted]].reshape(-1, 4, 3))
    assert list(found.read([])["picture"]) == []


def test_files_are_read_no_further_than_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = stream.open(config(write_csv(tmp_path / "a.csv.gz"), shape=[4, 3]), split="train")
    asked = []
    whole = stream._next_line
    monkeypatch.setattr(
        stream, "_next_line", lambda file, **given: asked.append(given["number"]) or whole(file, **given)
    )
    pictures = found.pictures([3, 0, 10])
    next(pictures)
    assert len(asked) == found.lines[3] + 1
    list(pictures)
    assert len(asked) == found.lines[10] + 1


def test_what_is_not_asked_for_is_not_decoded(tmp_path: Path) -> None:
    """A loader process of many decodes its own records only."""
    path = write_csv(tmp_path / "a.csv")
    lines = path.read_text().splitlines()
    lines[7] = lines[7].replace(",", ",x", 1)
    path.write_text("\n".join(lines))
    found = stream.open(config(path, shape=[4, 3], val=0.01, test=0.01), split="train")
    bad = found.lines.tolist().index(7)
    assert len(found.read([each for each in range(len(found)) if each != bad])["picture"]) == len(found) - 1
    with pytest.raises(DataError, match=r"a\.csv, line 8: pixels must be whole numbers from 0 to 255"):
        found.read([bad])


def test_splits_have_files_of_their_own(tmp_path: Path) -> None:
    for name, count in (("train", 9), ("val", 4), ("test", 3)):
        write_lines(tmp_path / f"{name}.jsonl.gz", count=count)
    own = config(
        tmp_path / "train.jsonl.gz",
        val_path=str(tmp_path / "val.jsonl.gz"),
        test_path=str(tmp_path / "test.jsonl.gz"),
        class_names=["x", "y", "z"],
    )
    assert [len(stream.open(own, split=split)) for split in SPLITS] == [9, 4, 3]
    assert stream.open(own, split="val").columns["label"].names == ("x", "y", "z")


def test_fingerprints_follow_the_contents_and_not_the_clock(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv")

    def fingerprint(**fields: object) -> str:
        return stream.open(config(path, shape=[4, 3], **fields), split="train").fingerprint

    before = fingerprint()
    os.utime(path, (1, 1))
    assert fingerprint() == before
    assert fingerprint(window=9) != before
    rows = ROWS.copy()
    rows[:, 5] ^= 1
    write_csv(path, rows)
    assert fingerprint() != before


def test_a_file_that_changes_under_the_reader(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv")
    found = stream.open(config(path, shape=[4, 3]), split="train")
    write_csv(path, ROWS[:5])
    with pytest.raises(DataError, match="has changed since its index was read"):
        found.read([0])


GOOD = "\n".join(f"{index % 2}" + ",7" * 12 for index in range(6))
JSON = json.dumps({"image": base64.b64encode(png(0)).decode(), "label": 0})
BAD: dict[str, tuple[str, bytes, str]] = {
    "short": ("a.csv", f"{GOOD}\n1,2,3".encode(), r"a\.csv, line 7: 3 fields, expected a label and 12 pixels"),
    "empty line": ("a.csv", f"{GOOD}\n\n{GOOD}".encode(), r"a\.csv, line 7: empty"),
    "no label": ("a.csv", f"{GOOD}\n{',7' * 12}".encode(), "line 7: the label is missing"),
    "nothing": ("a.csv", b"", "no records in it"),
    "heading only": ("a.csv", b"label" + b",x" * 12, "no records in it"),
    "one class": ("a.csv", GOOD.replace("1", "0").encode(), "all images are of one class|no training images"),
    "name among numbers": ("a.csv", f"{GOOD}\ncat{',7' * 12}".encode(), "some labels are numbers, some are names"),
    "cut": ("a.csv.gz", gzip.compress(GOOD.encode())[:-9], "truncated or damaged"),
    "not zipped": ("a.csv.gz", GOOD.encode(), r"a\.csv\.gz, line 1: truncated or damaged"),
    "flipped": ("a.csv.gz", gzip.compress(GOOD.encode())[:20] + b"\xff" * 30, "truncated or damaged"),
    "not json": ("a.jsonl", b"hello", r"a\.jsonl, line 1: expected an object with image and label"),
    "a list": ("a.jsonl", b"[1]", "expected an object"),
    "deep": ("a.jsonl", b"[" * 100_000, "expected an object"),
    "no label in json": ("a.jsonl", b'{"image": ""}', "expected an object"),
    "a label of parts": ("a.jsonl", b'{"label": [1]}', r"label '\[1\]', expected a number or a name"),
    "another ending": ("a.txt", b"1", r"expected a name that ends in \.csv"),
    "binary": ("a.csv", bytes(range(256)) * 9, "fields, expected a label|empty"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_does_not_fit_is_named(tmp_path: Path, kind: str) -> None:
    name, body, said = BAD[kind]
    (tmp_path / name).write_bytes(body)
    with pytest.raises(DataError, match=said) as caught:
        stream.open(config(tmp_path / name, shape=[4, 3]), split="train")
    assert caught.value.hint


def test_a_line_without_end_is_not_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "MAX_LINE_BYTES", 1000)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b"1" * 10_000_000))
    with pytest.raises(DataError, match=r"a\.jsonl\.gz, line 1: more than 1,000 bytes"):
        stream.open(config(path), split="train")


@pytest.mark.parametrize("image", ["null", '"%%%"', "5", '"aGVsbG8="'])
def test_images_that_are_none(tmp_path: Path, image: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(f'{{"image": {image}, "label": {index % 2}, "id": {index}}}' for index in range(8)))
    found = stream.open(config(path), split="train")
    with pytest.raises(DataError, match=r"a\.jsonl, line \d: (the image is not base64|not an image that is known)"):
        found.read([0])


def test_a_shape_is_needed_for_rows_of_pixels(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv")
    with pytest.raises(DataError, match=r"data\.source\.shape says how a row"):
        stream.open(config(path), split="train")
    with pytest.raises(DataError, match="a third number, if any, must be 3"):
        stream.open(config(path, shape=[3, 2, 2]), split="train")
    write_lines(tmp_path / "b.jsonl.gz", count=3)
    with pytest.raises(DataError, match="not the kind of file that"):
        stream.open(config(path, shape=[4, 3], val_path=str(tmp_path / "b.jsonl.gz")), split="train")


MNIST = Path(__file__).parents[3] / "shared" / "data" / "vision" / "mnist_5k.csv.gz"


@pytest.mark.skipif(not MNIST.exists(), reason="needs mnist_5k.csv.gz")
def test_mnist_as_it_is_published() -> None:
    found = stream.open(config(MNIST, shape=[28, 28], label="last"), split="train")
    assert len(found) == 4000
    assert found.columns["label"].names == tuple("0123456789")
    assert np.asarray(found.read([2000])["picture"][0]).max() > 200
