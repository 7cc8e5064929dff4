"""What sources give back: samples held in memory, or read from files when they are asked for."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeAlias

from bmctl.core.columns import Class, Column, Picture
from bmctl.errors import DataError

if TYPE_CHECKING:
    import numpy as np

_HEAD_BYTES = 8192


Indices: TypeAlias = "Sequence[int] | np.ndarray"
"""Integers [n], which samples."""


@dataclass(frozen=True)
class ArraySamples:
    """Columns in memory.

    Attributes:
        columns: By name.
        arrays: Of each column, [N, ...], read-only; pictures of one size are uint8 [N, H, W] or [N, H, W, 3].
        fingerprint: SHA-256 over all of them.
    """

    columns: Mapping[str, Column]
    arrays: Mapping[str, np.ndarray]
    fingerprint: str
    in_memory: ClassVar[bool] = True
    sequential: ClassVar[bool] = False
    opens_files: ClassVar[bool] = False
    parts: ClassVar[None] = None
    window: ClassVar[None] = None

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def read(self, indices: Indices, *, only: Collection[str] | None = None) -> dict[str, np.ndarray]:
        """Blocks [n, ...], in the order of `indices`."""
        import numpy as np

        rows = np.asarray(indices, dtype=np.int64)
        return {name: array[rows] for name, array in self.arrays.items() if only is None or name in only}

    def read_each(self, batches: Sequence[Indices]) -> Iterator[dict[str, np.ndarray]]:
        return map(self.read, batches)

    def name(self, index: int) -> str:
        return f"sample {index}"

    def sketches(self) -> np.ndarray:
        import numpy as np

        return np.zeros(len(self), np.uint64)

    def identities(self, indices: Indices) -> list[bytes]:
        """Hashes of what is not a class; of everything where there is nothing else."""
        import hashlib

        told = [name for name, column in self.columns.items() if not isinstance(column, Class)] or list(self.columns)
        found = []
        for index in indices:
            digest = hashlib.blake2b(digest_size=16)
            for name in told:
                value = self.arrays[name][index]
                body = value.encode() if isinstance(value, str) else value.tobytes()
                digest.update(len(body).to_bytes(8, "little"))  # "1", "23" is not "12", "3"
                digest.update(body)
            found.append(digest.digest())
        return found


@dataclass(frozen=True)
class FileSamples:
    """Image files, decoded when they are read.

    Attributes:
        columns: `picture` and `label`.
        paths: One per sample.
        sizes: Bytes of each file.
        labels: int64 [N].
        fingerprint: SHA-256 over relative path, size in bytes and label of every sample: contents would take too long.
    """

    columns: Mapping[str, Column]
    paths: tuple[Path, ...]
    sizes: tuple[int, ...]
    labels: np.ndarray
    fingerprint: str
    in_memory: ClassVar[bool] = False
    sequential: ClassVar[bool] = False
    opens_files: ClassVar[bool] = True
    parts: ClassVar[None] = None
    window: ClassVar[None] = None

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, indices: Indices, *, only: Collection[str] | None = None) -> dict[str, Sequence[Any]]:
        """Pictures as Pillow holds them: scaling is cheaper on these than on arrays."""
        from bmctl.core.images import read_file

        def pictures() -> list[Any]:
            return [read_file(self.paths[index]) for index in indices]

        return labelled(pictures, self.labels, indices, only=only)

    def read_each(self, batches: Sequence[Indices]) -> Iterator[dict[str, Sequence[Any]]]:
        return map(self.read, batches)

    def name(self, index: int) -> str:
        return str(self.paths[index])

    def sketches(self) -> np.ndarray:
        """Sizes: equal images are equally large."""
        import numpy as np

        return np.array(self.sizes, np.uint64)

    def identities(self, indices: Indices) -> list[bytes]:
        return [_contents(self.paths[index]) for index in indices]


def labelled(
    pictures: Callable[[], Sequence[Any]], labels: np.ndarray, indices: Indices, *, only: Collection[str] | None
) -> dict[str, Sequence[Any]]:
    """The columns `picture` and `label`; pictures are made only where they are asked for."""
    import numpy as np

    found: dict[str, Sequence[Any]] = {}
    if only is None or "picture" in only:
        found["picture"] = pictures()
    if only is None or "label" in only:
        found["label"] = labels[np.asarray(indices, np.int64)]  # type: ignore[assignment]
    return found


def array_samples(images: np.ndarray, labels: np.ndarray, *, class_names: Sequence[str]) -> ArraySamples:
    """Freeze pictures and labels as samples and take their fingerprint.

    Args:
        images: uint8 [N, H, W] or [N, H, W, 3].
        labels: Integers [N].
        class_names: One per class, in the order of the labels.
    """
    import hashlib

    import numpy as np

    images = np.ascontiguousarray(images, dtype=np.uint8)
    labels = np.ascontiguousarray(labels, dtype=np.int64)
    digest = hashlib.sha256(f"{images.shape}{tuple(class_names)}".encode())
    digest.update(images.data)
    digest.update(labels.astype("<i8").data)
    images.flags.writeable = False
    labels.flags.writeable = False
    return ArraySamples(pictures_of(class_names), {"picture": images, "label": labels}, digest.hexdigest())


def pictures_of(class_names: Sequence[str]) -> dict[str, Column]:
    """The columns of pictures with a label."""
    return {"picture": Picture(), "label": Class(tuple(class_names))}


def _contents(path: Path) -> bytes:
    """Hash of a file's size, beginning and end: images that agree in these are the same image."""
    import hashlib

    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
            size_bytes = file.seek(0, 2)
            file.seek(max(len(head), size_bytes - _HEAD_BYTES))
            digest = hashlib.blake2b(head + file.read(_HEAD_BYTES), digest_size=16)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})", hint="check its permissions") from error
    digest.update(str(size_bytes).encode())
    return digest.digest()


@dataclass(frozen=True)
class ListedImage:
    """One image file of a list; `split` of None leaves the choice to the ratios."""

    path: Path
    size_bytes: int
    label: str
    split: str | None = None


class Carving(Protocol):
    """What a source's Config says about splits that are not given."""

    @property
    def val(self) -> float: ...
    @property
    def test(self) -> float: ...
    @property
    def seed(self) -> int: ...


def file_samples(
    rows: Sequence[ListedImage], *, split: str, config: Carving, base: Path, class_names: Sequence[str] | None = None
) -> FileSamples:
    """The rows of one split, as samples.

    A split that no row names is carved from the training rows by ratio.

    Args:
        rows: All rows of all splits.
        split: Which to give back.
        config: Ratios and seed for what has to be carved.
        base: The paths of the fingerprint and the carving are relative to it, so that a data set may be moved.
        class_names: The classes in order; None takes the labels that occur, sorted.

    Raises:
        DataError: No samples, fewer than two classes, or a class without training samples.
    """
    import hashlib

    import numpy as np

    names = tuple(class_names or in_order({row.label for row in rows}))
    if len(names) < 2:
        raise DataError(f"{base}: all images are of one class, {names[0]!r}; expected at least two")
    index = {name: position for position, name in enumerate(names)}
    labels = np.array([index[row.label] for row in rows], np.int64)
    names_of_files = [os.fsencode(os.path.relpath(row.path, base)) for row in rows]
    splits = np.array([row.split or "train" for row in rows])
    keys = [int.from_bytes(hashlib.sha256(name).digest()[:8]) for name in names_of_files]
    chosen = pick(labels, keys, splits, split=split, config=config, class_names=names, base=base).tolist()
    digest = hashlib.sha256(repr(names).encode())
    for i in chosen:
        digest.update(b"%s\0%d\0%d\n" % (names_of_files[i], rows[i].size_bytes, labels[i]))
    return FileSamples(
        columns=pictures_of(names),
        paths=tuple(rows[i].path for i in chosen),
        sizes=tuple(rows[i].size_bytes for i in chosen),
        labels=labels[chosen],
        fingerprint=digest.hexdigest(),
    )


def pick(
    labels: np.ndarray,
    keys: Sequence[int],
    splits: np.ndarray,
    *,
    split: str,
    config: Carving,
    class_names: Sequence[str],
    base: Path,
    what: str = "images",
) -> np.ndarray:
    """int64 [n]: which samples are of one split, ascending; one that none names is carved from train by ratio.

    Args:
        labels: int64 [N], of all samples of all splits.
        keys: Unsigned 64-bit integers [N] by which a sample is known: the choice among them goes by these.
        splits: Text [N].
        split: Which to give back.
        config: Ratios and seed for what has to be carved.
        class_names: In the order of the labels.
        base: Where the data is, for messages.
        what: What the samples are, for messages.

    Raises:
        DataError: A class without training samples.
    """
    import numpy as np

    from bmctl.core.chance import carve

    ratios = {name: getattr(config, name) for name in ("val", "test") if name not in splits}
    pool = np.flatnonzero(splits == "train")
    luck = np.array(keys, np.uint64)[pool]
    parts = carve(luck, labels[pool], ratios=ratios, seed=config.seed, rest="train") if len(pool) else {}
    picked = pool[parts[split]] if split in parts else np.flatnonzero(splits == split)
    train = pool[parts["train"]] if parts else pool
    absent = sorted(set(range(len(class_names))) - set(labels[train].tolist()))
    if absent:
        raise DataError(
            f"{base}: no training {what} of the class {class_names[absent[0]]!r}",
            hint=f"every class needs at least 3 {what}, of which one trains, one validates, one tests",
        )
    return picked


def in_order(labels: set[str]) -> list[str]:
    """Class names, sorted: whole numbers by value, before names."""
    return sorted(labels, key=_label_order)


def _label_order(label: str) -> tuple[int, int, str]:
    return (0, int(label), label) if label.isascii() and label.isdigit() else (1, 0, label)
