"""Optimizers as the recipe names them, their learning rate over the steps, and their state as flat tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from bmctl.errors import PackageError
from bmctl.fit import SGD, Adam, AdamW, Optimizer, Schedule


def build_optimizer(model: nn.Module, config: Optimizer) -> torch.optim.Optimizer:
    """torch's own optimizer over the trainable parameters, in its fused form where there is one."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    decay = config.weight_decay
    if isinstance(config, AdamW):
        return torch.optim.AdamW(weights, lr=config.lr, weight_decay=decay, fused=True)
    if isinstance(config, Adam):
        return torch.optim.Adam(weights, lr=config.lr, weight_decay=decay, fused=True)
    if isinstance(config, SGD):
        return torch.optim.SGD(
            weights, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov, weight_decay=decay, fused=True
        )
    return torch.optim.RMSprop(weights, lr=config.lr, alpha=config.alpha, momentum=config.momentum, weight_decay=decay)


def learning_rate(schedule: Schedule, *, peak: float, step: int, num_steps: int) -> float:
    """Rate of step `step` (from 0) of `num_steps`: a linear rise to `peak`, then cosine decay or constant.

    Source: Loshchilov, Hutter 2016, https://arxiv.org/abs/1608.03983
    """
    num_warmup = round(schedule.warmup * num_steps)
    if step < num_warmup:
        return peak * (step + 1) / num_warmup
    if schedule.name == "constant":
        return peak
    done = (step - num_warmup) / max(1, num_steps - num_warmup)
    return peak * (schedule.final + (1 - schedule.final) * 0.5 * (1 + math.cos(math.pi * done)))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, torch.Tensor]:
    """The optimizer's state by ``kind/parameter``, such as ``exp_avg/head.weight``; scalars are float64 [1]."""
    tensors = {}
    for name, weight in model.named_parameters():
        for kind, value in optimizer.state.get(weight, {}).items():
            if value is not None:
                is_tensor = isinstance(value, torch.Tensor)
                tensors[f"{kind}/{name}"] = value if is_tensor else torch.tensor([value], dtype=torch.float64)
    return tensors


def load_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put back what `optimizer_tensors` gave.

    Raises:
        PackageError: The state is of another model or another kind of optimizer.
    """
    weights = dict(model.named_parameters())
    for key, saved in tensors.items():
        kind, _, name = key.partition("/")
        weight = weights.get(name)
        if weight is None or (saved.dim() and saved.numel() > 1 and saved.shape != weight.shape):
            raise PackageError(f"the checkpoint's optimizer state {key} {tuple(saved.shape)} does not fit this model")
        if saved.shape == weight.shape and kind != "step":
            # Fused kernels walk over memory: the state must lie there in the same order as its weight.
            value = torch.empty_like(weight, dtype=saved.dtype, requires_grad=False).copy_(saved)
        else:
            value = saved.clone()
            if kind == "step" and weight.device.type == "cuda":
                value = value.to(weight.device)
        optimizer.state[weight][kind] = value
