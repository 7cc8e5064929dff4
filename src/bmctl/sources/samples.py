"""What sources give back: samples held in memory, or read from files when they are asked for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from bmctl.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image


@dataclass(frozen=True)
class ArraySamples:
    """Images of one size, in memory.

    Attributes:
        images: uint8 [N, H, W] or [N, H, W, 3], read-only.
        labels: int64 [N].
        fingerprint: SHA-256 over shape, pixels and labels.
    """

    class_names: tuple[str, ...]
    images: np.ndarray
    labels: np.ndarray
    fingerprint: str

    def read(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """uint8 [n, H, W] or [n, H, W, 3], in the order of `indices`."""
        import numpy as np

        return self.images[np.asarray(indices, dtype=np.int64)]


@dataclass(frozen=True)
class FileSamples:
    """Image files, decoded when they are read.

    Attributes:
        paths: One per sample.
        sizes: Bytes of each file.
        labels: int64 [N].
        fingerprint: SHA-256 over relative path, size in bytes and label of every sample: contents would take too long.
    """

    class_names: tuple[str, ...]
    paths: tuple[Path, ...]
    sizes: tuple[int, ...]
    labels: np.ndarray
    fingerprint: str

    def read(self, indices: Sequence[int] | np.ndarray) -> list[np.ndarray]:
        """Decoded images, each uint8 [H, W] or [H, W, 3], in the order of `indices`."""
        import numpy as np

        return [np.asarray(image) for image in self.pictures(indices)]

    def pictures(self, indices: Sequence[int] | np.ndarray) -> list[Image.Image]:
        """The same as Pillow holds them, of mode L or RGB: scaling is cheaper on these."""
        from bmctl.core.images import read_file

        return [read_file(self.paths[index]) for index in indices]


def array_samples(images: np.ndarray, labels: np.ndarray, *, class_names: Sequence[str]) -> ArraySamples:
    """Freeze arrays as samples and take their fingerprint.

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
    return ArraySamples(tuple(class_names), images, labels, digest.hexdigest())


@dataclass(frozen=True)
class Row:
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
    rows: Sequence[Row], *, split: str, config: Carving, base: Path, class_names: Sequence[str] | None = None
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
        class_names=names,
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
            f"{base}: no training images of the class {class_names[absent[0]]!r}",
            hint="every class needs at least 3 images, of which one trains, one validates, one tests",
        )
    return picked


def in_order(labels: set[str]) -> list[str]:
    """Class names, sorted: whole numbers by value, before names."""
    return sorted(labels, key=_label_order)


def _label_order(label: str) -> tuple[int, int, str]:
    return (0, int(label), label) if label.isascii() and label.isdigit() else (1, 0, label)
