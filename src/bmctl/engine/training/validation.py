"""An evaluation on the way: the task's metric on validation data, by all processes together."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext

import numpy as np
import torch

from bmctl.core.evaluation import Evaluation
from bmctl.engine.loading.arrays import array_batches
from bmctl.engine.parallel import Vote, gather
from bmctl.engine.training.position import Position, Setting, diverged, kept_weights


class StoppedError(Exception):
    """A signal came while an evaluation ran; all ranks agree on it."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


def validate(setting: Setting, position: Position) -> None:
    """Evaluate the weights of this position, and keep them if they are the best so far.

    Raises:
        StoppedError: A signal came before the end.
        DivergedError: The training loss is not finite.
    """
    group = setting.context.group
    means = gather(group, dict(zip(("loss", "score"), position.means(), strict=True)))
    if not all(math.isfinite(mean["loss"]) for mean in means):
        raise diverged(setting, position)
    evaluation = evaluate(setting, step=position.step)
    value = evaluation.value
    least = setting.fit.early_stop.min_delta if setting.fit.early_stop is not None else 0.0
    better_by = math.inf if position.best_value is None else value - position.best_value
    position.waited = 0 if better_by > least else position.waited + 1
    if better_by > 0:
        position.best_value, position.best_step, position.best_evaluation = value, position.step, evaluation
        position.best = kept_weights(setting) if setting.fit.select == "best" else {}
    setting.log.evaluation(
        position.step,
        loss=float(np.mean([mean["loss"] for mean in means])),
        metric=float(np.mean([mean["score"] for mean in means])),
        val_metric=value,
        val_loss=evaluation.extra.get("loss"),
        is_best=better_by > 0,
    )
    position.validated_step = position.step
    position.sums.zero_()


def evaluate(setting: Setting, *, step: int) -> Evaluation:
    """The task's metric on the validation data, the same on every rank; with `ema` that of the averaged weights."""
    was_training = setting.model.training
    setting.model.eval()
    try:
        with setting.average.in_place() if setting.average is not None else nullcontext():
            return setting.task.evaluate(
                {"model": lambda x: _outputs(setting, x)}, _until_stopped(setting, step), config=setting.task_config
            )
    finally:
        setting.model.train(was_training)


def _outputs(setting: Setting, x_NCHW: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return setting.shared.outputs(torch.from_numpy(x_NCHW).to(setting.context.group.device)).float().cpu().numpy()


def _until_stopped(setting: Setting, step: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    context = setting.context
    rank, world = context.group.rank, context.group.world
    for batch in array_batches(setting.val, batch_size=setting.batch_size, rank=rank, world=world):
        signum = Vote(context.group, [context.stop.requested or 0]).result()[0]
        if signum:
            raise StoppedError(signum)
        context.beat(step, "evaluating")
        yield batch["input"], batch["label"]
