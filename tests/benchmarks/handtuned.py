"""The loop that bmctl is measured against: plain PyTorch as an expert writes it for one CPU.

bf16 autocast where the CPU multiplies in bf16, channels_last, a fused optimizer without weight decay on norms and
biases, gradients dropped rather than zeroed, a malloc that keeps what a step frees, and torch.compile where it pays.

x_BCHW: a batch of normalised images, channels_last; y_B: their classes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

import torch
from torch import nn

from bmctl.fit import SGD, AdamW

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
MODES = {"eager": None, "compiled": "default", "autotuned": "max-autotune-no-cudagraphs"}
"""What is tried before a long run: torch.compile's modes for the model, or none."""


def train(
    model: nn.Module,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    optimizer: torch.optim.Optimizer,
    *,
    mode: str = "eager",
) -> None:
    """Until there are no more batches.

    Args:
        mode: Of MODES.
    """
    if MODES[mode] is not None:
        model.compile(mode=MODES[mode])
    for x_BCHW, y_B in batches:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = model(x_BCHW)
        loss = nn.functional.cross_entropy(outputs.float(), y_B)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def make_optimizer(model: nn.Module, config: SGD | AdamW) -> torch.optim.Optimizer:
    """The recipe's optimizer, fused."""
    weights = [weight for weight in model.parameters() if weight.dim() > 1]
    others = [weight for weight in model.parameters() if weight.dim() <= 1]
    groups = [{"params": weights, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    if isinstance(config, SGD):
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=True)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


def keep_freed_memory() -> None:
    """Activations of one step are the next one's: without this glibc gives them back to the system in between."""
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(M_TRIM_THRESHOLD, 2**30)
    mallopt(M_MMAP_THRESHOLD, 2**30)
