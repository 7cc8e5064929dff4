"""The chosen samples of one split, as the model sees them: records encoded, in the order of an epoch or as they stand.

n: samples of a batch. N: samples of a split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch

from bmctl.core.chance import Luck
from bmctl.core.columns import Column
from bmctl.engine.loading.order import Plan, sample_order, windowed_order
from bmctl.errors import DataError
from bmctl.inputs import INPUTS, Records, Resolved
from bmctl.schema import TensorSpec
from bmctl.sources import Samples
from bmctl.tasks import TASKS

Arrays = dict[str, np.ndarray]
Tensors = dict[str, torch.Tensor]
Empty = Callable[[tuple[int, ...], torch.dtype], torch.Tensor]


class Encoded(NamedTuple):
    """A batch on its way: the input's fields, finished or not, and the task's targets."""

    fields: Mapping[str, Any]
    targets: Mapping[str, Any]


@dataclass(frozen=True)
class Split:
    """Attributes:
    indices: int64 [N], into `samples`, in a fair order; ascending where they can only be read in sequence.
    fingerprint: Changes when the samples or the choice among them do.
    given: From records to the model's fields.
    task: The recipe's; None for samples without targets.
    facts: What the data say to the task.
    asked: The recipe's input, for what it says about training; None for evaluation.
    """

    samples: Samples
    indices: np.ndarray
    fingerprint: str
    given: Resolved
    task: Any = None
    facts: Any = None
    asked: Any = None

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def in_memory(self) -> bool:
        return self.samples.in_memory

    @property
    def input(self) -> ModuleType:
        """The module of INPUTS that encodes."""
        return INPUTS[self.given.spec.kind]

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        """What the model takes, in order."""
        found: tuple[TensorSpec, ...] = self.input.specs(self.given.spec)
        return found

    @cached_property
    def columns(self) -> dict[str, Column]:
        """Those that are encoded."""
        return input_columns(self.samples.columns, kind=self.given.spec.kind, task=self.task)

    def targets(self, positions: np.ndarray) -> Arrays:
        """What the task wants to know of these samples, without reading their inputs."""
        if self.task is None:
            return {}
        needs = TASKS[self.task.kind].needs(self.task)
        return self._targets(self.samples.read(self.indices[positions], only=needs))

    def arrays(self, positions: Sequence[int] | np.ndarray) -> Encoded:
        """Finished fields, unaugmented, and targets."""
        return self._finished(self.samples.read(self.indices[positions]))

    def arrays_in_order(self, steps: Sequence[np.ndarray]) -> Iterator[Encoded]:
        """`arrays` of each step, in one pass where samples can only be read in sequence and the steps are in it."""
        return map(self._finished, self.samples.read_each([self.indices[positions] for positions in steps]))

    def order(self, *, seed: int, epoch: int) -> np.ndarray:
        """int64 [N]: the positions of one epoch of training."""
        if self.samples.window is not None and self.samples.parts is not None:
            parts = self.samples.parts[self.indices]
            return windowed_order(parts, window=self.samples.window, seed=seed, epoch=epoch)
        return sample_order(len(self), seed=seed, epoch=epoch)

    def encoded(self, plan: Plan, *, first: int = 0, every: int = 1) -> Iterator[Encoded]:
        """Arrays of the batches of a plan, augmented where that is asked for, not finished.

        Args:
            plan: Which part of which epoch.
            first: Counted from the plan's own first step.
            every: 1 gives all steps from there, 2 every second one.
        """
        steps = plan.steps(self.order(seed=plan.seed, epoch=plan.epoch))[first::every]
        chosen = [self.indices[positions] for positions in steps]
        for indices, records in zip(chosen, self.samples.read_each(chosen), strict=True):
            luck = Luck(plan.seed, plan.epoch, indices) if self.asked is not None else None
            fields = self.input.encode(self._seen(records), given=self.given, asked=self.asked, luck=luck)
            yield Encoded(fields, self._targets(records))

    def finished(self, fields: Tensors, *, channels_last: bool = False, empty: Empty | None = None) -> Tensors:
        """Encoded fields as the model takes them, where they are."""
        made: Tensors = self.input.finish(fields, given=self.given, channels_last=channels_last, empty=empty)
        return made

    def _finished(self, records: Records) -> Encoded:
        fields = self.input.encode(self._seen(records), given=self.given)
        made = self.finished({name: as_tensor(array) for name, array in fields.items()})
        return Encoded({name: tensor.numpy() for name, tensor in made.items()}, self._targets(records))

    def _seen(self, records: Records) -> Records:
        return {name: records[name] for name in self.columns}

    def _targets(self, records: Records) -> Arrays:
        if self.task is None:
            return {}
        found: Arrays = TASKS[self.task.kind].targets(records, config=self.task, facts=self.facts)
        return found


def as_tensor(array: np.ndarray) -> torch.Tensor:
    """The array's own memory, where torch can have it."""
    shareable = array.flags.writeable and min(array.strides, default=0) >= 0
    return torch.from_numpy(array if shareable else array.copy())


def input_columns(columns: Mapping[str, Column], *, kind: str, task: Any) -> dict[str, Column]:
    """Those that an input encodes: of the kinds that it reads, without what the task takes its targets from.

    Raises:
        DataError: There are none.
    """
    taken = TASKS[task.kind].needs(task) if task is not None else ()
    wanted = INPUTS[kind].READS
    found = {name: column for name, column in columns.items() if column.kind in wanted and name not in taken}
    if not found:
        raise DataError(
            f"data.input: {kind} encodes columns of {' or '.join(wanted)}, and the samples of data.source have "
            f"{', '.join(columns)}",
            hint="set data.input.kind to what fits the source",
        )
    return found
