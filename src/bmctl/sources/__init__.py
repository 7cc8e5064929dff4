"""One file = one kind of data. A new source is a file here and a line in SOURCES."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING, Protocol

from bmctl.schema import Strict
from bmctl.sources import bundled, csv, digits, folder, idx

if TYPE_CHECKING:
    import numpy as np


class Samples(Protocol):
    """One split of one source.

    Attributes:
        labels: int64 [N].
        fingerprint: SHA-256 over what identifies the samples; it changes when the data does.
    """

    class_names: tuple[str, ...]
    labels: np.ndarray
    fingerprint: str

    def read(self, indices: Sequence[int] | np.ndarray) -> Sequence[np.ndarray] | np.ndarray:
        """Decoded images, each uint8 [H, W] or [H, W, 3], in the order of `indices`; as one array where sizes agree."""
        ...


class Source(Protocol):
    """A module of this folder. `kind` in Config names it."""

    Config: type[Strict]

    def open(self, config: Strict, *, split: str) -> Samples:
        """The samples of `train`, `val` or `test`, always the same ones in the same order.

        Raises:
            DataError: Missing, empty, corrupt or inconsistent data.
        """
        ...


SOURCES: Mapping[str, ModuleType] = MappingProxyType(
    {"bundled": bundled, "digits": digits, "idx": idx, "folder": folder, "csv": csv}
)
