"""A step of an optimizer that must see whole matrices, on parameters of which each process holds a part.

Muon and Adafactor look at rows and columns of a matrix at once; torch 2.14 cannot step them on DTensors.
"""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

SMALL = ("row_var", "col_var")
"""State of another shape than its parameter: every process keeps all of it."""


def step_gathered(part: torch.optim.Optimizer) -> None:
    """What ``part.step()`` would do in one process: parameter by parameter gathered, stepped, and shared out again.

    Args:
        part: Muon or Adafactor. Collective: every process of the group calls it, after the same backward.
    """
    for group in part.param_groups:
        for weight in group["params"]:
            if weight.grad is not None:
                _step_one(part, group, weight)


@torch.no_grad()
def _step_one(part: torch.optim.Optimizer, group: dict[str, object], weight: torch.Tensor) -> None:
    whole = torch.nn.Parameter(gathered(weight.detach()))
    assert weight.grad is not None
    whole.grad = gathered(weight.grad)
    alone = type(part)([{**group, "params": [whole]}])  # type: ignore[call-arg]
    if weight in part.state:
        alone.state[whole] = {kind: gathered(value) for kind, value in part.state[weight].items()}
    alone.step()
    weight.copy_(_shared_out(whole.detach(), weight))
    part.state[weight] = {
        kind: _shared_out(value, weight) if value.shape == weight.shape and kind not in (*SMALL, "step") else value
        for kind, value in alone.state[whole].items()
    }


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """All of a DTensor, in every process; another tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _shared_out(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This process's part: all have computed the same, so nothing is sent."""
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
