"""The steps of one training: batches in, weights changed, checkpoints at the borders.

x_BCHW: a batch of images, preprocessed; y_B: their targets.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch

from bmctl.engine import checkpoint
from bmctl.engine.data import array_batches, train_batches
from bmctl.engine.evaluate import eager_part
from bmctl.engine.optim import learning_rate, set_learning_rate
from bmctl.engine.parallel import Vote, gather
from bmctl.engine.position import Position, Setting, diverged, save
from bmctl.engine.signals import interrupted
from bmctl.errors import PreemptedError
from bmctl.tasks import Evaluation


class _StoppedError(Exception):
    """A signal came while a validation ran."""


def run(setting: Setting, position: Position) -> None:
    """Go on from `position` until the last step is done and validated.

    Raises:
        PreemptedError: A signal came and a checkpoint was published.
        InterruptedRunError: SIGINT came, and a checkpoint was published.
        DivergedError: The loss is no longer finite.
    """
    while True:
        at_border = position.step % setting.steps_per_epoch == 0 or position.step == setting.num_steps
        if at_border and position.validated_step < position.step:
            _validate(setting, position)
        if position.step >= setting.num_steps:
            return
        _run_epoch(setting, position)


# -- steps ------------------------------------------------------------------------------------------


def _run_epoch(setting: Setting, position: Position) -> None:
    every = setting.fit.checkpoint_every_steps
    if position.step % setting.steps_per_epoch == 0:
        position.loss_sum.zero_()
        position.score_sum.zero_()
    setting.model.train()
    setting.log.begin()
    for x_BCHW, y_B in _batches(setting, position.step):
        signum = _step(setting, position, x_BCHW, y_B)
        if signum:
            _stop(setting, position, signum)
        if position.step >= setting.num_steps:
            break
        # The last step of an epoch is saved once it is validated.
        if every and position.step % every == 0 and position.step % setting.steps_per_epoch:
            save(setting, position)
            setting.log.begin()
    setting.log.pause()


def _batches(setting: Setting, step: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The rest of the epoch that `step` lies in, on the device."""
    epoch, first = divmod(step, setting.steps_per_epoch)
    group = setting.context.group
    data = setting.context.recipe.data
    layout = torch.channels_last if setting.fit.channels_last else torch.contiguous_format
    batches = train_batches(
        setting.train,
        seed=setting.seed,
        epoch=epoch,
        batch_size=setting.fit.batch_size,
        rank=group.rank,
        world=group.world,
        start_step=first,
        num_workers=data.num_workers if data is not None and data.num_workers != "auto" else 0,
    )
    for x, y in batches:
        x = x.to(group.device, non_blocking=True, memory_format=layout if x.dim() == 4 else torch.preserve_format)
        yield x, y.to(group.device, non_blocking=True)


def _step(setting: Setting, position: Position, x_BCHW: torch.Tensor, y_B: torch.Tensor) -> int:
    """One optimizer step; returns the number of the signal to stop for, agreed by all ranks, or 0."""
    stop, log, optimizer = setting.context.stop, setting.log, setting.optimizer
    rate = learning_rate(
        setting.fit.schedule, peak=setting.fit.optimizer.lr, step=position.step, num_steps=setting.num_steps
    )
    set_learning_rate(optimizer, rate)
    with setting.precision.autocast(x_BCHW.device):
        outputs = setting.forward(x_BCHW)
    loss = setting.task.loss(outputs, y_B, config=setting.task_config)
    if setting.teacher is not None and setting.distill is not None:
        loss = _distilled(setting, loss, outputs, x_BCHW)
    loss.backward()
    with torch.no_grad():
        position.loss_sum += loss.detach()
        position.score_sum += setting.task.score(outputs.detach(), y_B).mean()
    due = log.tick()
    # float() waits for a GPU: about twice a second is often enough.
    loss_sum = float(position.loss_sum) if due else 0.0
    vote = Vote(setting.context.group, [stop.requested or 0, int(not math.isfinite(loss_sum))])
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    position.step += 1
    signum, lost = vote.result()
    if lost:
        raise diverged(setting, position)
    if due:
        num = _num_batches(setting, position)
        log.step(position.step, loss=loss_sum / num, metric=float(position.score_sum) / num, lr=rate)
    return signum


def _distilled(setting: Setting, loss: torch.Tensor, outputs: torch.Tensor, x_BCHW: torch.Tensor) -> torch.Tensor:
    assert setting.teacher is not None and setting.distill is not None
    with torch.no_grad(), setting.precision.autocast(x_BCHW.device):
        taught = setting.teacher(x_BCHW)
    weight = setting.distill.weight
    hint = setting.task.distill_loss(outputs, taught, temperature=setting.distill.temperature)
    return (1 - weight) * loss + weight * hint


def _num_batches(setting: Setting, position: Position) -> int:
    """Batches of the epoch that the last step belongs to, so far."""
    return (position.step - 1) % setting.steps_per_epoch + 1


# -- borders ----------------------------------------------------------------------------------------


def _stop(setting: Setting, position: Position, signum: int) -> None:
    """Publish a checkpoint and end the run."""
    save(setting, position)
    path = checkpoint.path_of(checkpoint.folder_of(setting.context.run, setting.stage), position.step)
    ended = interrupted(signum, f"stopped at step {position.step} of {setting.num_steps}; it is saved in {path}")
    ended.hint = "run the same command with --resume to go on"
    if ended.exit_code == 130:
        raise ended
    raise PreemptedError(ended.message, hint=ended.hint)


def _validate(setting: Setting, position: Position) -> None:
    """End an epoch: rank 0 evaluates, all learn the result; then a checkpoint."""
    num = _num_batches(setting, position)
    group = setting.context.group
    means = gather(group, {"loss": float(position.loss_sum) / num, "score": float(position.score_sum) / num})
    if not all(math.isfinite(mean["loss"]) for mean in means):
        raise diverged(setting, position)
    found, evaluation = None, None
    if group.leads:
        try:
            evaluation = evaluate(setting)
            found = {"value": evaluation.value, "loss": evaluation.extra.get("loss"), "signum": 0}
        except _StoppedError:
            found = {"signum": setting.context.stop.requested}
    found = gather(group, found)[0]
    if found["signum"]:
        _stop(setting, position, found["signum"])
    position.validated_step = position.step
    if position.best_value is None or found["value"] > position.best_value:
        position.best_value, position.best_step, position.best_evaluation = found["value"], position.step, evaluation
        position.best = {name: tensor.detach().clone() for name, tensor in setting.model.state_dict().items()}
    setting.log.epoch(
        position.step,
        loss=float(np.mean([mean["loss"] for mean in means])),
        metric=float(np.mean([mean["score"] for mean in means])),
        val_metric=found["value"],
        val_loss=found["loss"],
    )
    every = setting.fit.checkpoint_every_steps
    if every is None or position.step % every == 0 or position.step == setting.num_steps:
        save(setting, position)


def evaluate(setting: Setting) -> Evaluation:
    """The task's metric of the eager model on the validation data, in fp32."""
    return setting.task.evaluate(
        {"model": eager_part(setting.model, setting.context.group.device)},
        _until_stopped(setting),
        config=setting.task_config,
    )


def _until_stopped(setting: Setting) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for batch in array_batches(setting.val, batch_size=setting.fit.batch_size):
        if setting.context.stop.requested is not None:
            raise _StoppedError
        yield batch
