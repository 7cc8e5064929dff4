"""Checkpoints of one training: found, gone on from, and written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from bmctl.engine import effects
from bmctl.engine.checkpoints import checkpoint
from bmctl.engine.checkpoints.checkpoint import Checkpoint
from bmctl.engine.checkpoints.state import Snapshot, State
from bmctl.engine.context import StageContext
from bmctl.engine.parallel import agree, gather, settle
from bmctl.engine.training.training import Position, Training, diverged, kept_weights, start
from bmctl.errors import BmctlError, PackageError, UsageError
from bmctl.fit import Fit

Note = Callable[[str], None]
"""Takes a sentence for the user."""
SUMS = ("loss_sum", "score_sum", "num_steps")
"""Of a checkpoint's progress, in the order of `Position.sums`."""
_SAME = ("step", "validated_step", "best_step", "best_value", "waited", "skipped", "elapsed_s")
"""What a position and its form on disk both have."""


# -- going on ---------------------------------------------------------------------------------------


def find_start(context: StageContext, *, stage: str, fit: Fit, model: nn.Module, note: Note) -> Checkpoint | None:
    """The checkpoint to go on from, on all ranks; room and rights for new ones are checked.

    Raises:
        UsageError: There are checkpoints, and neither --resume nor --overwrite was given.
        ResourceError: No room or no right to write checkpoints.
    """
    group = context.group
    folder = checkpoint.folder_of(context.run, stage)
    error, path = None, None
    if group.leads:
        try:
            path = _prepare_folder(context, folder, note=note)
            checkpoint.check_room(folder, model, with_ema=fit.ema is not None)
        except BmctlError as failed:
            error = failed
    settle(group, error)
    name = gather(group, {"name": path.name if path else None})[0]["name"]
    if name is None:
        return None
    error, found = None, None
    try:
        found = checkpoint.open_checkpoint(folder / name, verify=False)  # rank 0 just has
    except BmctlError as failed:
        error = failed
    settle(group, error)
    return found


def _prepare_folder(context: StageContext, folder: Path, *, note: Note) -> Path | None:
    """On rank 0: the checkpoint to go on from, or None."""
    steps = checkpoint.steps_in(folder)
    if steps and context.overwrite and not context.resume:
        checkpoint.discard(folder)
    elif steps and not context.resume:
        raise UsageError(
            f"{folder} holds checkpoints of an earlier attempt, up to step {steps[-1]}",
            hint="add --resume to go on, or --overwrite to start again",
        )
    if not context.resume:
        return None
    path = checkpoint.find_newest(folder, note=note)
    if path is None:
        note("there is no checkpoint to go on from: starting at the first step")
    return path


def go_on(training: Training, found: Checkpoint) -> Position:
    """Put model, optimizer, feed and generators back to where a checkpoint left them, on all ranks or on none.

    Raises:
        PackageError: It does not fit this model, or is of another recipe.
        DataError: The data is not that of the checkpoint.
    """
    group, manifest = training.context.group, found.manifest
    error, position = None, None
    try:
        checkpoint.check_identity(found.path, manifest.identity, training.identity)
        position = _restore(training, found)
    except BmctlError as failed:
        error = failed
    settle(group, error)
    assert position is not None
    training.log.note(f"going on from step {position.step} of {training.num_steps}")
    then = (manifest.world, manifest.strategy, manifest.threads, manifest.device, manifest.kernels)
    now = (group.world, training.shared.strategy, group.threads, group.device.type, training.kernels.names)
    if then != now:
        training.log.note(
            f"begun by {_crew(*then)}, going on by {_crew(*now)}: "
            "the same samples in every step, but not the same weights bit for bit"
        )
    return position


def _crew(world: int, strategy: str, threads: int, device: str, kernels: tuple[str, ...]) -> str:
    plural = ["" if number == 1 else ending for number, ending in ((world, f"es ({strategy})"), (threads, "s"))]
    whose = f"bmctl's kernels ({', '.join(kernels)})" if kernels else "torch's kernels"
    return f"{world} process{plural[0]} with {threads} thread{plural[1]} on {device} and {whose}"


def _restore(training: Training, found: Checkpoint) -> Position:
    state, group = found.state, training.context.group
    epoch, done = divmod(state.step, training.steps_per_epoch)
    sampler = (training.seed, epoch, done * training.batch_size, training.batch_size)
    if not state.progress or (state.best_step is None) != (state.best_value is None):
        raise PackageError(f"{found.path} does not say where the training stood; begin anew with --overwrite")
    if (state.seed, state.epoch, state.num_seen, state.batch_size) != sampler:
        raise PackageError(f"{found.path} does not say which samples come next; begin anew with --overwrite")
    position = start(training)
    try:
        _load(training, found)
        live = training.model.state_dict()
        position.best = {name: found.read("best", name, live[name]) for name in found.names("best")}
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        raise PackageError(f"the checkpoint of step {state.step} does not fit this model: {error}") from error
    if not position.best and training.fit.select == "best" and state.best_step not in (None, state.step):
        raise PackageError(f"{found.path} does not hold the best weights so far; begin anew with --overwrite")
    if group.rank < len(state.random):
        effects.set_random_state(state.random[group.rank], group.device)
    training.saver.saved_step = state.step
    for name in _SAME:
        setattr(position, name, getattr(state, name))
    position.is_late = training.fit.max_time_s is not None and state.elapsed_s >= training.fit.max_time_s
    if state.best_step == state.step and training.fit.select == "best":
        position.best = kept_weights(training)
    sums = torch.tensor([[one[key] for key in SUMS] for one in state.progress], dtype=torch.float64)
    # Begun by another number of processes, each goes on from their mean.
    position.sums.copy_(sums[group.rank] if len(sums) == group.world else sums.mean(dim=0))
    return position


def _load(training: Training, found: Checkpoint) -> None:
    """Model, optimizer, average, scaler and what the feed owns."""
    live, state = training.model.state_dict(), found.state
    training.model.load_state_dict({name: found.read("model", name, live.get(name)) for name in found.names("model")})
    training.optimizer.load(
        training.model, found.names("optimizer"), lambda key, like: found.read("optimizer", key, like)
    )
    if training.average is not None:
        training.average.load({name: found.read("ema", name, live[name]) for name in found.names("ema")})
    if state.scaler is not None:
        kinds = {key: type(value) for key, value in training.scaler.state_dict().items()}
        training.scaler.load_state_dict({key: kind(state.scaler[key]) for key, kind in kinds.items()})
    # Begun by fewer processes, some go on with what another one's feed owned.
    mine = _owned(training.context.group.rank % found.manifest.world)
    names = [name for name in found.names("task") if name.startswith(mine)]
    training.feed.load({name.removeprefix(mine): found.read("task", name) for name in names})


def _owned(rank: int) -> str:
    """What begins the names of tensors that the feed of a rank owns: each rank has its own."""
    return f"rank-{rank}/"


# -- saving -----------------------------------------------------------------------------------------


def save(training: Training, position: Position) -> None:
    """Begin a checkpoint of this position, unless there is one; `saver.finish` waits until it is published."""
    if training.saver.saved_step == position.step:
        return
    group = training.context.group
    is_finite = bool(torch.isfinite(position.sums).all())
    if agree(group, not is_finite):
        raise diverged(training, position)
    epoch, done = divmod(position.step, training.steps_per_epoch)
    state = State(
        **{name: getattr(position, name) for name in _SAME},
        batch_size=training.batch_size,
        precision=training.precision.name,
        scaler={key: float(value) for key, value in training.scaler.state_dict().items()} or None,
        seed=training.seed,
        epoch=epoch,
        num_seen=done * training.batch_size,
        progress=(dict(zip(SUMS, position.sums.tolist(), strict=True)),),
        random=(effects.random_state(group.device),),
    )
    is_best = position.best_step == position.step
    snapshot = Snapshot(
        model=dict(training.model.state_dict()),
        optimizer=training.optimizer.tensors(training.model),
        ema=dict(training.average.tensors()) if training.average is not None else {},
        best={} if is_best or training.fit.select == "last" else position.best,
        task={_owned(group.rank) + name: tensor for name, tensor in training.feed.tensors().items()},
        state=state,
    )
    fields = {
        "stage": training.stage,
        "best_step": position.best_step,
        "num_steps": training.num_steps,
        "identity": training.identity,
        "about": dict(training.about),
        "strategy": training.shared.strategy,
        "mesh": {"data": group.world},
        "threads": group.threads,
        "kernels": training.kernels.names,
        "device": group.device.type,
    }
    training.saver.begin(snapshot, step=position.step, fields=fields)
