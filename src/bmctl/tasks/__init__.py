"""One file = one task: what a batch is, its loss, its metric. A new task is a file here and a line in TASKS."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING, Protocol

from bmctl.core.evaluation import Evaluation
from bmctl.schema import Strict
from bmctl.tasks import classify

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

Part = Callable[["np.ndarray"], "np.ndarray"]
"""A graph as a function of arrays: eager module, ONNX file and engine all look like this to a metric."""


class Feed(Protocol):
    """Where a training's batches come from, where a task brings that along, such as a replay memory.

    What it owns is part of every checkpoint: going on from one, it is made anew, then told by `load`.
    """

    def batches(self, *, epoch: int, start_step: int) -> Iterator[dict[str, torch.Tensor]]:
        """The rest of an epoch, from the step `start_step` of it on: this process's share, on the device."""
        ...

    def after(self, step: int) -> None:
        """So many optimizer steps are done: called after each, before evaluations and checkpoints."""
        ...

    def tensors(self) -> dict[str, torch.Tensor]:
        """What this process owns, by name; copied where a checkpoint is written, between two steps."""
        ...

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put back, in place, what `tensors` gave; on the CPU, and nothing where there was nothing.

        Raises:
            ValueError: It does not fit; so do RuntimeError, TypeError and KeyError.
        """
        ...


class Task(Protocol):
    """A module of this folder. `kind` in Config names it.

    A task may have a `feed` as well, which takes the place of the loader: a function that is called as
    ``feed(train, *, config, model, seed, batch_size, rank, world, device)`` and gives a context manager of a Feed. It
    is called again for what is tried before the first step, so that making one may change nothing outside of it.

    Attributes:
        GIVES: Names of the model's outputs, in order.
    """

    Config: type[Strict]
    GIVES: tuple[str, ...]

    def loss(
        self, outputs: Mapping[str, torch.Tensor], batch: Mapping[str, torch.Tensor], *, config: Strict
    ) -> torch.Tensor: ...
    def score(self, outputs: Mapping[str, torch.Tensor], batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Per sample score on the device, for progress display."""
        ...

    def distill_loss(
        self, student: Mapping[str, torch.Tensor], teacher: Mapping[str, torch.Tensor], *, temperature: float
    ) -> torch.Tensor: ...
    def parts(self, model: nn.Module) -> dict[str, nn.Module]: ...
    def evaluate(
        self, parts: Mapping[str, Part], batches: Iterable[tuple[np.ndarray, np.ndarray]], *, config: Strict
    ) -> Evaluation: ...


TASKS: Mapping[str, ModuleType] = MappingProxyType({"classify": classify})
