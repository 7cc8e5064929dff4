"""Image folders, tidy and untidy."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bmctl.errors import DataError
from bmctl.sources import folder

from .conftest import SaveImages


def config(root: Path, **fields: object) -> folder.Config:
    return folder.Config.model_validate({"kind": "folder", "root": str(root), **fields})


@pytest.fixture
def root(tmp_path: Path, save_images: SaveImages) -> Path:
    for name in ("dog", "cat"):
        save_images(tmp_path / "data" / name, 20)
    return tmp_path / "data"


def test_flat_folders_are_carved_without_overlap(root: Path) -> None:
    parts = {split: folder.open(config(root, val=0.1, test=0.2), split=split) for split in folder.SPLITS}
    assert {split: len(part) for split, part in parts.items()} == {"train": 28, "val": 4, "test": 8}
    paths = [path for part in parts.values() for path in part.paths]
    assert len(set(paths)) == 40
    assert all(part.columns["label"].names == ("cat", "dog") for part in parts.values())
    assert list(np.bincount(parts["test"].labels)) == [4, 4]
    assert all(
        path.parent.name == "cat"
        for path, label in zip(parts["val"].paths, parts["val"].labels, strict=True)
        if label == 0
    )


def test_a_new_file_moves_few_others(root: Path, save_images: SaveImages) -> None:
    before = set(folder.open(config(root), split="val").paths)
    (root / "cat" / "another.png").write_bytes((root / "cat" / "0.png").read_bytes() + b"\0")
    after = set(folder.open(config(root), split="val").paths)
    assert len(before & after) >= len(before) - 1


def test_another_seed_carves_otherwise(root: Path) -> None:
    assert folder.open(config(root, seed=1), split="test").paths != folder.open(config(root), split="test").paths


def test_split_folders_are_taken_as_they_are(tmp_path: Path, save_images: SaveImages) -> None:
    for split, count in (("train", 9), ("val", 3), ("test", 2)):
        for name in ("a", "b"):
            save_images(tmp_path / split / name, count)
    for split, count in (("train", 18), ("val", 6), ("test", 4)):
        samples = folder.open(config(tmp_path), split=split)
        assert len(samples) == count
        assert all(path.relative_to(tmp_path).parts[0] == split for path in samples.paths)


def test_only_what_is_missing_is_carved_from_train(tmp_path: Path, save_images: SaveImages) -> None:
    for split, count in (("train", 20), ("val", 5)):
        for name in ("a", "b"):
            save_images(tmp_path / split / name, count)
    sizes = [len(folder.open(config(tmp_path), split=split)) for split in folder.SPLITS]
    assert sizes == [36, 10, 4]


def test_the_fingerprint_knows_names_sizes_and_labels_but_not_the_place(root: Path, tmp_path: Path) -> None:
    before = folder.open(config(root), split="train").fingerprint
    assert before == folder.open(config(root), split="train").fingerprint
    moved = root.rename(tmp_path / "elsewhere")
    assert folder.open(config(moved), split="train").fingerprint == before
    changed = folder.open(config(moved), split="train").paths[0]
    changed.write_bytes(changed.read_bytes() + b"\0")
    assert folder.open(config(moved), split="train").fingerprint != before


def test_odd_names_are_fine(tmp_path: Path, save_images: SaveImages) -> None:
    for name in ("émoji 🎉", "new\nline"):
        save_images(tmp_path / name, 5)
    (tmp_path / "new\nline" / "0.png").rename(tmp_path / "new\nline" / os.fsdecode(b"caf\xe9 .PNG"))
    samples = folder.open(config(tmp_path), split="train")
    assert samples.columns["label"].names == ("new\nline", "émoji 🎉")
    assert len(samples.read(range(len(samples)))["picture"]) == len(samples)
    assert len(samples.fingerprint) == 64


UNTIDY: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty class": (lambda root: (root / "bird").mkdir(), "bird: no images of this class"),
    "stray file": (lambda root: (root / "notes.txt").write_text("x"), r"notes\.txt: expected a folder"),
    "not an image": (lambda root: (root / "cat" / "notes.txt").write_text("x"), r"notes\.txt: expected an image"),
    "nested": (lambda root: (root / "cat" / "old").mkdir(), "old: a folder inside a class folder"),
    "fifo": (lambda root: os.mkfifo(root / "cat" / "pipe.png"), r"pipe\.png: not a regular file"),
    "file loop": (lambda root: (root / "cat" / "x.png").symlink_to("x.png"), r"x\.png"),
    "folder loop": (lambda root: (root / "bird").symlink_to("bird"), "bird"),
    "broken link": (lambda root: (root / "cat" / "x.png").symlink_to("gone.png"), r"x\.png: not a regular file"),
    "link to the root": (lambda root: (root / "bird").symlink_to("."), "a folder inside a class folder"),
}


@pytest.mark.parametrize("kind", UNTIDY)
def test_untidy_folders_are_refused(root: Path, kind: str) -> None:
    spoil, said = UNTIDY[kind]
    spoil(root)
    with pytest.raises(DataError, match=said) as caught:
        folder.open(config(root), split="train")
    assert caught.value.hint


@pytest.mark.parametrize("split", folder.SPLITS)
def test_no_class_may_lack_training_images(tmp_path: Path, save_images: SaveImages, split: str) -> None:
    for part in folder.SPLITS:
        save_images(tmp_path / part / "a", 3)
    save_images(tmp_path / "test" / "b", 3)
    with pytest.raises(DataError, match="no training images of the class 'b'"):
        folder.open(config(tmp_path), split=split)


@pytest.mark.parametrize("spoil", ["gone", "file", "empty", "one class", "strange split"])
def test_roots_that_hold_no_data_set(tmp_path: Path, save_images: SaveImages, spoil: str) -> None:
    root, said = tmp_path / "root", "not a folder"
    if spoil == "file":
        root.write_text("x")
    elif spoil == "empty":
        root.mkdir()
        said = "no class folders"
    elif spoil == "one class":
        save_images(root / "a", 5)
        said = "all images are of one class, 'a'"
    elif spoil == "strange split":
        save_images(root / "train" / "a", 5)
        save_images(root / "validation" / "a", 5)
        said = "validation: beside train there may only be val and test"
    with pytest.raises(DataError, match=said):
        folder.open(config(root), split="train")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_folders_are_named(root: Path) -> None:
    (root / "cat").chmod(0)
    try:
        with pytest.raises(DataError, match="cat: cannot be read"):
            folder.open(config(root), split="train")
    finally:
        (root / "cat").chmod(0o700)
