"""Records that can only be read in order, for data larger than memory: gzipped or plain CSV rows, or JSON lines.

- ``.csv``, ``.csv.gz``: one image per line, its pixels 0 to 255 row by row (channels last) and its label before or
  after them. A first line without a number in it is a heading.
- ``.jsonl``, ``.jsonl.gz``: ``{"image": BASE64 of a PNG, JPEG, WebP or BMP file, "label": NUMBER or NAME}``.

Each file is read once from end to end for labels and hashes; after that every process reads the files in sequence and
decodes only what is its own. Training shuffles the files and then within a window, so that at most `window` undecoded
records are held. Other splits are read in order.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from bmctl.core.columns import Column
from bmctl.errors import DataError
from bmctl.schema import Count, Many, Strict
from bmctl.sources.classes import Label, name_labels
from bmctl.sources.records import Layout
from bmctl.sources.samples import Indices, labelled, pick, pictures_of
from bmctl.sources.shards import SPLITS, Stamp, find, open_unchanged, stamp

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

SUFFIXES = (".csv", ".csv.gz", ".jsonl", ".jsonl.gz")
MAX_LINE_BYTES = 64 << 20
INPUT = "image"


class Config(Strict):
    """Attributes:
    path: Training files: one, a folder, ``part-*.jsonl.gz`` or ``part-{00..15}.csv.gz``; relative to where bmctl is
        started.
    val_path: Validation files; without, `val` is carved from the training records. Likewise test_path.
    val: Share that validates, where there is no val_path.
    test: Share that tests, where there is no test_path.
    seed: Of that choice.
    shape: Of the images of a CSV: height and width, and 3 for colour.
    label: Of a CSV: the first or the last field of a line.
    class_names: In the order of the numbers; without, the numbers, or the names that occur, sorted.
    window: Records among which is shuffled.
    """

    kind: Literal["stream"] = "stream"
    path: str
    val_path: str | None = None
    test_path: str | None = None
    val: Annotated[float, Field(gt=0, lt=0.5)] = 0.1
    test: Annotated[float, Field(gt=0, lt=0.5)] = 0.1
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    shape: Many[Count] | None = Field(default=None, min_length=2, max_length=3)
    label: Literal["first", "last"] = "first"
    class_names: Many[str] | None = None
    window: Count = 4096


@dataclass(frozen=True)
class StreamSamples:
    """Records of files that are read from the beginning; any order can be had, at the price of holding records.

    Attributes:
        columns: `picture` and `label`.
        files: In the order of `parts`.
        stamps: Of each, when it was indexed.
        parts: int32 [N], which file.
        lines: int64 [N], counted from 0.
        labels: int64 [N].
        digests: uint64 [N], of the whole record: equal for equal images.
        window: Records among which training shuffles.
        fingerprint: SHA-256 over label and digest of every record, and the window.
    """

    columns: Mapping[str, Column]
    files: tuple[Path, ...]
    stamps: tuple[Stamp, ...]
    parts: np.ndarray
    lines: np.ndarray
    labels: np.ndarray
    digests: np.ndarray
    window: int
    fingerprint: str
    layout: Layout
    in_memory: ClassVar[bool] = False
    sequential: ClassVar[bool] = True
    opens_files: ClassVar[bool] = False

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """Where a record stands, for messages."""
        return f"{self.files[self.parts[index]]}, line {self.lines[index] + 1}"

    def read(self, indices: Indices, *, only: Collection[str] | None = None) -> dict[str, Sequence[Any]]:
        """Pictures as Pillow holds them, of mode L or RGB: one pass through their files."""
        return labelled(lambda: list(self.pictures(indices)), self.labels, indices, only=only)

    def read_each(self, batches: Sequence[Indices]) -> Iterator[dict[str, Sequence[Any]]]:
        """As `read` of each, in one pass for all: indices that ascend file by file hold nothing."""
        import numpy as np

        pictures = self.pictures(np.concatenate(batches) if len(batches) else [])
        for indices in batches:
            yield labelled(lambda few=indices: list(islice(pictures, len(few))), self.labels, indices, only=None)  # type: ignore[misc]

    def sketches(self) -> np.ndarray:
        return self.digests

    def identities(self, indices: Indices) -> list[bytes]:
        return [int(self.digests[index]).to_bytes(8) for index in indices]

    def pictures(self, indices: Indices) -> Iterator[Image.Image]:
        """Decoded one by one; what comes before its turn is held undecoded.

        Files are read in the order in which they occur in `indices`, each as far as it is needed.

        Raises:
            DataError: A file has changed, or a record cannot be decoded.
        """
        import numpy as np

        wanted = np.asarray(indices, np.int64)
        incoming = self._records(wanted)
        held: dict[int, bytes] = {}
        left: dict[int, int] = {}
        values, counts = np.unique(wanted, return_counts=True)
        left.update((int(value), int(count)) for value, count in zip(values, counts, strict=True) if count > 1)
        for index in wanted.tolist():
            while index not in held:
                number, line = next(incoming)
                held[number] = line
            left[index] = left.get(index, 1) - 1
            line = held[index] if left[index] else held.pop(index)
            yield self.layout.decode(line, where=self.name(index))

    def _records(self, wanted: np.ndarray) -> Iterator[tuple[int, bytes]]:
        """Index and line of everything wanted, file by file."""
        import numpy as np

        parts = self.parts[wanted]
        order = parts[np.sort(np.unique(parts, return_index=True)[1])]
        for part in order.tolist():
            indices = np.unique(wanted[parts == part])
            lines = self.lines[indices].tolist()
            path = self.files[part]
            with _opened(path, self.stamps[part]) as file:
                position = 0
                for index, number in zip(indices.tolist(), lines, strict=True):
                    while position <= number:
                        line = _next_line(file, path=path, number=position)
                        position += 1
                    yield index, line


def open(config: Config, *, split: str) -> StreamSamples:
    """The samples of `train`, `val` or `test`.

    Raises:
        DataError: Missing, truncated or damaged files, lines without a label or with too few pixels.
    """
    import hashlib

    import numpy as np

    files: list[Path] = []
    indexed: list[_File] = []
    splits: list[str] = []
    for name, pattern in zip(SPLITS, (config.path, config.val_path, config.test_path), strict=True):
        key = f"data.source.{'path' if name == 'train' else f'{name}_path'}"
        for path in find(pattern, suffixes=SUFFIXES, key=key) if pattern is not None else ():
            if path in files:
                raise DataError(f"{key}: {path} is there already", hint="every file may be of one split, once")
            files.append(path)
            indexed.append(_index(path, stamp(path, key=key), _layout(config, path)))
            splits.append(name)
    layout = _layout(config, files[0])
    mixed = next((path for path in files if _layout(config, path) != layout), None)
    if mixed is not None:
        raise DataError(
            f"{mixed}: not the kind of file that {files[0]} is", hint="give all as CSV, or all as JSON lines"
        )
    counts = [len(each.labels) for each in indexed]
    class_names, labels = name_labels(
        [each.labels for each in indexed],
        is_train=[name == "train" for name in splits],
        class_names=config.class_names,
        base=files[0].parent,
        where=lambda part, row: f"{files[part]}, line {row + indexed[part].first_line + 1}",
    )
    digests = np.concatenate([np.frombuffer(each.digests, np.uint64) for each in indexed])
    lines = np.concatenate([np.arange(len(each.labels)) + each.first_line for each in indexed])
    split_of = np.repeat(splits, counts)
    # By content: a record stays in its split when others are put before it, and its twins are in the same one.
    chosen = pick(
        labels, digests.tolist(), split_of, split=split, config=config, class_names=class_names, base=files[0].parent
    )
    fingerprint = hashlib.sha256(repr((class_names, config.window, layout)).encode())
    fingerprint.update(labels[chosen].astype("<i8").tobytes() + digests[chosen].astype("<u8").tobytes())
    return StreamSamples(
        columns=pictures_of(class_names),
        files=tuple(files),
        stamps=tuple(each.stamp for each in indexed),
        parts=np.repeat(np.arange(len(files), dtype=np.int32), counts)[chosen],
        lines=lines[chosen],
        labels=labels[chosen],
        digests=digests[chosen],
        window=config.window,
        fingerprint=fingerprint.hexdigest(),
        layout=layout,
    )


# -- one file ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _File:
    """Attributes:
    first_line: 1 after a heading.
    digests: uint64 of each line, as bytes.
    """

    stamp: Stamp
    first_line: int
    labels: tuple[Label, ...]
    digests: bytes


def _layout(config: Config, path: Path) -> Layout:
    is_json = ".jsonl" in path.suffixes[-2:]
    if not is_json and ".csv" not in path.suffixes[-2:]:
        raise DataError(f"{path}: expected a name that ends in {', '.join(SUFFIXES)}", hint="rename the file")
    if is_json:
        return Layout(True, None, "first")
    if config.shape is None:
        raise DataError(
            f"{path}: data.source.shape says how a row of pixels is an image", hint="--set data.source.shape=[28,28]"
        )
    if config.shape[2:] not in ((), (3,)):
        raise DataError("data.source.shape: a third number, if any, must be 3", hint="--set data.source.shape=[28,28]")
    return Layout(False, config.shape, config.label)


@cache
def _index(path: Path, known: Stamp, layout: Layout) -> _File:
    """Size and time are here so that a changed file is read again."""
    import hashlib
    from array import array

    labels: list[Label] = []
    digests = array("Q")
    first_line = 0
    with _opened(path, known) as file:
        while True:
            number = len(labels) + first_line
            line = _read_line(file, path=path, number=number)
            if not line:
                break
            if number == 0 and layout.is_heading(line):
                first_line = 1
                continue
            labels.append(layout.label_of(line, where=f"{path}, line {number + 1}"))
            digests.append(int.from_bytes(hashlib.blake2b(line, digest_size=8).digest()))
    if not labels:
        raise DataError(f"{path}: no records in it", hint="remove the file")
    return _File(known, first_line, tuple(labels), digests.tobytes())


@contextmanager
def _opened(path: Path, known: Stamp) -> Iterator[IO[bytes]]:
    """The file as it is, or as it was before it was zipped."""
    import gzip

    with os.fdopen(open_unchanged(path, known), "rb") as raw:
        if path.suffix != ".gz":
            yield raw
            return
        with gzip.GzipFile(fileobj=raw, mode="rb") as file:
            yield file  # type: ignore[misc]


def _read_line(file: IO[bytes], *, path: Path, number: int) -> bytes:
    """Without its end; empty at the end of the file."""
    import zlib

    try:
        line = file.readline(MAX_LINE_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}, line {number + 1}: truncated or damaged ({error})", hint="fetch it again") from error
    if len(line) > MAX_LINE_BYTES:
        raise DataError(
            f"{path}, line {number + 1}: more than {MAX_LINE_BYTES:,} bytes", hint="one record on each line"
        )
    stripped = line.rstrip(b"\r\n")
    if line and not stripped:
        raise DataError(f"{path}, line {number + 1}: empty", hint="remove the line")
    return stripped


def _next_line(file: IO[bytes], *, path: Path, number: int) -> bytes:
    line = _read_line(file, path=path, number=number)
    if not line:
        raise DataError(f"{path}: ends before line {number + 1}", hint="start again with the data at rest")
    return line
