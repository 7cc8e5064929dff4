"""One file = one task: what a batch is, its loss, its metric. A new task is a file here and a line in TASKS."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING, Any, Protocol

from bmctl.core.columns import Column
from bmctl.core.evaluation import Evaluation
from bmctl.schema import Strict
from bmctl.tasks import classify

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

Part = Callable[["np.ndarray"], "np.ndarray"]
"""A graph as a function of arrays: eager module, ONNX file and engine all look like this to a metric."""


class Task(Protocol):
    """A module of this folder. `kind` in Config names it.

    Attributes:
        Facts: What the data say that a model has to know, such as class names; it stands in manifests.
    """

    Config: type[Strict]
    Facts: type[Strict]

    def needs(self, config: Strict) -> tuple[str, ...]:
        """Columns that the targets are taken from: the model does not see them."""
        ...

    def facts(self, columns: Mapping[str, Column], config: Strict) -> Strict: ...
    def told(self, facts: Strict) -> Mapping[str, Any]:
        """What the model has to know of them, such as ``num_classes``."""
        ...

    def balance(self, config: Strict) -> str | None:
        """The column of which `limit` takes the classes in equal numbers; None takes samples as they come."""
        ...

    def targets(
        self, records: Mapping[str, Sequence[Any]], *, config: Strict, facts: Strict
    ) -> dict[str, np.ndarray]: ...
    def loss(self, outputs: torch.Tensor, targets: torch.Tensor, *, config: Strict) -> torch.Tensor: ...
    def score(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Per sample score on the device, for progress display."""
        ...

    def distill_loss(self, student: torch.Tensor, teacher: torch.Tensor, *, temperature: float) -> torch.Tensor: ...
    def parts(self, model: nn.Module) -> dict[str, nn.Module]: ...
    def evaluate(
        self, parts: Mapping[str, Part], batches: Iterable[tuple[np.ndarray, np.ndarray]], *, config: Strict
    ) -> Evaluation: ...


TASKS: Mapping[str, ModuleType] = MappingProxyType({"classify": classify})
