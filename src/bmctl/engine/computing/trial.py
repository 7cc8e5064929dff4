"""One forward and backward pass before the first step, which leaves no trace."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bmctl.engine.batch import Batch, call
from bmctl.engine.computing.precision import Precision
from bmctl.engine.effects import no_trace

Loss = Callable[[Batch, Batch], torch.Tensor]
"""Of outputs and the batch that they are of."""


@dataclass(frozen=True)
class Pass:
    """What a trial found: the loss, and a gradient per trained parameter that has one."""

    loss: float
    gradients: Sequence[torch.Tensor | None]

    @property
    def is_finite(self) -> bool:
        there = [gradient for gradient in self.gradients if gradient is not None]
        return math.isfinite(self.loss) and all(bool(gradient.isfinite().all()) for gradient in there)


def trial(
    model: nn.Module,
    batch: Batch,
    *,
    forward: Callable[..., Any] | None = None,
    takes: Sequence[str],
    gives: Sequence[str],
    loss: Loss,
    precision: Precision,
    scales: Sequence[float] = (1.0,),
) -> Pass:
    """Loss and gradients of one batch; weights, their gradients, buffers and all generators are as before.

    Args:
        model: In training mode, on the device of the batch.
        forward: What is called in its place, such as its compiled code.
        takes: Names of what the model takes of the batch, in order.
        gives: Names of what it gives.
        precision: What the forward pass computes in.
        scales: Of the loss, as a GradScaler would scale it: the first one with finite gradients counts, or the last.
    """
    device = batch[takes[0]].device
    weights = [each for each in model.parameters() if each.requires_grad]
    with precision.applied(), torch.enable_grad(), no_trace(model, device):
        with precision.autocast(device):
            outputs = call(model if forward is None else forward, batch, takes=takes, gives=gives)
        value = loss(outputs, batch)
        for scale in scales:
            is_last = scale == scales[-1]
            scaled = torch.autograd.grad(value * scale, weights, retain_graph=not is_last, allow_unused=True)
            # Divided by 1 they would only take their memory twice.
            gradients = [each if each is None or scale == 1 else each / scale for each in scaled]
            found = Pass(float(value.detach()), gradients)
            if is_last or found.is_finite:
                break
    return found
