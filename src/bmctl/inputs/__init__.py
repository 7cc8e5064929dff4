"""One module = one kind of input: from what a source gives to what a model takes. A new input is a line in INPUTS.

A recipe's `data.input` asks (Config), `resolve` decides with the publisher and the data (Spec, files), and from then on
training, evaluation, export and inference encode alike. Records are columns by name, fields arrays by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

from bmctl.core.columns import Column
from bmctl.core.owncode import OwnCode
from bmctl.core.plugins import Room, plugins, section
from bmctl.schema import Emit, Span, Strict, TensorSpec

if TYPE_CHECKING:
    import numpy as np
    import torch

    from bmctl.core.chance import Luck
    from bmctl.core.requests import OnBad, Requests

Records = Mapping[str, Sequence[Any]]
"""Values of some samples, by column."""


class Resolved(NamedTuple):
    """An input as it was decided: all that encoding needs, and what a package keeps of it.

    Attributes:
        spec: Spec of one of INPUTS.
        files: Contents by name, such as ``tokenizer.json``.
    """

    spec: Any
    files: Mapping[str, bytes] = MappingProxyType({})


class Examples(Protocol):
    """The training samples that the recipe's limits leave, without the columns that the task takes as targets.

    Attributes:
        columns: Those of the kinds that the input reads.
        in_memory: Reading them all costs nothing.
    """

    @property
    def columns(self) -> Mapping[str, Column]: ...
    @property
    def in_memory(self) -> bool: ...
    def __len__(self) -> int: ...
    def read(self, most: int | None = None) -> Records:
        """At most so many, the classes in equal numbers as far as they last; None reads all."""
        ...


class Input(Protocol):
    """A module of this folder; `kind` in Config and Spec names it.

    One that can be written as well, such as a text, has ``decode(values, *, given)``, and its `resolve` takes
    ``writes``, which says that the task will.

    Attributes:
        Config: The recipe's `data.input`: None is left to publisher and data; and what only training does.
        Spec: Everything decided; it stands in manifests.
        READS: Kinds of the columns that it reads; it is given those of these kinds that the task does not take.
    """

    Config: type[Strict]
    Spec: type[Strict]
    READS: tuple[str, ...]

    def check(self, given: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
        """Key below `data.input`, message and hint of numbers that do not fit together; `given` may hold anything."""
        ...

    def resolve(
        self, asked: Strict, examples: Examples, *, published: Mapping[str, Any]
    ) -> tuple[Strict, dict[str, bytes]]:
        """Spec and files: what the recipe says, over what the model's publisher says, over what the training data say.

        Args:
            asked: The recipe's Config.
            examples: Read only where neither says enough.
            published: What the publisher says, by the Spec's names; None, or not there, where he does not.

        Raises:
            DataError: The data say nothing that would do.
            RecipeError: The recipe contradicts the publisher, or itself.
        """
        ...

    def specs(self, spec: Strict) -> tuple[TensorSpec, ...]:
        """What the model takes, in order."""
        ...

    def fitted(self, asked: Strict, inputs: Sequence[TensorSpec]) -> Strict:
        """The recipe's Config, with what the inputs of a foreign graph leave no choice about."""
        ...

    def axes(self, spec: Strict) -> Mapping[str, Span]:
        """Sizes of the free axes of `specs` besides the batch: from the smallest to the largest that models take."""
        ...

    def told(self, given: Resolved) -> dict[str, Any]:
        """What a model's constructor must know besides, such as the size of a vocabulary."""
        ...

    def prepare(self, samples: Any, *, given: Resolved, folder: Path | None) -> Any:
        """The samples, or the same ones with columns that cost less to encode: once, before there are loader processes.

        Args:
            samples: Of one of the sources.
            given: As decided.
            folder: Where what was made may be kept, by the samples' fingerprint; None: nowhere.
        """
        ...

    def encode(
        self, records: Records, *, given: Resolved, asked: Strict | None = None, luck: Luck | None = None
    ) -> dict[str, np.ndarray]:
        """Arrays [n, ...] of fields, not finished: as small as they are handed from process to process.

        Pure: the same for the same records and luck, in every process and for every cut of an epoch into batches.

        Args:
            records: Columns of the kinds in READS.
            given: As decided.
            asked: The recipe's Config, for what it says about training; None in evaluation and inference.
            luck: Of the samples, one for each; None in evaluation and inference.
        """
        ...

    def finish(
        self,
        fields: Mapping[str, torch.Tensor],
        *,
        given: Resolved,
        channels_last: bool = False,
        empty: Callable[[tuple[int, ...], torch.dtype], torch.Tensor] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Encoded fields as the model takes them, in the order of `specs`, on the device where they are.

        Args:
            fields: Tensors of what `encode` gave.
            given: As decided.
            channels_last: Memory layout of what has channels.
            empty: Makes tensors on the host, such as in shared memory; None is torch's.
        """
        ...

    def unprepared(self, arrays: Mapping[str, np.ndarray], *, given: Resolved, name: str) -> Records | None:
        """Records, where arrays that were given for prediction are not the model's fields; None where they are.

        Raises:
            DataError: They are neither.
        """
        ...

    def requests(
        self, source: str | Path, *, given: Resolved, batch_size: int, on_bad: OnBad = "refuse", emit: Emit
    ) -> Requests:
        """What `infer` is pointed at, encoded and finished in batches; files are read as they are needed.

        Raises:
            DataError: Nothing there, or nothing that fits. While reading: bad files.
        """
        ...


INPUTS: Mapping[str, ModuleType] = plugins(
    Room(__name__, needs=Input, models=("Config", "Spec")),
    "image",
    "text",
    "tabular",
    "observation",
)

# The table is the single source of what a recipe and a manifest may name; type checkers cannot read a table.
if TYPE_CHECKING:
    InputConfig: TypeAlias = Any
    InputSpec: TypeAlias = Any
else:
    InputConfig = section(INPUTS, own=OwnCode)
    InputSpec = section(INPUTS, model="Spec")


def specs(given: Resolved) -> tuple[TensorSpec, ...]:
    """What the model takes, in order."""
    found: tuple[TensorSpec, ...] = INPUTS[given.spec.kind].specs(given.spec)
    return found
