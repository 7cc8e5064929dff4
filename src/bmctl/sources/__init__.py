"""One file = one kind of data. A new source is a file here and a line in SOURCES."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from bmctl.schema import Strict
from bmctl.sources import bundled, csv, digits, folder, idx, stream, webdataset

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image


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


@runtime_checkable
class Pictures(Samples, Protocol):
    """Samples that are decoded when they are read."""

    def pictures(self, indices: Sequence[int] | np.ndarray) -> Iterable[Image.Image]:
        """As `read`, as Pillow holds them, of mode L or RGB."""
        ...


@runtime_checkable
class Sharded(Pictures, Protocol):
    """Samples in files of many, which are best read in the order in which they stand.

    Attributes:
        parts: Integers [N], the file of each; samples of one file are in the order in which they stand.
        window: Training shuffles files, and samples within such a window; None shuffles all.
        digests: uint64 [N], equal for equal images.
    """

    parts: np.ndarray
    window: int | None
    digests: np.ndarray

    def name(self, index: int) -> str:
        """Where a sample stands, for messages."""
        ...


@runtime_checkable
class Stream(Sharded, Protocol):
    """Samples that can only be read in the order in which they stand.

    Attributes:
        lines: int64 [N], place in its file.
    """

    lines: np.ndarray

    def pictures(self, indices: Sequence[int] | np.ndarray) -> Iterator[Image.Image]:
        """One by one; `indices` that ascend file by file cost one pass and hold nothing."""
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
    {
        "bundled": bundled,
        "digits": digits,
        "idx": idx,
        "folder": folder,
        "csv": csv,
        "webdataset": webdataset,
        "stream": stream,
    }
)
