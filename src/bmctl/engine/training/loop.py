"""The steps of one training: batches in, weights changed, evaluations and checkpoints at the borders.

A batch is this process's share of it; it may be cut into parts.
"""

from __future__ import annotations

import math
import time

import torch

from bmctl.engine.batch import Batch, call, chunks
from bmctl.engine.checkpoints import checkpoint
from bmctl.engine.parallel import Vote, settle
from bmctl.engine.training.checkpointing import save
from bmctl.engine.training.schedule import learning_rate
from bmctl.engine.training.tracing import Tracer, tracing
from bmctl.engine.training.training import Position, Training, diverged, is_over
from bmctl.engine.training.validation import StoppedError, validate
from bmctl.errors import PreemptedError
from bmctl.processes.signals import interrupted


def run(training: Training, position: Position) -> str:
    """Go on from `position` until nothing is left to do; returns why it ended.

    Raises:
        PreemptedError: A signal came and a checkpoint was published.
        InterruptedRunError: SIGINT came, and a checkpoint was published.
        DivergedError: The loss is no longer finite.
        ResourceError: What it tells could not be written, such as on a full disk; a checkpoint was published.
    """
    training.model.train()
    _border(training, position)
    left = training.num_steps - position.step
    with tracing(training.context, stage=training.stage, num_steps=left, note=training.log.note) as tracer:
        while not (why := is_over(training, position)):
            _run_epoch(training, position, tracer)
    training.log.pause()
    training.saver.finish()
    settle(training.context.group, training.log.error)
    return why


def _run_epoch(training: Training, position: Position, tracer: Tracer) -> None:
    """The steps that are left of the epoch in which `position` lies."""
    epoch, first = divmod(position.step, training.steps_per_epoch)
    training.watch.start()
    began = time.perf_counter()
    for batch in training.feed.batches(epoch=epoch, start_step=first):
        training.watch.lap("data")
        signum = _step(training, position, batch)
        position.elapsed_s += time.perf_counter() - began
        tracer.step()
        if signum:
            _stop(training, position, signum)
        if position.is_unheard:
            _end_unheard(training, position)
        _border(training, position)
        if is_over(training, position):
            return
        began = time.perf_counter()


# -- steps ------------------------------------------------------------------------------------------


def _step(training: Training, position: Position, batch: Batch) -> int:
    """One optimizer step; returns the number of the signal to stop for, agreed by all ranks, or 0."""
    fit, context, watch, optimizer = training.fit, training.context, training.watch, training.optimizer
    log = training.log
    rate = learning_rate(fit.schedule, peak=fit.optimizer.lr, step=position.step, num_steps=training.num_steps)
    optimizer.set_rate(rate)
    sums = _gradients(training, batch)
    due = log.tick()
    # Without a norm to look at, the loss alone tells; on a GPU asking for it means waiting, so not at every step.
    looks = due or fit.skip_non_finite > 0 or fit.clip_norm is not None or context.group.device.type == "cpu"
    is_lost = looks and not math.isfinite(float(sums[0]))
    if fit.clip_norm is not None or fit.skip_non_finite:
        optimizer.unscale(training.scaler)
        norm = training.shared.clip(fit.clip_norm)
        # Under a scaler an overflow is its own business: it leaves the step out and scales less.
        is_lost = is_lost or (not training.scaler.is_enabled() and not math.isfinite(float(norm)))
    is_late = fit.max_time_s is not None and position.elapsed_s >= fit.max_time_s
    vote = Vote(
        context.group, [context.stop.requested or 0, is_lost, training.saver.status(), is_late, log.error is not None]
    )
    if not (fit.skip_non_finite and vote.result()[1]):
        optimizer.step(training.scaler)
        position.sums += sums
        if training.average is not None:
            training.average.update(position.step)
    training.scaler.update()
    optimizer.zero_grad()
    watch.lap("optimizer")
    signum, lost, saving, late, unheard = vote.result()
    watch.lap("communication")
    position.step += 1
    training.feed.after(position.step)
    position.skipped = position.skipped + 1 if lost else 0
    if lost:
        _skip(training, position)
    training.saver.advance(saving)
    position.is_late, position.is_unheard = position.is_late or bool(late), bool(unheard)
    context.beat(position.step, "training")
    if due:
        loss, score = position.means()
        log.step(
            position.step,
            loss=loss,
            metric=score,
            lr=rate,
            parts=watch.take(),
            time_left_s=_time_left_s(training, position),
        )
    return signum


def _time_left_s(training: Training, position: Position) -> float | None:
    budget_s = training.fit.max_time_s
    return None if budget_s is None else budget_s - position.elapsed_s


def _gradients(training: Training, batch: Batch) -> torch.Tensor:
    """Add the batch's gradients up, part by part; returns loss, score and 1, as float64 [3]."""
    shared, watch, num_parts = training.shared, training.watch, training.fit.accumulate
    task, takes, gives, device = training.task, training.takes, training.gives, training.context.group.device
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    sums[2] = 1
    for number, part in enumerate(chunks(batch, num_parts), start=1):
        with shared.exchange(number == num_parts):
            with training.precision.autocast(device):
                outputs = call(training.forward, part, takes=takes, gives=gives)
            loss = task.loss(outputs, part, config=training.task_config, facts=training.train.facts)
            if training.teacher is not None and training.distill is not None:
                loss = _distilled(training, loss, outputs, part)
            watch.lap("forward")
            training.scaler.scale(loss / num_parts if num_parts > 1 else loss).backward()
        with torch.no_grad():
            sums[0] += loss.detach() / num_parts
            sums[1] += task.score(outputs, part, facts=training.train.facts).mean() / num_parts
        watch.lap("backward")
    watch.add("communication", shared.take_communication_s())
    return sums


def _distilled(training: Training, loss: torch.Tensor, outputs: Batch, part: Batch) -> torch.Tensor:
    assert training.teacher is not None and training.distill is not None
    with torch.no_grad(), training.precision.autocast(training.context.group.device):
        taught = call(training.teacher, part, takes=training.takes, gives=training.gives)
    weight = training.distill.weight
    hint = training.task.distill_loss(outputs, taught, temperature=training.distill.temperature)
    return (1 - weight) * loss + weight * hint


def _skip(training: Training, position: Position) -> None:
    """Say that a step was left out, or give up."""
    if position.skipped > training.fit.skip_non_finite:
        raise diverged(training, position)
    training.log.note(
        f"step {position.step} was left out: loss or gradient is not finite "
        f"({position.skipped} in a row, train.skip_non_finite is {training.fit.skip_non_finite})"
    )


# -- borders ----------------------------------------------------------------------------------------


def _border(training: Training, position: Position) -> None:
    """Evaluate and save where it is time to; a step is saved once it is validated."""
    over = bool(is_over(training, position))
    validates = position.validated_step < position.step and (position.step % training.eval_every == 0 or over)
    if validates:
        training.log.pause()
        try:
            validate(training, position)
        except StoppedError as stopped:
            _stop(training, position, stopped.signum)
        over = bool(is_over(training, position))
    saves = position.step > 0 and (position.step % training.save_every == 0 or over)
    if saves:
        training.log.pause()
        save(training, position)
    if validates or saves:
        training.log.begin()
        training.watch.start()


def _end_unheard(training: Training, position: Position) -> None:
    """Publish a checkpoint, and end by what kept rank 0 from telling where the training stands."""
    save(training, position)
    training.saver.finish()
    settle(training.context.group, training.log.error)


def _stop(training: Training, position: Position, signum: int) -> None:
    """Publish a checkpoint and end the run."""
    save(training, position)
    training.saver.finish()
    path = checkpoint.path_of(checkpoint.folder_of(training.context.run, training.stage), position.step)
    ended = interrupted(signum, f"stopped at step {position.step} of {training.num_steps}; it is saved in {path}")
    ended.hint = "run the same command with --resume to go on"
    if ended.exit_code == 130:
        raise ended
    raise PreemptedError(ended.message, hint=ended.hint)
