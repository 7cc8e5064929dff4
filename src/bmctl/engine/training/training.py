"""One training: what it is made of, and where its loop stands."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from bmctl.core.evaluation import Evaluation
from bmctl.engine.checkpoints.saver import Saver
from bmctl.engine.checkpoints.state import Identity, Tensors
from bmctl.engine.computing.kernels import Kernels
from bmctl.engine.computing.precision import Precision
from bmctl.engine.context import StageContext
from bmctl.engine.sharding.plan import Plan
from bmctl.engine.sharding.shared import SharedModel
from bmctl.engine.training.ema import Average
from bmctl.engine.training.fitlog import FitLog
from bmctl.engine.training.optim import Optimizers
from bmctl.engine.training.stopwatch import Stopwatch
from bmctl.errors import DivergedError
from bmctl.fit import Distill, Fit
from bmctl.schema import Strict
from bmctl.tasks import Feed

if TYPE_CHECKING:
    from torch import nn

    from bmctl.engine.loading.split import Split


@dataclass
class Training:
    """What `train.fit` is asked to do, and below it what `set_up` settles before the first step; then nothing changes
    but weights, optimizer state, and what the feed owns.

    Attributes:
        model: As this process holds it.
        takes: Names of what the model takes of a batch, in order.
        gives: Names of its outputs.
        notes: What the user is told, and what the package remembers: it bears on the weights.
        remarks: What the user is told now.
        batch_size: Samples of a step over all processes; found by trial where the recipe says `auto`.
        num_workers: Loader processes of this process.
        steps_per_epoch: Whole global batches in the training data, or what the task counts as an epoch.
        num_steps: At which the training ends, if nothing ends it before.
        plan: Who will hold what of the model.
        shared: The model in the hands of all processes.
        forward: What a step calls: `shared.forward`, compiled where the recipe says so.
        average: Of the weights, where the recipe asks for one.
        about: What a package made of a checkpoint has to know.
        feed: Where batches come from; open while the loop runs.
    """

    model: nn.Module
    fit: Fit
    train: Split
    val: Split
    task: ModuleType
    task_config: Strict
    context: StageContext
    stage: str
    seed: int
    teacher: nn.Module | None
    distill: Distill | None
    inputs_hash: str
    about: Mapping[str, Any]
    takes: tuple[str, ...] = field(init=False)
    gives: tuple[str, ...] = field(init=False)
    notes: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    precision: Precision = field(init=False)
    plan: Plan = field(init=False)
    kernels: Kernels = field(init=False)
    batch_size: int = field(init=False)
    num_workers: int = field(init=False)
    steps_per_epoch: int = field(init=False)
    num_steps: int = field(init=False)
    shared: SharedModel = field(init=False)
    forward: Callable[..., Any] = field(init=False)
    optimizer: Optimizers = field(init=False)
    scaler: torch.amp.GradScaler = field(init=False)
    average: Average | None = field(init=False)
    identity: Identity = field(init=False)
    log: FitLog = field(init=False)
    saver: Saver = field(init=False)
    watch: Stopwatch = field(init=False)
    feed: Feed = field(init=False)

    def __post_init__(self) -> None:
        self.takes, self.gives = tuple(spec.name for spec in self.train.specs), self.task.GIVES

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
        is_unheard: What rank 0 tells can no longer be written.
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
    is_unheard: bool = False

    def means(self) -> tuple[float, float]:
        """Loss and score over the finite steps since the last evaluation."""
        loss, score, count = self.sums.tolist()
        return loss / max(1.0, count), score / max(1.0, count)


def start(training: Training) -> Position:
    """The position before the first step."""
    return Position(sums=torch.zeros(3, dtype=torch.float64, device=training.context.group.device))


def is_over(training: Training, position: Position) -> str:
    """Why no further step is to be done, or the empty string."""
    stop = training.fit.early_stop
    if position.step >= training.num_steps:
        return "done"
    ended = f"stopped at step {position.step} of {training.num_steps}:"
    if position.is_late:
        return f"{ended} train.max_time_s is over"
    if stop is not None and position.waited >= stop.patience:
        return f"{ended} {position.waited} evaluations without progress"
    return ""


def kept_weights(training: Training) -> Tensors:
    """A copy of the weights that an evaluation of now is about: the average where there is one."""
    live = training.average.tensors() if training.average is not None else training.model.state_dict()
    return {name: tensor.detach().clone() for name, tensor in live.items()}


def diverged(training: Training, position: Position) -> DivergedError:
    return DivergedError(
        f"{training.stage}: the loss is no longer finite at step {position.step} of {training.num_steps}",
        hint="lower the learning rate: --set train.optimizer.lr=..., or lengthen train.schedule.warmup",
    )
