"""An evaluation on the way: the task's metric on validation data, by all processes together."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import nullcontext

import numpy as np
import torch

from bmctl.backends.eager import open_module
from bmctl.core.evaluation import Evaluation, main_metric
from bmctl.core.runner import Bounds, Closing, Runner
from bmctl.engine.batch import moved
from bmctl.engine.loading.arrays import array_batches
from bmctl.engine.parallel import Vote, gather
from bmctl.engine.training.training import Position, Training, diverged, kept_weights
from bmctl.schema import Signature


class StoppedError(Exception):
    """A signal came while an evaluation ran; all ranks agree on it."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


def validate(training: Training, position: Position) -> None:
    """Evaluate the weights of this position, and keep them if they are the best so far.

    Raises:
        StoppedError: A signal came before the end.
        DivergedError: The training loss is not finite.
    """
    group = training.context.group
    means = gather(group, dict(zip(("loss", "score"), position.means(), strict=True)))
    if not all(math.isfinite(mean["loss"]) for mean in means):
        raise diverged(training, position)
    evaluation = evaluate(training, step=position.step)
    value = evaluation.value
    least = training.fit.early_stop.min_delta if training.fit.early_stop is not None else 0.0
    best = position.best_value
    better_by = math.inf if best is None else main_metric(training.task).gain(value, over=best)
    position.waited = 0 if better_by > least else position.waited + 1
    if better_by > 0:
        position.best_value, position.best_step, position.best_evaluation = value, position.step, evaluation
        position.best = kept_weights(training) if training.fit.select == "best" else {}
    training.log.evaluation(
        position.step,
        loss=float(np.mean([mean["loss"] for mean in means])),
        metric=float(np.mean([mean["score"] for mean in means])),
        val_metric=value,
        val_loss=evaluation.values.get("loss"),
        is_best=better_by > 0,
    )
    position.validated_step = position.step
    position.sums.zero_()


def evaluate(training: Training, *, step: int) -> Evaluation:
    """The task's metric on the validation data, the same on every rank; with `ema` that of the averaged weights."""
    was_training = training.model.training
    training.model.eval()
    try:
        with training.average.in_place() if training.average is not None else nullcontext():
            found: Evaluation = training.task.evaluate(
                runners(training),
                _until_stopped(training, step),
                config=training.task_config,
                facts=training.train.facts,
            )
            return found
    finally:
        training.model.train(was_training)


def runners(training: Training) -> dict[str, Runner]:
    """The task's graphs over the model that is trained.

    Where the model itself is the one graph, each rank computes its share of the rows; the graphs of several, which may
    call each other in turn, are computed whole by every rank, in lock step.
    """
    signatures = training.task.signatures(training.train.specs, training.train.facts, training.model)
    modules = training.task.modules(training.model)
    if _is_whole(training):
        return {name: _Together(training, signature) for name, signature in signatures.items()}
    return {name: open_module(modules[name], signature=signature) for name, signature in signatures.items()}


def _is_whole(training: Training) -> bool:
    return list(training.task.modules(training.model).values()) == [training.model]


class _Together(Closing):
    """The model on rows of which each rank computes its share; see core.runner.Runner."""

    def __init__(self, training: Training, signature: Signature) -> None:
        self._training, self.signature = training, signature
        self.bounds: dict[str, Bounds] = {}

    def run(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        device = self._training.context.group.device
        batch = moved({name: torch.from_numpy(array) for name, array in feed.items()}, device)
        with torch.no_grad():
            found = self._training.shared.outputs(batch)
        return {name: each.cpu().numpy() for name, each in found.items()}


def _until_stopped(training: Training, step: int) -> Iterator[dict[str, np.ndarray]]:
    context = training.context
    rank, world = (context.group.rank, context.group.world) if _is_whole(training) else (0, 1)
    for batch in array_batches(training.val, batch_size=training.batch_size, rank=rank, world=world):
        signum = Vote(context.group, [context.stop.requested or 0]).result()[0]
        if signum:
            raise StoppedError(signum)
        context.beat(step, "evaluating")
        yield batch
