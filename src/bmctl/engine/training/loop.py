"""The steps of one training: batches in, weights changed, evaluations and checkpoints at the borders.

x_BCHW: this process's share of a batch, preprocessed; y_B: their targets. b: one of the parts it is cut into.
"""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager

import torch

from bmctl.engine.checkpoints import checkpoint
from bmctl.engine.loading.loader import Loader, open_loader
from bmctl.engine.parallel import Vote
from bmctl.engine.training.position import Position, Setting, diverged, is_over, save
from bmctl.engine.training.schedule import learning_rate
from bmctl.engine.training.tracing import Tracer, tracing
from bmctl.engine.training.validation import StoppedError, validate
from bmctl.errors import PreemptedError
from bmctl.processes.signals import interrupted


def run(setting: Setting, position: Position) -> str:
    """Go on from `position` until nothing is left to do; returns why it ended.

    Raises:
        PreemptedError: A signal came and a checkpoint was published.
        InterruptedRunError: SIGINT came, and a checkpoint was published.
        DivergedError: The loss is no longer finite.
    """
    setting.model.train()
    _border(setting, position)
    with _loader(setting) as loader, _tracing(setting, position) as tracer:
        while not (why := is_over(setting, position)):
            _run_epoch(setting, position, loader, tracer)
    setting.log.pause()
    setting.saver.finish()
    return why


def _run_epoch(setting: Setting, position: Position, loader: Loader, tracer: Tracer) -> None:
    """The steps that are left of the epoch in which `position` lies."""
    epoch, first = divmod(position.step, setting.steps_per_epoch)
    setting.watch.start()
    began = time.perf_counter()
    for batch in loader.batches(epoch=epoch, start_step=first):
        setting.watch.lap("data")
        signum = _step(setting, position, batch["input"], batch["label"])
        position.elapsed_s += time.perf_counter() - began
        tracer.step()
        if signum:
            _stop(setting, position, signum)
        _border(setting, position)
        if is_over(setting, position):
            return
        began = time.perf_counter()


def _tracing(setting: Setting, position: Position) -> AbstractContextManager[Tracer]:
    left = setting.num_steps - position.step
    return tracing(setting.context, stage=setting.stage, num_steps=left, note=setting.log.note)


def _loader(setting: Setting) -> AbstractContextManager[Loader]:
    """This process's share of every batch, on the device."""
    group, data = setting.context.group, setting.context.recipe.data
    assert data is not None
    return open_loader(
        setting.train,
        seed=setting.seed,
        batch_size=setting.batch_size,
        rank=group.rank,
        world=group.world,
        num_workers=setting.num_workers,
        prefetch=data.prefetch,
        pin=group.device.type == "cuda",
        device=group.device,
        channels_last=setting.fit.channels_last,
    )


# -- steps ------------------------------------------------------------------------------------------


def _step(setting: Setting, position: Position, x_BCHW: torch.Tensor, y_B: torch.Tensor) -> int:
    """One optimizer step; returns the number of the signal to stop for, agreed by all ranks, or 0."""
    fit, context, watch, optimizer = setting.fit, setting.context, setting.watch, setting.optimizer
    rate = learning_rate(fit.schedule, peak=fit.optimizer.lr, step=position.step, num_steps=setting.num_steps)
    optimizer.set_rate(rate)
    sums = _gradients(setting, x_BCHW, y_B)
    due = setting.log.tick()
    # Without a norm to look at, the loss alone tells; on a GPU asking for it means waiting, so not at every step.
    looks = due or fit.skip_non_finite > 0 or fit.clip_norm is not None or context.group.device.type == "cpu"
    is_lost = looks and not math.isfinite(float(sums[0]))
    if fit.clip_norm is not None or fit.skip_non_finite:
        optimizer.unscale(setting.scaler)
        norm = setting.shared.clip(fit.clip_norm)
        # Under a scaler an overflow is its own business: it leaves the step out and scales less.
        is_lost = is_lost or (not setting.scaler.is_enabled() and not math.isfinite(float(norm)))
    is_late = fit.max_time_s is not None and position.elapsed_s >= fit.max_time_s
    vote = Vote(context.group, [context.stop.requested or 0, is_lost, setting.saver.status(), is_late])
    if not (fit.skip_non_finite and vote.result()[1]):
        optimizer.step(setting.scaler)
        position.sums += sums
        if setting.average is not None:
            setting.average.update(position.step)
    setting.scaler.update()
    optimizer.zero_grad()
    watch.lap("optimizer")
    signum, lost, saving, late = vote.result()
    watch.lap("communication")
    position.step += 1
    position.skipped = position.skipped + 1 if lost else 0
    if lost:
        _skip(setting, position)
    setting.saver.advance(saving)
    position.is_late = position.is_late or bool(late)
    context.beat(position.step, "training")
    if due:
        loss, score = position.means()
        setting.log.step(
            position.step,
            loss=loss,
            metric=score,
            lr=rate,
            parts=watch.take(),
            time_left_s=_time_left_s(setting, position),
        )
    return signum


def _time_left_s(setting: Setting, position: Position) -> float | None:
    budget_s = setting.fit.max_time_s
    return None if budget_s is None else budget_s - position.elapsed_s


def _gradients(setting: Setting, x_BCHW: torch.Tensor, y_B: torch.Tensor) -> torch.Tensor:
    """Add the batch's gradients up, part by part; returns loss, score and 1, as float64 [3]."""
    shared, watch, device, num_parts = setting.shared, setting.watch, x_BCHW.device, setting.fit.accumulate
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    sums[2] = 1
    pairs = zip(x_BCHW.chunk(num_parts), y_B.chunk(num_parts), strict=True)
    for part, (x_bCHW, y_b) in enumerate(pairs, start=1):
        with shared.exchange(part == num_parts):
            with setting.precision.autocast(device):
                outputs = setting.forward(x_bCHW)
            loss = setting.task.loss(outputs, y_b, config=setting.task_config)
            if setting.teacher is not None and setting.distill is not None:
                loss = _distilled(setting, loss, outputs, x_bCHW)
            watch.lap("forward")
            setting.scaler.scale(loss / num_parts if num_parts > 1 else loss).backward()
        with torch.no_grad():
            sums[0] += loss.detach() / num_parts
            sums[1] += setting.task.score(outputs.detach(), y_b).mean() / num_parts
        watch.lap("backward")
    watch.add("communication", shared.take_communication_s())
    return sums


def _distilled(setting: Setting, loss: torch.Tensor, outputs: torch.Tensor, x_bCHW: torch.Tensor) -> torch.Tensor:
    assert setting.teacher is not None and setting.distill is not None
    with torch.no_grad(), setting.precision.autocast(x_bCHW.device):
        taught = setting.teacher(x_bCHW)
    weight = setting.distill.weight
    hint = setting.task.distill_loss(outputs, taught, temperature=setting.distill.temperature)
    return (1 - weight) * loss + weight * hint


def _skip(setting: Setting, position: Position) -> None:
    """Say that a step was left out, or give up."""
    if position.skipped > setting.fit.skip_non_finite:
        raise diverged(setting, position)
    setting.log.note(
        f"step {position.step} was left out: loss or gradient is not finite "
        f"({position.skipped} in a row, train.skip_non_finite is {setting.fit.skip_non_finite})"
    )


# -- borders ----------------------------------------------------------------------------------------


def _border(setting: Setting, position: Position) -> None:
    """Evaluate and save where it is time to; a step is saved once it is validated."""
    over = bool(is_over(setting, position))
    validates = position.validated_step < position.step and (position.step % setting.eval_every == 0 or over)
    if validates:
        setting.log.pause()
        try:
            validate(setting, position)
        except StoppedError as stopped:
            _stop(setting, position, stopped.signum)
        over = bool(is_over(setting, position))
    saves = position.step > 0 and (position.step % setting.save_every == 0 or over)
    if saves:
        setting.log.pause()
        save(setting, position)
    if validates or saves:
        setting.log.begin()
        setting.watch.start()


def _stop(setting: Setting, position: Position, signum: int) -> None:
    """Publish a checkpoint and end the run."""
    save(setting, position)
    setting.saver.finish()
    path = checkpoint.path_of(checkpoint.folder_of(setting.context.run, setting.stage), position.step)
    ended = interrupted(signum, f"stopped at step {position.step} of {setting.num_steps}; it is saved in {path}")
    ended.hint = "run the same command with --resume to go on"
    if ended.exit_code == 130:
        raise ended
    raise PreemptedError(ended.message, hint=ended.hint)
