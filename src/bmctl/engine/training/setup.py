"""What is settled before the first step: precision, batch size, who holds which parameters, what is compiled."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import islice

import torch
from torch import nn

from bmctl.core.evaluation import main_metric
from bmctl.engine import effects
from bmctl.engine.batch import Batch, channels_last, chunks, free_sizes, num_rows, rows
from bmctl.engine.checkpoints import checkpoint
from bmctl.engine.checkpoints.checkpoint import Checkpoint
from bmctl.engine.checkpoints.saver import Saver
from bmctl.engine.computing import selfcheck, strided
from bmctl.engine.computing.compiling import compiled
from bmctl.engine.computing.kernels import Kernels, choose
from bmctl.engine.computing.precision import Precision, choose_precision
from bmctl.engine.computing.recompute import keep_activations, recompute_blocks
from bmctl.engine.computing.trial import Loss, trial
from bmctl.engine.loading.loader import choose_workers
from bmctl.engine.parallel import Group, check_batch, gather, num_cores, settle
from bmctl.engine.sharding.shared import SharedModel, share
from bmctl.engine.training.batchsize import find_batch_size
from bmctl.engine.training.ema import Average
from bmctl.engine.training.feed import open_feed
from bmctl.engine.training.fitlog import FitLog
from bmctl.engine.training.identity import identity_of
from bmctl.engine.training.optim import build_optimizer
from bmctl.engine.training.stopwatch import Stopwatch
from bmctl.engine.training.training import Training
from bmctl.errors import BmctlError, DataError, RecipeError
from bmctl.fit import Fit
from bmctl.schema import BATCH

MIN_STEPS = 10
"""Of an epoch, where the batch size is found by trial."""


def set_up(training: Training, found: Checkpoint | None, undo: ExitStack) -> None:
    """Settle everything that the loop needs; the model is on the device and shared among the processes.

    Args:
        training: What is asked; what is settled is put into it.
        found: The checkpoint to go on from: what was chosen then is not chosen again.
        undo: Takes what must be undone once the training is over.
    """
    fit, context, group = training.fit, training.context, training.context.group
    _place(training)
    if fit.activation_checkpointing:
        recompute_blocks(training.model)
        undo.callback(keep_activations, training.model)
    training.precision = _precision(training, found)
    undo.enter_context(training.precision.applied())
    # Before the batch size is tried and the numbers are compared: both are to hold for what will compute.
    undo.enter_context(_kernels(training).applied())
    _keep_within_bounds(training, undo)
    training.batch_size = _batch_size(training, found)
    _check_share(training)
    if fit.check_precision and found is None and not _is_too_large(training):
        training.precision = _checked(training)
        undo.enter_context(training.precision.applied())
    training.kernels = _kernels(training)
    training.notes.append(str(training.kernels))
    training.shared = _shared(training)
    training.forward = training.shared.forward
    if fit.compile:
        training.forward = compiled(
            training.shared.forward,
            example=_batches(training, training.batch_size, 1)[0],
            takes=training.takes,
            gives=training.gives,
            precision=training.precision,
            note=training.notes.append,
        )
    effects.seed_all(training.seed, stage=training.stage, rank=group.rank)
    training.num_workers = _num_workers(training)
    training.optimizer = build_optimizer(training.model, fit.optimizer)
    training.scaler = training.precision.scaler(group.device)
    training.average = Average(training.model, decay=fit.ema.decay) if fit.ema is not None else None
    training.identity = identity_of(training)
    training.log = FitLog(
        context,
        training.stage,
        main_metric(training.task),
        training.task.METRICS[training.task.SCORED],
        training.batch_size,
        training.steps_per_epoch,
        training.num_steps,
        fit.eval_every_steps,
    )
    training.saver = Saver(
        checkpoint.folder_of(context.run, training.stage),
        group=group,
        keep=fit.keep_checkpoints,
        asynchronous=fit.async_checkpoints,
        note=training.log.note,
        beat=context.beat,
    )
    training.watch = Stopwatch(group.device)


def _is_too_large(training: Training) -> bool:
    """Whether the recipe says that no GPU can hold the whole model: then it is cut up before it goes there."""
    group, launch = training.context.group, training.context.recipe.launch
    return group.device.type == "cuda" and group.world > 1 and (launch.strategy == "fsdp" or launch.cpu_offload)


def _place(training: Training) -> None:
    """Model and teacher on the device, in the memory layout that convolutions are fastest in."""
    device = torch.device("cpu") if _is_too_large(training) else training.context.group.device
    layout = torch.channels_last if training.fit.channels_last else torch.contiguous_format
    if training.teacher is not None:
        training.teacher.to(training.context.group.device, memory_format=layout).eval()  # type: ignore[call-overload]
    training.model.to(device, memory_format=layout).train()  # type: ignore[call-overload]


def _kernels(training: Training) -> Kernels:
    fit, group = training.fit, training.context.group
    return choose(fit.kernels, precision=training.precision.name, group=group, compiled=fit.compile)


def _keep_within_bounds(training: Training, undo: ExitStack) -> None:
    """Where convolutions would crash the process or come out wrong, have them computed in another way, and say so."""
    names = strided.concerned(training.model)
    if not names or not training.fit.channels_last or training.context.group.device.type != "cpu":
        return
    undo.enter_context(strided.within_bounds())
    which = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
    training.remarks.append(f"channels_last: {which} computed pixel by pixel: oneDNN's gradient of it is out of bounds")


def _shared(training: Training) -> SharedModel:
    """The model in the hands of the group."""
    fit, group, given = training.fit, training.context.group, training.train.specs
    sizes: dict[str, int] = {}
    if group.world > 1 and any(isinstance(axis, str) and axis != BATCH for spec in given for axis in spec.shape):
        sizes = free_sizes(_batches(training, training.batch_size, 1)[0], given)
    shared = share(
        training.model,
        group=group,
        launch=training.context.recipe.launch,
        precision=training.precision,
        given=given,
        gives=training.gives,
        sizes=sizes,
        fit=fit,
        batch_size=training.batch_size,
    )
    if group.world > 1:
        training.notes.append(f"{shared.strategy}: {shared.reason}")
    return shared


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


def _batch_size(training: Training, found: Checkpoint | None) -> int:
    """The recipe's, that of the checkpoint, or the largest power of two that fits."""
    fit, group = training.fit, training.context.group
    if fit.batch_size != "auto":
        return fit.batch_size
    if found is not None and found.state.batch_size:
        return found.state.batch_size
    batch = _batches(training, group.world * min(64, len(training.train) // group.world), 1)[0]

    def attempt(size: int) -> None:
        """Forward and backward of one part of this process's share."""
        some = rows(batch, torch.arange(size, device=group.device) % num_rows(batch))
        trial(
            training.model,
            channels_last(some) if fit.channels_last else some,
            takes=training.takes,
            gives=training.gives,
            loss=_loss(training),
            precision=training.precision,
        )

    shares = group.world * fit.accumulate
    # An epoch has at least a few steps: with one, a training would be all warm-up.
    limit = max(1, len(training.train) // (MIN_STEPS * shares))
    part, said = find_batch_size(attempt, model=training.model, group=group, limit=limit)
    training.remarks.extend(said)
    return part * shares


def _checked(training: Training) -> Precision:
    """The precision, or fp32 where the first batches come out differently in it."""
    checked, said = selfcheck.check(
        training.precision,
        model=training.model,
        takes=training.takes,
        gives=training.gives,
        loss=_loss(training),
        batches=_batches(training, training.batch_size, selfcheck.NUM_BATCHES),
        group=training.context.group,
    )
    kept_in = training.remarks if checked.name == training.precision.name else training.notes
    kept_in.extend([said] if said else [])
    return checked


def _loss(training: Training) -> Loss:
    known = {"config": training.task_config, "facts": training.train.facts}
    return lambda outputs, batch: training.task.loss(outputs, batch, **known)


def _batches(training: Training, batch_size: int, count: int) -> Sequence[Batch]:
    """One part of this process's share of each of the first `count` batches, on the device."""
    with open_feed(training, batch_size=batch_size) as feed:
        first = islice(feed.batches(epoch=0, start_step=0), count)
        return [chunks(batch, training.fit.accumulate)[0] for batch in first]


def _check_share(training: Training) -> None:
    """Count the steps; refuse a batch that the processes, or their parts, cannot share evenly."""
    fit, group, batch_size = training.fit, training.context.group, training.batch_size
    training.steps_per_epoch, training.num_steps = _count_steps(fit, len(training.train), batch_size)
    check_batch(group, batch_size)
    if batch_size // group.world % fit.accumulate:
        raise RecipeError(
            f"a process's share of a batch is {batch_size // group.world} samples, which cannot be cut into "
            f"{fit.accumulate} equal parts (train.accumulate)",
            hint=f"--set train.batch_size={group.world * fit.accumulate}",
        )


def _num_workers(training: Training) -> int:
    """Loader processes of this process."""
    group, data = training.context.group, training.context.recipe.data
    if data is None or hasattr(training.task, "feed"):
        return 0
    number, why = choose_workers(
        training.train,
        asked=data.num_workers,
        batch_size=training.batch_size // group.world,
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
