"""One file = one task: what a batch is, its loss, its metric. A new task is a file here and a line in TASKS."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING, Protocol

from bmctl.core.evaluation import Evaluation, Metric
from bmctl.schema import Strict
from bmctl.tasks import classify

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

Part = Callable[["np.ndarray"], "np.ndarray"]
"""A graph as a function of arrays: eager module, ONNX file and engine all look like this to a metric."""


class Task(Protocol):
    """A module of this folder. `kind` in Config names it."""

    Config: type[Strict]
    METRICS: Mapping[str, Metric]
    """By name, the main one first; see core.evaluation.Counting for what reads an evaluation's counts."""

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor, *, config: Strict) -> torch.Tensor: ...
    def score(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Per sample score on the device, for progress display."""
        ...

    def distill_loss(self, student: torch.Tensor, teacher: torch.Tensor, *, temperature: float) -> torch.Tensor: ...
    def parts(self, model: nn.Module) -> dict[str, nn.Module]: ...
    def evaluate(
        self, parts: Mapping[str, Part], batches: Iterable[tuple[np.ndarray, np.ndarray]], *, config: Strict
    ) -> Evaluation: ...
    def metrics(self, counts: np.ndarray) -> dict[str, float]: ...
    def means(self, counts: np.ndarray) -> dict[str, np.ndarray]: ...


TASKS: Mapping[str, ModuleType] = MappingProxyType({"classify": classify})
