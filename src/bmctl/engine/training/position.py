"""Where a training loop stands, in memory and in its checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from bmctl.core.evaluation import Evaluation
from bmctl.engine import randomness
from bmctl.engine.checkpoints import checkpoint
from bmctl.engine.checkpoints.checkpoint import Checkpoint
from bmctl.engine.checkpoints.saver import Saver
from bmctl.engine.checkpoints.state import Identity, Snapshot, State, Tensors
from bmctl.engine.computing.precision import Precision
from bmctl.engine.context import StageContext
from bmctl.engine.parallel import agree, gather, settle
from bmctl.engine.sharding.shared import Shared
from bmctl.engine.training.ema import Average
from bmctl.engine.training.fitlog import FitLog
from bmctl.engine.training.optim import Optimizers
from bmctl.engine.training.stopwatch import Stopwatch
from bmctl.errors import BmctlError, DivergedError, PackageError, UsageError
from bmctl.fit import Distill, Fit
from bmctl.schema import Strict

if TYPE_CHECKING:
    from torch import nn

    from bmctl.engine.loading.split import Split


Note = Callable[[str], None]
"""Takes a sentence for the user."""
SUMS = ("loss_sum", "score_sum", "num_steps")
"""Of a checkpoint's progress, in the order of `Position.sums`."""


@dataclass(frozen=True)
class Setting:
    """What one training is made of; nothing here changes while it runs, but for weights and optimizer state.

    Attributes:
        batch_size: Samples of a step over all processes; found by trial where the recipe says `auto`.
        num_workers: Loader processes of this process.
        shared: The model as this process holds it, and how it is called in a step.
        forward: What a step calls: `shared.forward`, compiled where the recipe says so.
        average: Of the weights, where the recipe asks for one.
        steps_per_epoch: Whole global batches in the training data.
        num_steps: At which the training ends, if nothing ends it before.
        about: What a package made of a checkpoint has to know.
    """

    context: StageContext
    stage: str
    seed: int
    fit: Fit
    batch_size: int
    num_workers: int
    train: Split
    val: Split
    task: ModuleType
    task_config: Strict
    shared: Shared
    forward: Callable[[torch.Tensor], torch.Tensor]
    optimizer: Optimizers
    precision: Precision
    scaler: torch.amp.GradScaler
    average: Average | None
    teacher: nn.Module | None
    distill: Distill | None
    identity: Identity
    about: Mapping[str, Any]
    saver: Saver
    log: FitLog
    watch: Stopwatch
    steps_per_epoch: int
    num_steps: int

    @property
    def model(self) -> nn.Module:
        return self.shared.model

    @property
    def eval_every(self) -> int:
        return self.fit.eval_every_steps or self.steps_per_epoch

    @property
    def save_every(self) -> int:
        return self.fit.checkpoint_every_steps or self.steps_per_epoch


@dataclass
class Position:
    """Where the loop stands; `checkpoint.State` is its form on disk.

    Attributes:
        sums: float64 [3]: this rank's loss, score and number of finite steps since the last evaluation.
        best: Weights of the best evaluation so far.
        best_evaluation: Its result, where it was made by this process.
        waited: Evaluations since the best one.
        skipped: Steps in a row that were left out because they were not finite.
        elapsed_s: Seconds of training, over all attempts, without evaluations and saving.
        is_late: The recipe's time is up.
    """

    sums: torch.Tensor
    step: int = 0
    validated_step: int = 0
    best_step: int | None = None
    best_value: float | None = None
    best: Tensors = field(default_factory=dict)
    best_evaluation: Evaluation | None = None
    waited: int = 0
    skipped: int = 0
    elapsed_s: float = 0.0
    is_late: bool = False

    def means(self) -> tuple[float, float]:
        """Loss and score over the finite steps since the last evaluation."""
        loss, score, count = self.sums.tolist()
        return loss / max(1.0, count), score / max(1.0, count)


def start(setting: Setting) -> Position:
    """The position before the first step."""
    return Position(sums=torch.zeros(3, dtype=torch.float64, device=setting.context.group.device))


def is_over(setting: Setting, position: Position) -> str:
    """Why no further step is to be done, or the empty string."""
    stop = setting.fit.early_stop
    if position.step >= setting.num_steps:
        return "done"
    if position.is_late:
        return f"stopped at step {position.step} of {setting.num_steps}: train.max_time_s is over"
    if stop is not None and position.waited >= stop.patience:
        return f"stopped at step {position.step} of {setting.num_steps}: {position.waited} evaluations without progress"
    return ""


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


def go_on(setting: Setting, found: Checkpoint) -> Position:
    """Put model, optimizer and generators back to where a checkpoint left them, on all ranks or on none.

    Raises:
        PackageError: It does not fit this model, or is of another recipe.
        DataError: The data is not that of the checkpoint.
    """
    group, manifest = setting.context.group, found.manifest
    error, position = None, None
    try:
        checkpoint.check_identity(found.path, manifest.identity, setting.identity)
        position = _restore(setting, found)
    except BmctlError as failed:
        error = failed
    settle(group, error)
    assert position is not None
    setting.log.note(f"going on from step {position.step} of {setting.num_steps}")
    then, now = (manifest.world, manifest.threads, manifest.device), (group.world, group.threads, group.device.type)
    if then != now:
        setting.log.note(
            f"begun by {_crew(*then)}, going on by {_crew(*now)}: "
            "the same samples in every step, but not the same weights bit for bit"
        )
    return position


def _crew(world: int, threads: int, device: str) -> str:
    plural = ["" if number == 1 else ending for number, ending in ((world, "es"), (threads, "s"))]
    return f"{world} process{plural[0]} with {threads} thread{plural[1]} on {device}"


def _restore(setting: Setting, found: Checkpoint) -> Position:
    state, group, live = found.state, setting.context.group, setting.model.state_dict()
    epoch, done = divmod(state.step, setting.steps_per_epoch)
    sampler = (setting.seed, epoch, done * setting.batch_size, setting.batch_size)
    if not state.progress or (state.best_step is None) != (state.best_value is None):
        raise PackageError(f"{found.path} does not say where the training stood; begin anew with --overwrite")
    if (state.seed, state.epoch, state.num_seen, state.batch_size) != sampler:
        raise PackageError(f"{found.path} does not say which samples come next; begin anew with --overwrite")
    try:
        setting.model.load_state_dict(
            {name: found.read("model", name, live.get(name)) for name in found.names("model")}
        )
        setting.optimizer.load(
            setting.model, found.names("optimizer"), lambda key, like: found.read("optimizer", key, like)
        )
        if setting.average is not None:
            setting.average.load({name: found.read("ema", name, live[name]) for name in found.names("ema")})
        if state.scaler is not None:
            kinds = {key: type(value) for key, value in setting.scaler.state_dict().items()}
            setting.scaler.load_state_dict({key: kind(state.scaler[key]) for key, kind in kinds.items()})
        best = {name: found.read("best", name, live[name]) for name in found.names("best")}
        if not best and setting.fit.select == "best" and state.best_step not in (None, state.step):
            raise PackageError(f"{found.path} does not hold the best weights so far; begin anew with --overwrite")
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        raise PackageError(f"the checkpoint of step {state.step} does not fit this model: {error}") from error
    if group.rank < len(state.random):
        randomness.set_random_state(state.random[group.rank], group.device)
    position = start(setting)
    setting.saver.saved_step = state.step
    position.step, position.validated_step = state.step, state.validated_step
    position.best_step, position.best_value, position.best = state.best_step, state.best_value, best
    position.waited, position.skipped, position.elapsed_s = state.waited, state.skipped, state.elapsed_s
    position.is_late = setting.fit.max_time_s is not None and state.elapsed_s >= setting.fit.max_time_s
    if state.best_step == state.step and setting.fit.select == "best":
        position.best = kept_weights(setting)
    sums = torch.tensor([[one[key] for key in SUMS] for one in state.progress], dtype=torch.float64)
    # Begun by another number of processes, each goes on from their mean.
    position.sums.copy_(sums[group.rank] if len(sums) == group.world else sums.mean(dim=0))
    return position


def kept_weights(setting: Setting) -> Tensors:
    """A copy of the weights that an evaluation of now is about: the average where there is one."""
    live = setting.average.tensors() if setting.average is not None else setting.model.state_dict()
    return {name: tensor.detach().clone() for name, tensor in live.items()}


# -- saving -----------------------------------------------------------------------------------------


def diverged(setting: Setting, position: Position) -> DivergedError:
    return DivergedError(
        f"{setting.stage}: the loss is no longer finite at step {position.step} of {setting.num_steps}",
        hint="lower the learning rate: --set train.optimizer.lr=..., or lengthen train.schedule.warmup",
    )


def save(setting: Setting, position: Position) -> None:
    """Begin a checkpoint of this position, unless there is one; `saver.finish` waits until it is published."""
    if setting.saver.saved_step == position.step:
        return
    group = setting.context.group
    is_finite = bool(torch.isfinite(position.sums).all())
    if agree(group, not is_finite):
        raise diverged(setting, position)
    epoch, done = divmod(position.step, setting.steps_per_epoch)
    state = State(
        step=position.step,
        validated_step=position.validated_step,
        best_step=position.best_step,
        best_value=position.best_value,
        waited=position.waited,
        skipped=position.skipped,
        elapsed_s=position.elapsed_s,
        batch_size=setting.batch_size,
        precision=setting.precision.name,
        scaler={key: float(value) for key, value in setting.scaler.state_dict().items()} or None,
        seed=setting.seed,
        epoch=epoch,
        num_seen=done * setting.batch_size,
        progress=(dict(zip(SUMS, position.sums.tolist(), strict=True)),),
        random=(randomness.random_state(group.device),),
    )
    is_best = position.best_step == position.step
    snapshot = Snapshot(
        model=dict(setting.model.state_dict()),
        optimizer=setting.optimizer.tensors(setting.model),
        ema=dict(setting.average.tensors()) if setting.average is not None else {},
        best={} if is_best or setting.fit.select == "last" else position.best,
        state=state,
    )
    fields = {
        "stage": setting.stage,
        "best_step": position.best_step,
        "num_steps": setting.num_steps,
        "identity": setting.identity,
        "about": dict(setting.about),
        "strategy": setting.shared.strategy,
        "mesh": {"data": group.world},
        "threads": group.threads,
        "device": group.device.type,
    }
    setting.saver.begin(snapshot, step=position.step, fields=fields)
