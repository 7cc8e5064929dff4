"""One file = one kind of data. A new source is a file here and a line in SOURCES."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

from bmctl.core.columns import Column
from bmctl.core.plugins import Room, plugins
from bmctl.schema import Strict

if TYPE_CHECKING:
    import numpy as np

    from bmctl.sources.samples import Indices


class Samples(Protocol):
    """One split of one source.

    Attributes:
        columns: What each sample holds, by name; pictures with a label are `picture` and `label`.
        fingerprint: SHA-256 over what identifies the samples; it changes when the data does.
        in_memory: Reading costs nothing.
        sequential: They can only be read in the order in which they stand: reading in any other holds what comes early.
        parts: Integers [N], the file of each, for samples in files of many; those of one file stand in its order.
        window: Training shuffles files, and samples within such a window; None shuffles all.
        opens_files: `identities` opens a file for each sample.
    """

    @property
    def columns(self) -> Mapping[str, Column]: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def in_memory(self) -> bool: ...
    @property
    def sequential(self) -> bool: ...
    @property
    def parts(self) -> np.ndarray | None: ...
    @property
    def window(self) -> int | None: ...
    @property
    def opens_files(self) -> bool: ...
    def __len__(self) -> int: ...

    def read(self, indices: Indices, *, only: Collection[str] | None = None) -> dict[str, Sequence[Any]]:
        """The columns' values, or only some columns', in the order of `indices`; see bmctl.core.columns."""
        ...

    def read_each(self, batches: Sequence[Indices]) -> Iterator[dict[str, Sequence[Any]]]:
        """`read` of each; where samples are sequential and the indices ascend, in one pass that holds nothing."""
        ...

    def name(self, index: int) -> str:
        """Where a sample stands, for messages."""
        ...

    def sketches(self) -> np.ndarray:
        """uint64 [N] at no cost, equal for equal samples; often equal for others too."""
        ...

    def identities(self, indices: Indices) -> list[bytes]:
        """What a sample is told by, whatever its label and split; equal for equal samples."""
        ...


class Source(Protocol):
    """A module of this folder. `kind` in Config names it.

    Attributes:
        INPUT: The kind of `data.input` that a recipe means which does not say.
    """

    Config: type[Strict]
    INPUT: str

    def open(self, config: Strict, *, split: str) -> Samples:
        """The samples of `train`, `val` or `test`, always the same ones in the same order.

        Raises:
            DataError: Missing, empty, corrupt or inconsistent data.
        """
        ...


SOURCES: Mapping[str, ModuleType] = plugins(
    Room(__name__, needs=Source),
    "bundled",
    "commands",
    "digits",
    "idx",
    "folder",
    "csv",
    "webdataset",
    "stream",
    "table",
    "tabular",
    "gymnasium",
    "corpus",
)
