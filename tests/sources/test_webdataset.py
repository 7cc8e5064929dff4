"""Tar archives of samples: what is in them, and what is refused."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest

from bmctl.errors import DataError
from bmctl.sources import webdataset
from bmctl.sources.shards import SPLITS, find

from .conftest import png, write_shards, write_tar

Members = list[tuple[str, bytes]]


def config(shards: Path | str, **fields: object) -> webdataset.Config:
    return webdataset.Config.model_validate({"kind": "webdataset", "shards": str(shards), **fields})


def samples(count: int, *, first: int = 0, classes: int = 2) -> Members:
    return [
        member
        for index in range(first, first + count)
        for member in ((f"{index:04}.png", png(index)), (f"{index:04}.cls", str(index % classes).encode()))
    ]


def pixels(body: bytes) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(body)))


def test_archives_are_carved_without_overlap(tmp_path: Path) -> None:
    write_shards(tmp_path, files=3, samples=20)
    parts = [webdataset.open(config(tmp_path), split=split) for split in SPLITS]
    assert [len(part) for part in parts] == [48, 6, 6]
    assert len({(part.parts[i], part.keys[i]) for part in parts for i in range(len(part))}) == 60
    for part in parts:
        for index, image in enumerate(part.read(range(len(part)))["picture"]):
            number = int(part.keys[index])
            assert np.array_equal(image, pixels(png(number)))
            assert part.labels[index] == number % 3
            assert part.parts[index] == number // 20


def test_splits_have_archives_of_their_own(tmp_path: Path) -> None:
    for name, first, count in (("train", 0, 8), ("val", 8, 4), ("test", 12, 2)):
        write_tar(tmp_path / f"{name}-0.tar", samples(count, first=first))
    own = config(
        tmp_path / "train-*.tar", val_shards=str(tmp_path / "val-0.tar"), test_shards=str(tmp_path / "test-{0..0}.tar")
    )
    assert [webdataset.open(own, split=split).keys for split in SPLITS] == [
        tuple(f"{index:04}" for index in range(first, last)) for first, last in ((0, 8), (8, 12), (12, 14))
    ]


@pytest.mark.parametrize("kind", ["cls", "txt", "json"])
def test_what_webdatasets_own_writer_writes(tmp_path: Path, kind: str) -> None:
    writer = pytest.importorskip("webdataset").TarWriter
    labels = {"cls": lambda index: index % 3, "txt": lambda index: f"größe {index % 3}"}
    labels["json"] = lambda index: {"id": index, "label": index % 3}
    with writer(str(tmp_path / "train-0.tar")) as archive:
        for index in range(12):
            archive.write({"__key__": f"n{index % 3}/{index:03}", "png": png(index), kind: labels[kind](index)})
    found = webdataset.open(config(tmp_path, label=kind, val=0.2, test=0.2), split="train")
    assert len(found) == 6
    assert found.columns["label"].names == (("größe 0", "größe 1", "größe 2") if kind == "txt" else ("0", "1", "2"))
    for index, image in enumerate(found.read(range(6))["picture"]):
        number = int(found.keys[index].rpartition("/")[2])
        assert found.labels[index] == number % 3
        assert np.array_equal(image, pixels(png(number)))


@pytest.mark.skipif(shutil.which("tar") is None, reason="needs GNU tar")
def test_what_gnu_tar_writes(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name, body in samples(10):
        (folder / name).write_bytes(body)
    (folder / "notes").mkdir()
    (folder / ".hidden").write_bytes(b"x")
    subprocess.run(["tar", "-cf", str(tmp_path / "x.tar"), "--sort=name", "-C", str(folder), "."], check=True)
    found = webdataset.open(config(tmp_path / "x.tar"), split="train")
    assert sorted(found.keys) == sorted(f"{int(key):04}" for key in found.keys)
    assert all(
        np.array_equal(image, pixels(png(int(key))))
        for image, key in zip(found.read(range(len(found.keys)))["picture"], found.keys, strict=True)
    )


def test_labels_by_name_number_and_class_names(tmp_path: Path) -> None:
    named: Members = [
        member
        for index in range(8)
        for member in (
            (f"{index}.PNG", png(index)),
            (f"{index}.txt", f" {'ba'[index % 2]}\n".encode()),
            (f"{index}.x", b""),
        )
    ]
    write_tar(tmp_path / "named.tar", named)
    assert webdataset.open(config(tmp_path / "named.tar", label="txt"), split="train").columns["label"].names == (
        "a",
        "b",
    )
    ordered = config(tmp_path / "named.tar", label="txt", class_names=["b", "a", "c"])
    with pytest.raises(DataError, match="no training images of the class 'c'"):
        webdataset.open(ordered, split="train")
    write_tar(tmp_path / "numbered.tar", samples(8))
    numbered = webdataset.open(config(tmp_path / "numbered.tar", class_names=["even", "odd"]), split="train")
    assert numbered.columns["label"].names == ("even", "odd")
    assert all(int(key) % 2 == label for key, label in zip(numbered.keys, numbered.labels, strict=True))


def test_fingerprints_follow_the_contents_and_not_the_clock(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", samples(20))

    def fingerprint(**fields: object) -> str:
        return webdataset.open(config(path, **fields), split="train").fingerprint

    before = fingerprint()
    os.utime(path, (1, 1))
    assert fingerprint() == before
    assert fingerprint(order="shards") != before
    assert fingerprint(order="shards", window=7) != fingerprint(order="shards")
    swapped = [(name, png(99) if name == "0003.png" else body) for name, body in samples(20)]
    write_tar(path, swapped)
    assert fingerprint() != before
    relabelled = [(name, b"1" if name == "0004.cls" else body) for name, body in samples(20)]
    write_tar(path, relabelled)
    assert fingerprint() != before
    write_tar(path, samples(20))
    assert fingerprint() == before


def test_an_archive_that_changes_under_the_reader(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", samples(20))
    found = webdataset.open(config(path), split="train")
    write_tar(path, samples(21))
    with pytest.raises(DataError, match=r"a\.tar: has changed since its index was read"):
        found.read([0])
    assert len(webdataset.open(config(path), split="train")) == 17
    path.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        found.read([0])


def test_a_bad_image_is_named(tmp_path: Path) -> None:
    members = [(name, body[:-40] if name.endswith("png") else body) for name, body in samples(20)]
    found = webdataset.open(config(write_tar(tmp_path / "a.tar", members)), split="train")
    with pytest.raises(DataError, match=r"a\.tar: member '000.': the image is truncated or corrupt"):
        found.read([0])


GOOD = samples(8)
BAD: dict[str, tuple[Members, dict[str, object], str]] = {
    "no label": ([*GOOD, ("x.png", png(9))], {}, r"a\.tar: sample 'x': no label \(cls\)"),
    "no image": ([*GOOD, ("x.cls", b"1")], {}, "sample 'x': no image"),
    "another label asked": (GOOD, {"label": "txt"}, r"sample '0000': no label \(txt\)"),
    "twice": ([*GOOD, *GOOD[:2]], {}, r"member '0000\.png': a sample of this name stands earlier"),
    "two images": ([*GOOD, ("x.png", png(9)), ("x.jpg", png(9))], {}, r"member 'x\.jpg': the sample has 'x\.png'"),
    "no extension": ([*GOOD, ("README", b"hello")], {}, "member 'README': no extension"),
    "label of letters": ([*GOOD, ("x.png", png(9)), ("x.cls", b"cat")], {}, "sample 'x': the label 'cat', expected a"),
    "negative": ([*GOOD, ("x.png", png(9)), ("x.cls", b"-1")], {}, "sample 'x': label -1, expected 0 to 1"),
    "beyond": (
        [*GOOD, ("x.png", png(9)), ("x.cls", b"2")],
        {"class_names": ["a", "b"]},
        "sample 'x': label 2, expected 0",
    ),
    "billions": (
        [*GOOD, ("x.png", png(9)), ("x.cls", b"9" * 10)],
        {},
        "sample 'x': label 9999999999, expected 0 to 99999",
    ),
    "huge label": ([*GOOD, ("x.png", png(9)), ("x.cls", b"1" * 2**21)], {}, "sample 'x': a label of 2,097,152 bytes"),
    "many digits": ([*GOOD, ("x.png", png(9)), ("x.cls", b"1" * 9000)], {}, "sample 'x': the label '1111"),
    "empty name": ([("x.png", png(9)), ("x.txt", b" ")], {"label": "txt"}, "sample 'x': the label '', expected"),
    "unknown name": (
        [("x.png", png(9)), ("x.txt", b"cow")],
        {"label": "txt", "class_names": ["cat", "dog"]},
        "sample 'x': label 'cow', expected one of cat, dog",
    ),
    "json without the key": (
        [("x.png", png(9)), ("x.json", b"{}")],
        {"label": "json"},
        "expected an object with the key",
    ),
    "json that is none": ([("x.png", png(9)), ("x.json", b"[" * 9000)], {"label": "json"}, "expected an object"),
    "json of truth": ([("x.png", png(9)), ("x.json", b'{"label": true}')], {"label": "json"}, "label True, expected a"),
    "one class": (
        [member for index in range(0, 8, 2) for member in samples(1, first=index)],
        {},
        "all images are of one",
    ),
    "nothing": ([("__meta__.json", b"{}")], {}, "no samples in it"),
    "names among numbers": (
        [
            member
            for index, label in enumerate((0, "a", 1))
            for member in ((f"{index}.png", png(index)), (f"{index}.json", json.dumps({"label": label}).encode()))
        ],
        {"label": "json"},
        "some labels are numbers, some are names",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_does_not_fit_is_named(tmp_path: Path, kind: str) -> None:
    members, fields, said = BAD[kind]
    write_tar(tmp_path / "a.tar", members)
    with pytest.raises(DataError, match=said) as caught:
        webdataset.open(config(tmp_path / "a.tar", **fields), split="train")
    assert caught.value.hint


def test_labels_of_other_splits_must_be_known_from_training(tmp_path: Path) -> None:
    write_tar(tmp_path / "train.tar", samples(8))
    write_tar(tmp_path / "val.tar", [("x.png", png(9)), ("x.cls", b"5")])
    with pytest.raises(DataError, match=r"val\.tar: sample 'x': label 5, expected 0 to 1"):
        webdataset.open(config(tmp_path / "train.tar", val_shards=str(tmp_path / "val.tar")), split="train")
    with pytest.raises(DataError, match="is there already"):
        webdataset.open(config(tmp_path / "train.tar", val_shards=str(tmp_path / "train.tar")), split="train")


# -- which files ------------------------------------------------------------------------------------


def test_ranges_patterns_and_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_shards(tmp_path / "in", files=12, samples=1)

    def names(pattern: str) -> list[str]:
        return [path.name for path in find(pattern, suffixes=(".tar",), key="data.source.shards")]

    every = [f"train-{part:06}.tar" for part in range(12)]
    assert names("in") == names("in/*.tar") == names("in/train-{000000..000011}.tar") == every
    assert names(str(tmp_path / "in" / "train-*.tar")) == every
    assert names("in/train-00000{3..4}.tar") == every[3:5]
    assert names("x-{8..11}.tar") == ["x-8.tar", "x-9.tar", "x-10.tar", "x-11.tar"]
    assert names("{0..1}/{00..01}.tar") == ["00.tar", "01.tar"] * 2
    monkeypatch.setenv("BMCTL_TEST_DATA", "in")
    assert names("${ENV:BMCTL_TEST_DATA}") == every


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("gone.tar", r"gone\.tar: cannot be read \(No such file"),
        ("gone-*.tar", "no files match 'gone-"),
        (".", r"no \.tar files in"),
        ("https://example.org/x.tar", "is not a local file"),
        ("pipe:curl x", "is not a local file"),
        ("x-{9..1}.tar", "the range {9..1}"),
        ("x-{0..999999999}.tar", "the range"),
        ("x-{0..999}-{0..999}.tar", "more than 100,000 files"),
        ("x\0.tar", "cannot be read"),
    ],
)
def test_files_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, said: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=said) as caught:
        webdataset.open(config(pattern), split="train")
    assert "data.source.shards" in str(caught.value.message) + str(caught.value.hint)


def test_a_fifo_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.tar")
    with pytest.raises(DataError, match="not a regular file"):
        webdataset.open(config(tmp_path), split="train")


def test_pax_headers_of_common_writers_are_fine(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [(f"{'long' * 40}/{name}", body) for name, body in GOOD], format=tarfile.PAX_FORMAT)
    assert len(webdataset.open(config(tmp_path), split="train")) == 4
