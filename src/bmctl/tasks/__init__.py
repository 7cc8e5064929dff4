"""One file = one task: its targets, loss, metrics and graphs. A new task is a file here and a line in TASKS."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

from bmctl.core.columns import Column
from bmctl.core.evaluation import Evaluation, Metric
from bmctl.core.plugins import Room, plugins
from bmctl.core.runner import Runner
from bmctl.schema import Signature, Strict, TensorSpec

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

Tensors = Mapping[str, "torch.Tensor"]
"""What the model takes and what it is to give, flat, samples along the first axis."""


@dataclass(frozen=True)
class Part:
    """One graph of a task: a module, called by position, and what it takes and gives."""

    module: nn.Module
    signature: Signature


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
    ``feed(train, *, config, model, teacher, seed, batch_size, rank, world, device)`` and gives a context manager of a
    Feed. It is called again for what is tried before the first step, so that making one may change nothing outside of
    it. ``epoch_steps(config)`` beside it says how many steps count as an epoch, where samples say nothing of that.

    One whose samples can be seen may have a ``film(runners, batch, *, config, facts) -> bytes``: an animated GIF of
    the first sample of a batch.

    A task that writes what the input reads says ``WRITES = True``: inputs must be able to `decode` then, and `predict`
    is given that as `decode`. A task whose graphs have free axes of its own has ``axes(facts)``, their sizes by name.
    One whose samples are no requests has ``rehearse(runners, batch, *, config, facts)``, which calls the graphs as
    predicting does: calls are recorded from it in place of `predict`.

    Attributes:
        Facts: What the task must know of the data to be run again without them; manifests keep it.
        GIVES: Names of the model's outputs, in the order in which it gives them.
        COLUMNS: Of a prediction that fit in a table.
        METRICS: By name, the main one first; see core.evaluation.Counting for what reads an evaluation's counts.
        SCORED: Which of them `score` gives: one that is a mean over samples.
    """

    Config: type[Strict]
    Facts: type[Strict]
    GIVES: tuple[str, ...]
    COLUMNS: tuple[str, ...]
    METRICS: Mapping[str, Metric]
    SCORED: str

    def needs(self, config: Any) -> tuple[str, ...]:
        """Columns that the targets are taken from: the model does not see them."""
        ...

    def facts(self, columns: Mapping[str, Column], config: Any, told: Mapping[str, Any]) -> Strict | None:
        """Args:
        told: What the input tells models, such as the size of a vocabulary. Before that is decided it is empty: then
            the columns are looked at, and a task that needs it gives None.
        """
        ...

    def balance(self, config: Any) -> str | None:
        """The column of which `limit` takes the classes in equal numbers; None takes samples as they come."""
        ...

    def targets(self, records: Mapping[str, Sequence[Any]], *, config: Any, facts: Any) -> dict[str, np.ndarray]: ...
    def told(self, facts: Any) -> dict[str, Any]:
        """What a model's constructor must know, such as the number of classes."""
        ...

    def loss(self, outputs: Tensors, batch: Tensors, *, config: Any, facts: Any) -> torch.Tensor: ...
    def score(self, outputs: Tensors, batch: Tensors, *, facts: Any) -> torch.Tensor:
        """The metric SCORED per sample, on the device, for progress display."""
        ...

    def distill_loss(self, student: Tensors, teacher: Tensors, *, temperature: float) -> torch.Tensor: ...
    def signatures(
        self, given: Sequence[TensorSpec], facts: Any, model: nn.Module | None = None
    ) -> dict[str, Signature]:
        """What each graph takes and gives.

        Args:
            given: What the input makes of samples.
            model: Where sizes are its own affair, such as those of a cache; None of a graph that came without one.
        """
        ...

    def modules(self, model: nn.Module) -> dict[str, nn.Module]:
        """The same graphs as modules over one model, called by position."""
        ...

    def evaluate(
        self, runners: Mapping[str, Runner], batches: Iterable[Mapping[str, np.ndarray]], *, config: Any, facts: Any
    ) -> Evaluation:
        """The metrics on one split.

        Args:
            runners: By the names of `signatures`; they take any number of samples.
            batches: The model's fields and the targets.
            facts: Of what is evaluated, not of the split.
        """
        ...

    def metrics(self, counts: np.ndarray) -> dict[str, float]: ...
    def means(self, counts: np.ndarray) -> dict[str, np.ndarray]: ...
    def predict(
        self, runners: Mapping[str, Runner], batch: Mapping[str, np.ndarray], *, config: Any, facts: Any
    ) -> Iterator[dict[str, Any]]:
        """One JSON object per sample; what export, calibration and timings record their calls from."""
        ...

    def words(self, prediction: Mapping[str, Any]) -> str:
        """A prediction in a few words."""
        ...


def _judging(module: Any, name: str) -> None:
    """A user's own task may take `evaluate` from another: the evaluation is its own, and so are the metrics."""
    evaluate = module.evaluate

    def evaluated(*args: Any, **options: Any) -> Evaluation:
        found: Evaluation = evaluate(*args, **options)
        return replace(found, task=name, values=module.metrics(found.counts))

    module.evaluate = evaluated


TASKS: Mapping[str, ModuleType] = plugins(
    Room(__name__, needs=Task, adapt=_judging),
    "classify",
    "regress",
    "dqn",
    "lm",
)


def writes(kind: str) -> bool:
    """Whether a task makes what its input reads, such as texts."""
    return bool(getattr(TASKS[kind], "WRITES", False))


def parts_of(task: Any, model: nn.Module, signatures: Mapping[str, Signature]) -> dict[str, Part]:
    """The graphs of a model by name.

    Args:
        task: A module of TASKS; None where nobody knows: then the model itself is the one graph.
        signatures: As the manifest has them.
    """
    modules = task.modules(model) if task is not None else dict.fromkeys(signatures, model)
    return {name: Part(modules[name], signature) for name, signature in signatures.items()}
