"""What sources give back: samples held in memory, or read from files when they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


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
        labels: int64 [N].
        fingerprint: SHA-256 over relative path, size in bytes and label of every sample: contents would take too long.
    """

    class_names: tuple[str, ...]
    paths: tuple[Path, ...]
    labels: np.ndarray
    fingerprint: str

    def read(self, indices: Sequence[int] | np.ndarray) -> list[np.ndarray]:
        """Decoded images, each uint8 [H, W] or [H, W, 3], in the order of `indices`."""
        from bmctl.engine.images import decode

        return [decode(self.paths[index]) for index in indices]


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
