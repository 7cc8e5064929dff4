"""Running text: its pieces are the text, byte for byte, and its end is not trained on."""

from __future__ import annotations

import bz2
import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bmctl.errors import DataError
from bmctl.sources import corpus

TEXT = "".join(f"No. {i}: señor,\r\n  the  {i * i}th naïve line — \t…\n" for i in range(400))


def config(path: Path | list[Path], **fields: Any) -> corpus.Config:
    paths = str(path) if isinstance(path, Path) else [str(one) for one in path]
    return corpus.Config.model_validate({"path": paths, "piece": 100, **fields})


def text_of(asked: corpus.Config, split: str) -> str:
    samples = corpus.open(asked, split=split)
    return "".join(samples.read(range(len(samples)))["text"])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_bytes(TEXT.encode())
    return file


def test_no_byte_is_lost(path: Path) -> None:
    asked = config(path, val=0.1, test=0.2)
    splits = {split: text_of(asked, split) for split in ("train", "val", "test")}
    assert splits["train"] + splits["val"] + splits["test"] == TEXT
    assert len(splits["test"]) == pytest.approx(0.2 * len(TEXT), abs=1)
    assert len(splits["val"]) == pytest.approx(0.1 * len(TEXT), abs=1)


def test_pieces_end_before_white_space_and_are_short(path: Path) -> None:
    samples = corpus.open(config(path), split="train")
    texts = list(samples.read(range(len(samples)))["text"])
    assert max(map(len, texts)) <= 100 and all(len(text) > 50 for text in texts[:-1])
    assert all(text[0].isspace() for text in texts[1:])
    assert ["".join(corpus.pieces("x" * 250, most=100))] == ["x" * 250]
    assert [len(one) for one in corpus.pieces("x" * 250, most=100)] == [100, 100, 50]


def test_bytes_are_counted_and_compressed(path: Path) -> None:
    samples = corpus.open(config(path), split="test")
    found = samples.read(range(len(samples)))
    assert found["num_bytes"].tolist() == [len(text.encode()) for text in found["text"]]
    whole = "".join(found["text"]).encode()
    assert np.isclose(found["bzip2_bytes"].sum(), len(bz2.compress(whole)), rtol=1e-5)


def test_files_of_their_own_several_and_gzipped(path: Path, tmp_path: Path) -> None:
    (tmp_path / "more.txt.gz").write_bytes(gzip.compress(TEXT.upper().encode()))
    asked = config([path, tmp_path / "more.txt.gz"], val_path=str(path), test_path=str(tmp_path / "more.txt.gz"))
    assert text_of(asked, "train") == TEXT + TEXT.upper()
    assert text_of(asked, "val") == TEXT
    assert text_of(asked, "test") == TEXT.upper()
    carved = text_of(config(path, test_path=str(path)), "train") + text_of(config(path, test_path=str(path)), "val")
    assert carved == TEXT, "only val is carved then"


def test_another_text_has_another_fingerprint(path: Path) -> None:
    before = corpus.open(config(path), split="train").fingerprint
    assert corpus.open(config(path, piece=90), split="train").fingerprint != before
    path.write_text(TEXT.replace("No. 3:", "No. 4:"))
    assert corpus.open(config(path), split="train").fingerprint != before


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        (b"a\0b" * 1000, "a NUL byte in the text"),
        ("Grüße ".encode("latin-1") * 1000, "not a text file in UTF-8"),
        (b"too short " * 100, "50 characters for the val split, less than one piece of 100"),
        (b"", "0 characters for the val split"),
    ],
)
def test_what_is_no_corpus_is_refused(tmp_path: Path, content: bytes, pattern: str) -> None:
    (tmp_path / "text.txt").write_bytes(content)
    with pytest.raises(DataError, match=pattern):
        corpus.open(config(tmp_path / "text.txt"), split="val")


def test_a_missing_and_a_damaged_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no file .*gone\.txt"):
        corpus.open(config(tmp_path / "gone.txt"), split="train")
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(TEXT.encode())[:-20])
    with pytest.raises(DataError, match=r"cut\.txt\.gz: damaged or cut off"):
        corpus.open(config(tmp_path / "cut.txt.gz"), split="train")
