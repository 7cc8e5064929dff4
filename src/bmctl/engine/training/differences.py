"""What several processes, or parts of a batch, do otherwise than one process with whole batches: said, and noted."""

from __future__ import annotations

from torch import nn

from bmctl.engine.parallel import Group
from bmctl.fit import Fit


def differences(model: nn.Module, group: Group, fit: Fit) -> list[str]:
    """A sentence on what bears on the weights, or nothing."""
    if group.world * fit.accumulate == 1:
        return []
    parts, each = (f"{group.world} processes", "process") if group.world > 1 else (f"{fit.accumulate} parts", "part")
    modules = list(model.modules())
    found = []
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in modules):
        found.append("batch statistics are taken over each process's part of a batch")
    drawn = [name for name, draws in _DRAWS.items() if any(map(draws, modules))]
    if drawn:
        found.append(f"{' and '.join(drawn)} draw{'' if len(drawn) > 1 else 's'} differently in each {each}")
    if not found:
        return []
    return [f"{parts}: {' and '.join(found)}; one process with whole batches would end with slightly other weights"]


def _drops(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0


def _drops_branches(module: nn.Module) -> bool:
    """By name: bmctl and torchvision have a StochasticDepth, timm a DropPath, transformers one for each model."""
    rate = getattr(module, "drop_prob", None) or getattr(module, "p", None)
    return type(module).__name__.endswith(("StochasticDepth", "DropPath")) and bool(rate)


_DRAWS = {"dropout": _drops, "stochastic depth": _drops_branches}
"""Layers that leave something out by chance."""
