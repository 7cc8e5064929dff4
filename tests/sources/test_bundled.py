"""The bundled part of Fashion-MNIST: what is in it, and that it can be made again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from bmctl.bundled import make
from bmctl.errors import DataError
from bmctl.sources import bundled


def open_split(split: str) -> np.ndarray:
    return bundled.open(bundled.Config(), split=split).arrays["picture"]


@pytest.mark.parametrize(("split", "size"), [("train", 12_000), ("val", 2_000), ("test", 5_000)])
def test_classes_are_balanced_and_neighbours_differ(split: str, size: int) -> None:
    samples = bundled.open(bundled.Config(), split=split)
    assert samples.arrays["picture"].shape == (size, 28, 28)
    assert samples.arrays["picture"].dtype == np.uint8
    assert set(np.bincount(samples.arrays["label"])) == {size // 10}
    assert sorted(samples.arrays["label"][:10]) == list(range(10))
    assert samples.columns["label"].names[9] == "Ankle boot"


def test_no_row_stands_twice() -> None:
    rows = [image.tobytes() for split in ("train", "val", "test") for image in open_split(split)]
    rows += [np.asarray(Image.open(path)).tobytes() for path in bundled.SAMPLES.glob("*.png")]
    assert len(rows) == 19_010
    assert len(set(rows)) == len(rows)


def test_labels_belong_to_the_images() -> None:
    """Nearest class mean, from train to test: known to be about 68 % on Fashion-MNIST, 10 % by luck."""
    train, test = (bundled.open(bundled.Config(), split=split) for split in ("train", "test"))
    of_class = [train.arrays["picture"][train.arrays["label"] == label] for label in range(10)]
    means = np.stack([each.mean(axis=0).ravel() for each in of_class])
    pixels = test.arrays["picture"].reshape(len(test.arrays["picture"]), -1).astype(np.float64)
    distances = (means**2).sum(axis=1) - 2 * pixels @ means.T
    assert (distances.argmin(axis=1) == test.arrays["label"]).mean() > 0.65


def test_samples_are_one_of_each_class() -> None:
    names = sorted(path.name for path in bundled.SAMPLES.glob("*.png"))
    assert [name[:2] for name in names] == [f"{label}-" for label in range(10)]


def test_it_fits_into_git() -> None:
    total = sum(path.stat().st_size for path in bundled.FOLDER.rglob("*.png"))
    assert total < 9_000_000


def test_a_damaged_file_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = (bundled.FOLDER / "val.png").read_bytes()
    (tmp_path / "val.png").write_bytes(whole[: len(whole) // 2])
    monkeypatch.setattr(bundled, "FOLDER", tmp_path)
    bundled._load.cache_clear()
    try:
        with pytest.raises(DataError, match=r"val\.png: the bundled data is damaged"):
            bundled.open(bundled.Config(), split="val")
    finally:
        bundled._load.cache_clear()


def test_record_names_the_pixels() -> None:
    """SOURCE.json is what `make` wrote about these very files."""
    import hashlib

    record = json.loads((bundled.FOLDER / "SOURCE.json").read_text())
    for split, expected in record["pixels_sha256"].items():
        by_class = open_split(split).reshape(-1, 10, 28, 28).transpose(1, 0, 2, 3)
        assert hashlib.sha256(by_class.tobytes()).hexdigest() == expected


@pytest.mark.slow
def test_made_again_from_the_published_files(shared_data: Path, tmp_path: Path) -> None:
    make.make(shared_data / "vision" / "fashion-mnist", into=tmp_path)
    made = json.loads((tmp_path / "SOURCE.json").read_text())
    record = json.loads((bundled.FOLDER / "SOURCE.json").read_text())
    assert {**made, "zlib": None} == {**record, "zlib": None}
    if features.version_codec("zlib") != record["zlib"]:
        pytest.skip("the pixels agree; the bytes are those of another zlib")
    paths = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.*"))
    assert len(paths) == 14
    for path in paths:
        assert (tmp_path / path).read_bytes() == (bundled.FOLDER / path).read_bytes(), path


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"something else")
    with pytest.raises(ValueError, match="SHA-256"):
        make.read_published(tmp_path, name="train-images-idx3-ubyte")
