"""IDX files, whole and broken."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from bmctl.errors import DataError
from bmctl.sources import idx

RNG = np.random.default_rng(0)


def write(path: Path, array: np.ndarray) -> None:
    data = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """40 training and 20 test images of 5x4 in 4 classes; one pair gzipped."""
    for prefix, count, ending in (("train", 40, ".gz"), ("t10k", 20, "")):
        write(tmp_path / f"{prefix}-images-idx3-ubyte{ending}", RNG.integers(0, 256, (count, 5, 4), np.uint8))
        write(tmp_path / f"{prefix}-labels-idx1-ubyte{ending}", np.arange(count, dtype=np.uint8) % 4)
    return tmp_path


def config(root: Path, **fields: object) -> idx.Config:
    return idx.Config.model_validate({"kind": "idx", "root": str(root), **fields})


def test_validation_is_carved_from_train_class_by_class(root: Path) -> None:
    train, val, test = (idx.open(config(root, val=0.2), split=split) for split in ("train", "val", "test"))
    assert [len(part) for part in (train, val, test)] == [32, 8, 20]
    assert set(np.bincount(val.arrays["label"])) == {2}
    rows = {image.tobytes() for image in train.arrays["picture"]}
    assert not rows & {image.tobytes() for image in val.arrays["picture"]}
    assert train.arrays["picture"].shape[1:] == (5, 4)
    assert train.columns["label"].names == ("0", "1", "2", "3")
    assert len({part.fingerprint for part in (train, val, test)}) == 3


def test_the_same_split_every_time_and_after_a_change_another(root: Path) -> None:
    before = idx.open(config(root), split="val").fingerprint
    assert idx.open(config(root), split="val").fingerprint == before
    write(root / "train-images-idx3-ubyte.gz", RNG.integers(0, 256, (40, 5, 4), np.uint8))
    assert idx.open(config(root), split="val").fingerprint != before


def test_published_fashion_mnist_is_read(shared_data: Path) -> None:
    samples = idx.open(config(shared_data / "vision" / "fashion-mnist"), split="test")
    assert samples.arrays["picture"].shape == (10_000, 28, 28)
    assert set(np.bincount(samples.arrays["label"])) == {1000}


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


BREAK = {
    "no such file": lambda root: (root / "t10k-labels-idx1-ubyte").unlink(),
    "expected 400": lambda root: truncate(root / "t10k-images-idx3-ubyte"),
    "more than 20": lambda root: (root / "t10k-labels-idx1-ubyte").open("ab").write(b"!"),
    "not an IDX file": lambda root: (root / "t10k-images-idx3-ubyte").write_bytes(b"<html>not found</html>"),
    "20 images, but": lambda root: write(root / "t10k-labels-idx1-ubyte", np.zeros(19, np.uint8)),
    "label 9, expected 0 to 3": lambda root: write(root / "t10k-labels-idx1-ubyte", np.full(20, 9, np.uint8)),
    "no samples": lambda root: [
        write(root / "t10k-labels-idx1-ubyte", np.zeros(0, np.uint8)),
        write(root / "t10k-images-idx3-ubyte", np.zeros((0, 5, 4), np.uint8)),
    ],
    "the header promises": lambda root: (root / "t10k-images-idx3-ubyte").write_bytes(
        struct.pack(">4B3I", 0, 0, 8, 3, 2**31, 2**20, 2**20)
    ),
}


@pytest.mark.parametrize("said", BREAK)
def test_broken_files_are_named(root: Path, said: str) -> None:
    BREAK[said](root)
    with pytest.raises(DataError, match=said) as caught:
        idx.open(config(root), split="test")
    assert "t10k-" in caught.value.message


def test_a_cut_gzip_is_named(root: Path) -> None:
    truncate(root / "train-images-idx3-ubyte.gz")
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz: cannot be read"):
        idx.open(config(root), split="train")


def test_a_root_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a folder"):
        idx.open(config(tmp_path / "nowhere"), split="train")


def test_names_for_labels(root: Path) -> None:
    named = idx.open(config(root, class_names=["a", "b", "c", "d"]), split="val")
    assert named.columns["label"].names == ("a", "b", "c", "d")
    with pytest.raises(DataError, match="label 3, expected 0 to 1"):
        idx.open(config(root, class_names=["a", "b"]), split="val")
