"""Before the first step: does the chosen precision find the loss and the gradients that fp32 finds?

The bounds stand between what was measured on an AMX CPU, in batches of 4 and 32, before and (but for the ViT) after 30
steps of training:

                                                     loss off by    cosine of gradients
    holds: bmctl:mlp, bmctl:rescnn, timm ViT    bf16  <= 0.010       >= 0.990
           torchvision resnet18 at 32 px        bf16  <= 0.011       >= 0.93, and 0.64 for a batch of 4
           the same four                        fp16  <= 0.004       >= 0.91
    does not: features at 10,000 that differ    bf16  0.02 to 1.7    0.03 to 0.11
              by less than 1, then a LayerNorm  fp16  0.007 to 1.7   0.24 to 0.69 (its loss tells, once trained)

resnet18 is the hard case among the healthy: its last stage normalises single pixels over the batch. A layer at 1,000 is
seen in bf16 once the model is trained (loss off by 0.36, cosine 0.57 to 0.60) and not before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import islice

import torch
from torch import nn

from bmctl.engine.batch import Batch, moved
from bmctl.engine.computing.precision import Precision
from bmctl.engine.computing.trial import Loss, Pass, trial
from bmctl.engine.parallel import Group, Vote

NUM_BATCHES = 2
MAX_LOSS_CHANGE = 0.05
MIN_COSINE = 0.5
_SMALL_LOSS = 1e-3
_MILLIONTH = 1_000_000
# What GradScaler starts with, and what it would back off to.
_SCALES = (2.0**16, 2.0**12, 2.0**8, 2.0**4, 1.0)


def check(
    precision: Precision,
    *,
    model: nn.Module,
    takes: Sequence[str],
    gives: Sequence[str],
    loss: Loss,
    batches: Iterable[Batch],
    group: Group,
) -> tuple[Precision, str | None]:
    """The precision to train in, agreed by all ranks: the one asked about, or fp32 where that one does not hold.

    It does not hold where the first two batches give, on any rank, a loss or gradients that are not finite though
    fp32's are; a loss that is off by more than 5 % of fp32's, or by more than 0.05 below 1; or gradients, those of all
    parameters together, whose cosine with fp32's is less than 0.5.

    Nothing is changed: weights, their gradients, buffers and all generators are as before.

    Args:
        model: The plain one, on the group's device, in training mode: not sharded, not wrapped, not compiled.
        takes: Names of what it takes of a batch, in order.
        gives: Names of what it gives.
        batches: Of this rank; no more than two are taken.
        group: Who must agree.

    Returns:
        The precision, and what was found, for the user; None where fp32 was asked for.
    """
    if precision.name == "fp32":
        return precision, None

    def run(batch: Batch, tried: Precision) -> Pass:
        scales = _SCALES if tried.name == "fp16" else (1.0,)
        return trial(model, batch, takes=takes, gives=gives, loss=loss, precision=tried, scales=scales)

    found = [0, 0, 0, 0]
    try:
        for batch in islice(batches, NUM_BATCHES):
            here = moved(batch, group.device)
            found = [max(pair) for pair in zip(found, _compare(precision, run, here), strict=True)]
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        found[3] = 1
    return _decide(precision, *Vote(group, found).result())


def _compare(precision: Precision, run: Callable[[Batch, Precision], Pass], batch: Batch) -> list[int]:
    """Millionths of the loss's change and of what the cosine lacks to 1; whether only fp32 is finite; 0."""
    exact = run(batch, _fp32(precision))
    if not exact.is_finite:
        return [0, 0, 0, 0]
    rounded = run(batch, precision)
    if not rounded.is_finite:
        return [0, 0, 1, 0]
    change = abs(rounded.loss - exact.loss) / max(1.0, abs(exact.loss))
    # What is learned already has gradients below the smallest number of fp16; they may be lost.
    cosine = _cosine(exact.gradients, rounded.gradients) if abs(exact.loss) > _SMALL_LOSS else 1.0
    return [min(round(change * _MILLIONTH), 2**62), round((1 - cosine) * _MILLIONTH), 0, 0]


def _cosine(ones: Sequence[torch.Tensor | None], others: Sequence[torch.Tensor | None]) -> float:
    """Between all gradients of one pass, laid end to end, and those of the other."""
    product = length = other_length = 0.0
    for one, other in zip(ones, others, strict=True):
        if one is not None and other is not None:
            a, b = one.flatten().double(), other.flatten().double()
            product, length, other_length = product + float(a @ b), length + float(a @ a), other_length + float(b @ b)
    lengths = math.sqrt(length * other_length)
    return product / lengths if lengths else float(length == other_length)


def _decide(
    precision: Precision, change: int, lacking: int, is_lost: int, has_no_room: int
) -> tuple[Precision, str | None]:
    name, off, cosine = precision.name, change / _MILLIONTH, 1 - lacking / _MILLIONTH
    first = f"over the first {NUM_BATCHES} batches"
    numbers = f"the loss is off by {off:.2g} and the cosine of the gradients is {cosine:.3g}"
    if is_lost:
        reason = f"{name} does not hold here: {first} its loss or gradients are not finite, fp32's are"
    elif off > MAX_LOSS_CHANGE or cosine < MIN_COSINE:
        bounds = f"(at most {MAX_LOSS_CHANGE:g}, at least {MIN_COSINE:g})"
        reason = f"{name} does not hold here: against fp32 {first} {numbers} {bounds}"
    elif has_no_room:
        return precision, f"{name} was not compared with fp32: both passes of the whole model do not fit this GPU"
    else:
        return precision, f"{name} holds: against fp32 {first} {numbers}"
    return _fp32(precision, reason), f"{reason}; training in fp32"


def _fp32(precision: Precision, reason: str = "") -> Precision:
    """True fp32 on the same device: on a GPU without TF32."""
    return Precision("fp32", reason, tf32=None if precision.tf32 is None else False)
