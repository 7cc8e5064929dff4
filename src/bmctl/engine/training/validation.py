"""An evaluation on the way: the task's metric on validation data, by all processes together."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import nullcontext

import numpy as np
import torch

from bmctl.core.evaluation import Evaluation
from bmctl.engine.batch import moved
from bmctl.engine.loading.arrays import array_batches
from bmctl.engine.parallel import Vote, gather
from bmctl.engine.training.training import Position, Training, diverged, kept_weights


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
    better_by = math.inf if position.best_value is None else value - position.best_value
    position.waited = 0 if better_by > least else position.waited + 1
    if better_by > 0:
        position.best_value, position.best_step, position.best_evaluation = value, position.step, evaluation
        position.best = kept_weights(training) if training.fit.select == "best" else {}
    training.log.evaluation(
        position.step,
        loss=float(np.mean([mean["loss"] for mean in means])),
        metric=float(np.mean([mean["score"] for mean in means])),
        val_metric=value,
        val_loss=evaluation.extra.get("loss"),
        is_best=better_by > 0,
    )
    position.validated_step = position.step
    position.sums.zero_()


def evaluate(training: Training, *, step: int) -> Evaluation:
    """The task's metric on the validation data, the same on every rank; with `ema` that of the averaged weights."""
    was_training, (field,), (output,) = training.model.training, training.takes, training.gives
    training.model.eval()
    try:
        with training.average.in_place() if training.average is not None else nullcontext():
            return training.task.evaluate(
                {"model": lambda x: outputs(training, {field: x})[output]},
                _until_stopped(training, step),
                config=training.task_config,
            )
    finally:
        training.model.train(was_training)


def outputs(training: Training, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the model gives for rows of which each rank computes its share."""
    batch = moved({name: torch.from_numpy(array) for name, array in feed.items()}, training.context.group.device)
    with torch.no_grad():
        found = training.shared.outputs(batch)
    return {name: each.cpu().numpy() for name, each in found.items()}


def _until_stopped(training: Training, step: int) -> Iterator[dict[str, np.ndarray]]:
    context = training.context
    rank, world = context.group.rank, context.group.world
    for batch in array_batches(training.val, batch_size=training.batch_size, rank=rank, world=world):
        signum = Vote(context.group, [context.stop.requested or 0]).result()[0]
        if signum:
            raise StoppedError(signum)
        context.beat(step, "evaluating")
        yield batch
