"""What is settled before the first step: precision, batch size, who holds which parameters, what is compiled."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import islice

import torch

from bmctl.core.evaluation import main_metric
from bmctl.engine import effects
from bmctl.engine.batch import Batch, call, channels_last, chunks, free_sizes, num_rows, rows
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
from bmctl.engine.parallel import check_batch, gather, num_cores, settle
from bmctl.engine.sharding.plan import Plan, plan
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
from bmctl.schema import BATCH

MIN_STEPS = 10
"""Of an epoch, where the batch size is found by trial."""


def set_up(training: Training, found: Checkpoint | None, undo: ExitStack) -> None:
    """Settle everything that the loop needs; the model is on the device and shared among the processes.

    What goes to parts (fsdp) is cut up before anything is tried: no process is to hold the whole of it. What stays
    whole is tried and compared as it is, before torch wraps it.

    Args:
        training: What is asked; what is settled is put into it.
        found: The checkpoint to go on from: what was chosen then is not chosen again.
        undo: Takes what must be undone once the training is over.
    """
    fit, context, group = training.fit, training.context, training.context.group
    training.precision = _precision(training, found)
    undo.enter_context(training.precision.applied())
    training.plan = _plan(training, found)
    in_parts = training.plan.strategy == "fsdp"
    _place(training)
    if fit.activation_checkpointing:
        recompute_blocks(training.model)
        undo.callback(keep_activations, training.model)
    # Before the batch size is tried and the numbers are compared: both are to hold for what will compute.
    undo.enter_context(_kernels(training).applied())
    _keep_within_bounds(training, undo)
    if in_parts:
        training.shared = _shared(training)
    training.batch_size = _batch_size(training, found)
    _check_share(training)
    if fit.check_precision and found is None:
        training.precision = _checked(training)
        undo.enter_context(training.precision.applied())
    training.kernels = _kernels(training)
    training.notes.append(str(training.kernels))
    if not in_parts:
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


def _plan(training: Training, found: Checkpoint | None) -> Plan:
    """Who will hold what. A batch size that is not known yet counts as one sample at a time."""
    fit, group, given = training.fit, training.context.group, training.train.specs
    batch_size = _known_batch_size(training, found) or group.world * fit.accumulate
    check_batch(group, batch_size)
    sizes: dict[str, int] = {}
    if group.world > 1 and any(isinstance(axis, str) and axis != BATCH for spec in given for axis in spec.shape):
        sizes = free_sizes(_batches(training, batch_size, 1)[0], given)
    return plan(
        training.model,
        group=group,
        launch=training.context.recipe.launch,
        precision=training.precision,
        given=given,
        gives=training.gives,
        sizes=sizes,
        fit=fit,
        batch_size=batch_size,
    )


def _place(training: Training) -> None:
    """Model and teacher on the device, in the memory layout that convolutions are fastest in.

    What will be in parts stays in the machine's memory: `share` takes it to the device a block at a time.
    """
    device = training.context.group.device
    layout = torch.channels_last if training.fit.channels_last else torch.contiguous_format
    if training.teacher is not None:
        training.teacher.to(device, memory_format=layout).eval()  # type: ignore[call-overload]
    where = torch.device("cpu") if training.plan.strategy == "fsdp" else device
    training.model.to(where, memory_format=layout).train()  # type: ignore[call-overload]


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
    shared = share(
        training.model,
        training.plan,
        group=training.context.group,
        precision=training.precision,
        takes=training.takes,
        gives=training.gives,
        offload=training.context.recipe.launch.cpu_offload,
    )
    if training.context.group.world > 1:
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


def _known_batch_size(training: Training, found: Checkpoint | None) -> int | None:
    """The recipe's, or that of the checkpoint; None where it is to be found by trial."""
    if training.fit.batch_size != "auto":
        return training.fit.batch_size
    if hasattr(training.task, "epoch_steps"):
        raise RecipeError(
            "train.batch_size: auto goes by the training data, and this task makes its own batches",
            hint="--set train.batch_size=64",
        )
    return found.state.batch_size or None if found is not None else None


def _batch_size(training: Training, found: Checkpoint | None) -> int:
    """The one that is known, or the largest power of two that fits."""
    fit, group = training.fit, training.context.group
    known = _known_batch_size(training, found)
    if known is not None:
        return known
    batch = _batches(training, group.world * min(64, len(training.train) // group.world), 1)[0]
    in_parts = training.plan.strategy == "fsdp"
    attempt = _pass_in_parts if in_parts else _pass

    def tried(size: int) -> None:
        """Forward and backward of one part of this process's share."""
        some = rows(batch, torch.arange(size, device=group.device) % num_rows(batch))
        attempt(training, channels_last(some) if fit.channels_last else some)

    shares = group.world * fit.accumulate
    part, said = find_batch_size(
        tried,
        model=training.model,
        group=group,
        limit=max(1, len(training.train) // (MIN_STEPS * shares)),
        limited_by=f"leave an epoch of {len(training.train)} samples fewer than {MIN_STEPS} steps",
        in_lock_step=in_parts,
    )
    training.remarks.extend(said)
    times = f"times train.accumulate ({fit.accumulate}), times processes ({group.world})"
    training.remarks.append(f"batch size: {part * shares}, which is {part} at a time, {times}")
    return part * shares


def _pass(training: Training, batch: Batch) -> None:
    trial(
        training.model,
        batch,
        takes=training.takes,
        gives=training.gives,
        loss=_loss(training),
        precision=training.precision,
    )


def _pass_in_parts(training: Training, batch: Batch) -> None:
    """As the loop does it: fsdp sums gradients in `backward` alone. Every rank takes part."""
    with training.precision.autocast(training.context.group.device):
        outputs = call(training.model, batch, takes=training.takes, gives=training.gives)
    _loss(training)(outputs, batch).backward()


def _checked(training: Training) -> Precision:
    """The precision, or fp32 where the first batches come out differently in it."""
    if training.plan.strategy == "fsdp":
        if training.precision.name != "fp32":
            name = training.precision.name
            training.remarks.append(f"{name} was not compared with fp32: no process holds the whole model")
        return training.precision
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
    training.steps_per_epoch = _epoch_steps(training)
    training.num_steps = min(fit.epochs * training.steps_per_epoch, fit.max_steps or 2**62)
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


def _epoch_steps(training: Training) -> int:
    """As the task says, else whole batches: samples that do not fill one wait for the next epoch's order."""
    own = getattr(training.task, "epoch_steps", None)
    if own is not None:
        return int(own(training.task_config))
    num_samples, batch_size = len(training.train), training.batch_size
    if num_samples < batch_size:
        raise DataError(
            f"the training split has {num_samples} samples, fewer than one batch of {batch_size}",
            hint=f"--set train.batch_size={max(1, num_samples // 2)}",
        )
    return num_samples // batch_size
