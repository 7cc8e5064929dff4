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
from dataclasses import dataclass
from itertools import islice

import torch
from torch import nn

from bmctl.engine.computing.precision import Precision
from bmctl.engine.modules.buffers import copy_buffers, with_buffers
from bmctl.engine.parallel import Group, Vote
from bmctl.engine.randomness import random_state, set_random_state

Batch = tuple[torch.Tensor, torch.Tensor]
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

NUM_BATCHES = 2
MAX_LOSS_CHANGE = 0.05
MIN_COSINE = 0.5
_SMALL_LOSS = 1e-3
_MILLIONTH = 1_000_000
# What GradScaler starts with, and what it would back off to.
_SCALES = (2.0**16, 2.0**12, 2.0**8, 2.0**4, 1.0)


@dataclass(frozen=True)
class _Pass:
    """One forward and backward pass: the loss, and a gradient per parameter that has one."""

    loss: float
    gradients: list[torch.Tensor | None]

    @property
    def is_finite(self) -> bool:
        there = [gradient for gradient in self.gradients if gradient is not None]
        return math.isfinite(self.loss) and all(bool(gradient.isfinite().all()) for gradient in there)


def check(
    precision: Precision, *, model: nn.Module, loss: Loss, batches: Iterable[Batch], device: torch.device, group: Group
) -> tuple[Precision, str | None]:
    """The precision to train in, agreed by all ranks: the one asked about, or fp32 where that one does not hold.

    It does not hold where the first two batches give, on any rank, a loss or gradients that are not finite though
    fp32's are; a loss that is off by more than 5 % of fp32's, or by more than 0.05 below 1; or gradients, those of all
    parameters together, whose cosine with fp32's is less than 0.5.

    Nothing is changed: weights, their gradients, buffers and all generators are as before.

    Args:
        model: The plain one, on its device, in training mode: not sharded, not wrapped, not compiled.
        loss: Takes outputs and targets.
        batches: Inputs and targets of this rank; no more than two are taken.
        device: Where the model is.
        group: Who must agree.

    Returns:
        The precision, and what was found, for the user; None where fp32 was asked for.
    """
    if precision.name == "fp32":
        return precision, None
    kept = random_state(device)
    found = [0, 0, 0, 0]
    try:
        for x, y in islice(batches, NUM_BATCHES):
            batch = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
            found = [max(pair) for pair in zip(found, _compare(precision, model, loss, batch), strict=True)]
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        found[3] = 1
    finally:
        set_random_state(kept, device)
    return _decide(precision, *Vote(group, found).result())


def _compare(precision: Precision, model: nn.Module, loss: Loss, batch: Batch) -> list[int]:
    """Millionths of the loss's change and of what the cosine lacks to 1; whether only fp32 is finite; 0."""
    device = batch[0].device
    start = random_state(device)
    exact = _run(_fp32(precision), model, loss, batch)
    if not exact.is_finite:
        return [0, 0, 0, 0]
    set_random_state(start, device)
    rounded = _run(precision, model, loss, batch)
    if not rounded.is_finite:
        return [0, 0, 1, 0]
    change = abs(rounded.loss - exact.loss) / max(1.0, abs(exact.loss))
    # What is learned already has gradients below the smallest number of fp16; they may be lost.
    cosine = _cosine(exact.gradients, rounded.gradients) if abs(exact.loss) > _SMALL_LOSS else 1.0
    return [min(round(change * _MILLIONTH), 2**62), round((1 - cosine) * _MILLIONTH), 0, 0]


def _run(precision: Precision, model: nn.Module, loss: Loss, batch: Batch) -> _Pass:
    x, y = batch
    weights = [each for each in model.parameters() if each.requires_grad]
    scales = _SCALES if precision.name == "fp16" else (1.0,)
    with precision.applied(), torch.enable_grad(), with_buffers(copy_buffers(model)):
        with precision.autocast(x.device):
            outputs = model(x)
        value = loss(outputs, y)
        for scale in scales:
            is_last = scale == scales[-1]
            scaled = torch.autograd.grad(value * scale, weights, retain_graph=not is_last, allow_unused=True)
            found = _Pass(float(value.detach()), [None if each is None else each / scale for each in scaled])
            if is_last or found.is_finite:
                break
    return found


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
