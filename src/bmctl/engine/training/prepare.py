"""What is settled before the first step: precision, batch size, who holds which parameters, what is compiled."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import islice
from types import ModuleType
from typing import Any

import torch
from torch import nn

from bmctl.engine import randomness
from bmctl.engine.checkpoints import checkpoint
from bmctl.engine.checkpoints.checkpoint import Checkpoint
from bmctl.engine.checkpoints.saver import Saver
from bmctl.engine.checkpoints.state import Identity
from bmctl.engine.computing import attention, convolution, linear, selfcheck
from bmctl.engine.computing.compiling import compiled
from bmctl.engine.computing.precision import Precision, choose_precision
from bmctl.engine.computing.recompute import keep_activations, recompute_blocks
from bmctl.engine.computing.tiles import has_tiles
from bmctl.engine.context import StageContext
from bmctl.engine.loading.loader import choose_workers, open_loader
from bmctl.engine.loading.split import Split
from bmctl.engine.parallel import Group, check_batch, gather, num_cores, settle
from bmctl.engine.sharding.shared import share
from bmctl.engine.training.batchsize import find_batch_size
from bmctl.engine.training.ema import Average
from bmctl.engine.training.fitlog import FitLog
from bmctl.engine.training.optim import build_optimizer
from bmctl.engine.training.position import Setting
from bmctl.engine.training.stopwatch import Stopwatch
from bmctl.errors import BmctlError, DataError, RecipeError
from bmctl.fit import Distill, Fit
from bmctl.recipe import Recipe
from bmctl.schema import Strict

MIN_STEPS = 10
"""Of an epoch, where the batch size is found by trial."""
_FREE = {"keep_checkpoints", "checkpoint_every_steps", "async_checkpoints", "max_time_s", "compile", "grace_s"}
"""Settings of Fit that do not change what the steps do, and may differ when a run is resumed."""


@dataclass(frozen=True)
class Training:
    """What `train.fit` is asked to do.

    Attributes:
        notes: What the user is told, and what the package remembers: it bears on the weights.
        remarks: What the user is told now.
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
    notes: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def prepare(training: Training, found: Checkpoint | None, undo: ExitStack) -> Setting:
    """Everything that the loop needs; the model is on the device and shared among the processes.

    Args:
        training: What is asked.
        found: The checkpoint to go on from: what was chosen then is not chosen again.
        undo: Takes what must be undone once the training is over.
    """
    fit, context, group = training.fit, training.context, training.context.group
    model = _place(training)
    if fit.activation_checkpointing:
        recompute_blocks(model)
        undo.callback(keep_activations, model)
    precision = _precision(training, found)
    undo.enter_context(precision.applied())
    if precision.name == "bf16" and group.device.type == "cpu" and has_tiles() and not fit.compile:
        # Before the batch size is tried and the numbers are compared: both are to hold for what will compute.
        for kernel in (attention, convolution, linear):
            undo.enter_context(kernel.tuned())
    batch_size = _batch_size(training, found, precision)
    steps_per_epoch, num_steps = _count_steps(fit, len(training.train), batch_size)
    check_batch(group, batch_size)
    if batch_size // group.world % fit.accumulate:
        raise RecipeError(
            f"a process's share of a batch is {batch_size // group.world} samples, which cannot be cut into "
            f"{fit.accumulate} equal parts (train.accumulate)",
            hint=f"--set train.batch_size={group.world * fit.accumulate}",
        )
    if fit.check_precision and found is None and not _is_too_large(training):
        precision = _checked(training, precision, batch_size)
        undo.enter_context(precision.applied())
    shared = share(
        model,
        group=group,
        launch=context.recipe.launch,
        precision=precision,
        fit=fit,
        batch_size=batch_size,
        sample_shape=tuple(int(size) for size in training.train.specs[0].shape[1:]),
    )
    if group.world > 1:
        training.notes.append(f"{shared.strategy}: {shared.reason}")
    forward: Callable[[torch.Tensor], torch.Tensor] = shared.forward
    if fit.compile:
        example = _batches(training, batch_size, 1)[0][0]
        forward = compiled(shared.forward, example=example, precision=precision, note=training.notes.append)
    randomness.seed_all(training.seed, stage=training.stage, rank=group.rank)
    log = FitLog(
        context, training.stage, training.task.METRIC, batch_size, steps_per_epoch, num_steps, fit.eval_every_steps
    )
    return Setting(
        context=context,
        stage=training.stage,
        seed=training.seed,
        fit=fit,
        batch_size=batch_size,
        num_workers=_num_workers(training, batch_size),
        train=training.train,
        val=training.val,
        task=training.task,
        task_config=training.task_config,
        shared=shared,
        forward=forward,
        optimizer=build_optimizer(shared.model, fit.optimizer),
        precision=precision,
        scaler=precision.scaler(group.device),
        average=Average(shared.model, decay=fit.ema.decay) if fit.ema is not None else None,
        teacher=training.teacher,
        distill=training.distill,
        identity=_identity(training),
        about=training.about,
        saver=Saver(
            checkpoint.folder_of(context.run, training.stage),
            group=group,
            keep=fit.keep_checkpoints,
            asynchronous=fit.async_checkpoints,
            note=log.note,
            beat=context.beat,
        ),
        log=log,
        watch=Stopwatch(group.device),
        steps_per_epoch=steps_per_epoch,
        num_steps=num_steps,
    )


def _is_too_large(training: Training) -> bool:
    """Whether the recipe says that no GPU can hold the whole model: then it is cut up before it goes there."""
    group, launch = training.context.group, training.context.recipe.launch
    return group.device.type == "cuda" and group.world > 1 and (launch.strategy == "fsdp" or launch.cpu_offload)


def _place(training: Training) -> nn.Module:
    """Model and teacher on the device, in the memory layout that convolutions are fastest in."""
    device = torch.device("cpu") if _is_too_large(training) else training.context.group.device
    layout = torch.channels_last if training.fit.channels_last else torch.contiguous_format
    if training.teacher is not None:
        training.teacher.to(training.context.group.device, memory_format=layout).eval()  # type: ignore[call-overload]
    return training.model.to(device, memory_format=layout).train()  # type: ignore[call-overload]


# -- precision and batch size -----------------------------------------------------------------------


def _precision(training: Training, found: Checkpoint | None) -> Precision:
    """The same for all ranks; a run that once fell back to fp32 stays there."""
    fit, group = training.fit, training.context.group
    if found is not None and found.state.precision == "fp32" and (fit.precision == "auto" or fit.check_precision):
        return replace(choose_precision("fp32", group.device), reason="so this run was begun")
    error, chosen = None, None
    try:
        chosen = choose_precision(fit.precision, group.device)
    except BmctlError as failed:
        error = failed
    settle(group, error)
    assert chosen is not None
    names = {one["name"] for one in gather(group, {"name": chosen.name})}
    if len(names) == 1:
        return chosen
    return replace(choose_precision("fp32", group.device), reason=f"of {' and '.join(sorted(names))} all have fp32")


def _batch_size(training: Training, found: Checkpoint | None, precision: Precision) -> int:
    """The recipe's, that of the checkpoint, or the largest power of two that fits."""
    fit, group = training.fit, training.context.group
    if fit.batch_size != "auto":
        return fit.batch_size
    if found is not None and found.state.batch_size:
        return found.state.batch_size
    x, y = _batches(training, group.world * min(64, len(training.train) // group.world), 1)[0]

    channels_last = fit.channels_last and x.dim() == 4

    def trial(batch: int) -> None:
        """Forward and backward of one part of this process's share."""
        rows = torch.arange(batch, device=x.device) % len(x)
        some = x[rows].contiguous(memory_format=torch.channels_last) if channels_last else x[rows]
        with precision.autocast(group.device):
            outputs = training.model(some)
        _loss(training)(outputs, y[rows]).backward()
        training.model.zero_grad(set_to_none=True)

    shares = group.world * fit.accumulate
    # An epoch has at least a few steps: with one, a training would be all warm-up.
    limit = max(1, len(training.train) // (MIN_STEPS * shares))
    part, said = find_batch_size(trial, model=training.model, group=group, limit=limit)
    training.remarks.extend(said)
    return part * shares


def _checked(training: Training, precision: Precision, batch_size: int) -> Precision:
    """`precision`, or fp32 where the first batches come out differently in it."""
    group = training.context.group
    checked, said = selfcheck.check(
        precision,
        model=training.model,
        loss=_loss(training),
        batches=_batches(training, batch_size, selfcheck.NUM_BATCHES),
        device=group.device,
        group=group,
    )
    kept_in = training.remarks if checked.name == precision.name else training.notes
    kept_in.extend([said] if said else [])
    return checked


def _loss(training: Training) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    return lambda outputs, targets: training.task.loss(outputs, targets, config=training.task_config)


def _batches(training: Training, batch_size: int, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """One part of this process's share of each of the first `count` batches, on the device."""
    group, fit = training.context.group, training.fit
    with open_loader(
        training.train,
        seed=training.seed,
        batch_size=batch_size,
        rank=group.rank,
        world=group.world,
        device=group.device,
        channels_last=fit.channels_last,
    ) as loader:
        return [
            (batch["input"].chunk(fit.accumulate)[0], batch["label"].chunk(fit.accumulate)[0])
            for batch in islice(loader.batches(epoch=0), count)
        ]


def _num_workers(training: Training, batch_size: int) -> int:
    """Loader processes of this process."""
    group, data = training.context.group, training.context.recipe.data
    assert data is not None
    number, why = choose_workers(
        training.train,
        asked=data.num_workers,
        batch_size=batch_size // group.world,
        device=group.device,
        num_cores=num_cores(),
        local_world=int(os.environ.get("LOCAL_WORLD_SIZE") or 1),
    )
    if number and data.num_workers == "auto":
        training.remarks.append(f"data: {number} loader process{'es' if number > 1 else ''} per process ({why})")
    return number


def _count_steps(fit: Fit, num_samples: int, batch_size: int) -> tuple[int, int]:
    """Steps of an epoch, and of all; samples that do not fill a batch wait for the next epoch's order."""
    if num_samples < batch_size:
        raise DataError(
            f"the training split has {num_samples} samples, fewer than one batch of {batch_size}",
            hint=f"--set train.batch_size={max(1, num_samples // 2)}",
        )
    steps_per_epoch = num_samples // batch_size
    return steps_per_epoch, min(fit.epochs * steps_per_epoch, fit.max_steps or 2**62)


# -- what a checkpoint belongs to -------------------------------------------------------------------


def settings_of(
    recipe: Recipe, fit: Fit, stage: str, seed: int, distill: Distill | None, inputs_hash: str
) -> dict[str, Any]:
    """What decides, with the data, what the steps do."""
    data = recipe.data.model_dump(mode="json", include={"input"}) if recipe.data else None
    return {
        "stage": stage,
        "seed": seed,
        "model": recipe.model.model_dump(mode="json") if recipe.model else None,
        "data": data,
        "task": recipe.task.model_dump(mode="json") if recipe.task else None,
        "fit": fit.model_dump(mode="json", exclude=_FREE),
        "distill": distill.model_dump(mode="json") if distill else None,
        "inputs": inputs_hash,
    }


def digest(value: object) -> str:
    """SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _identity(training: Training) -> Identity:
    return Identity(
        optimizer=training.fit.optimizer.name,
        data_fingerprint=digest([training.train.fingerprint, training.val.fingerprint]),
        settings=settings_of(
            training.context.recipe,
            training.fit,
            training.stage,
            training.seed,
            training.distill,
            training.inputs_hash,
        ),
    )


def differences(model: nn.Module, group: Group, fit: Fit) -> list[str]:
    """What several processes, or parts of a batch, do otherwise than one would."""
    modules = list(model.modules())
    has_norm = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in modules)
    found = []
    if has_norm and group.world * fit.accumulate > 1:
        found.append("batch statistics are taken over each process's part of a batch")
    if group.world > 1 and any(
        isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0 for module in modules
    ):
        found.append("dropout draws differently in each process")
    if not found:
        return []
    parts = f"{group.world} processes" if group.world > 1 else f"{fit.accumulate} parts"
    return [f"{parts}: {' and '.join(found)}; one process with whole batches would end with slightly other weights"]
