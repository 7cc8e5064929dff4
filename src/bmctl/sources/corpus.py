"""Running text: one file or several, plain or gzipped, of which a language model learns to go on with any piece.

Without files of their own, val and test are the end of the text: first what validates, last what tests. Pieces follow
each other without a gap, so that together they are the text, byte for byte.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from bmctl.core.columns import Column, Real, Text
from bmctl.errors import DataError
from bmctl.schema import Many, Strict, resolve_env
from bmctl.sources.samples import ArraySamples

INPUT = "text"
COMPRESSED_BYTES = 2**21
"""Of a split, for what bzip2 makes of it: its blocks are of 900 kB, so that more says nothing new."""

Paths = Annotated[
    Many[str], Field(min_length=1), BeforeValidator(lambda value: (value,) if type(value) is str else value)
]


class Config(Strict):
    """Attributes:
    path: One file or several, read as one text in this order; relative to where bmctl is started.
    val_path: Of a text of its own that validates.
    test_path: Of a text of its own that tests.
    val: Share of the characters that validates, without a file.
    test: Share of the characters that tests, without a file.
    piece: Characters of a sample at most; it ends before white space where there is any in its second half.
    """

    kind: Literal["corpus"] = "corpus"
    path: Paths
    val_path: Paths | None = None
    test_path: Paths | None = None
    val: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    test: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    piece: Annotated[int, Field(ge=16, le=1_000_000)] = 1024


def open(config: Config, *, split: str) -> ArraySamples:
    """The samples of `train`, `val` or `test`, in their order in the text.

    Columns are `text`; `num_bytes` of it in UTF-8; and `bzip2_bytes`, its share of what bzip2 makes of the split.

    Raises:
        DataError: A file is missing, damaged, binary or not UTF-8; or the text is shorter than a piece in each split.
    """
    import hashlib

    import numpy as np

    text = _text_of(config, split)
    found = list(pieces(text, most=config.piece))
    texts = np.array(found, object)
    num_bytes = np.array([len(piece.encode()) for piece in found], np.float32)
    columns: dict[str, Column] = {"text": Text(), "num_bytes": Real(), "bzip2_bytes": Real()}
    arrays = {"text": texts, "num_bytes": num_bytes, "bzip2_bytes": num_bytes * np.float32(_ratio(text))}
    digest = hashlib.sha256(f"{config.piece}\n".encode() + text.encode())
    for array in arrays.values():
        array.flags.writeable = False
    return ArraySamples(columns, arrays, digest.hexdigest())


def pieces(text: str, *, most: int) -> Iterator[str]:
    """Consecutive parts of at most so many characters, whole words where words are shorter than half of that."""
    start = 0
    while start < len(text):
        end = min(start + most, len(text))
        if end < len(text):
            end = next((i for i in range(end, start + most // 2, -1) if text[i].isspace()), end)
        yield text[start:end]
        start = end


def _text_of(config: Config, split: str) -> str:
    own = {"val": config.val_path, "test": config.test_path}.get(split)
    if own is not None:
        return _long_enough(_read(own), config, split=split, where=own)
    text = _read(config.path)
    test = 0.0 if config.test_path else config.test
    val = 0.0 if config.val_path else config.val
    val_from, test_from = round(len(text) * (1 - test - val)), round(len(text) * (1 - test))
    part = {"train": text[:val_from], "val": text[val_from:test_from], "test": text[test_from:]}[split]
    return _long_enough(part, config, split=split, where=config.path)


def _long_enough(text: str, config: Config, *, split: str, where: tuple[str, ...]) -> str:
    if len(text) < config.piece:
        raise DataError(
            f"{', '.join(where)}: {len(text):,} characters for the {split} split, less than one piece of "
            f"{config.piece:,}",
            hint=f"a longer text, a larger share (data.source.{split}), or --set data.source.piece="
            f"{max(16, len(text) // 4)}",
        )
    return text


def _read(paths: tuple[str, ...]) -> str:
    from bmctl.core.tables import read_text

    return "".join(read_text(Path(resolve_env(path))) for path in paths)


def _ratio(text: str) -> float:
    """Bytes of bzip2 per byte of text."""
    import bz2

    content = text.encode()[:COMPRESSED_BYTES]
    return len(bz2.compress(content)) / len(content)
