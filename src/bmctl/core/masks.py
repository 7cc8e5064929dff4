"""Pruned weights that stay exactly zero.

A masked layer has a buffer `weight_mask`: uint8 [ceil(numel / 8)], one bit per weight, 1 = kept, little end first. It
is saved with the weights. A pruned weight is zero and its gradient is zero, so that momentum, Adam's moments and weight
decay leave it at zero under every optimizer: no optimizer needs to know.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

MASK = "weight_mask"


def pack(mask: torch.Tensor) -> torch.Tensor:
    """bool of any shape to uint8 [ceil(numel / 8)]."""
    bits = np.packbits(mask.detach().cpu().numpy().reshape(-1), bitorder="little")
    return torch.from_numpy(bits).to(mask.device)


def unpack(bits: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """uint8 [ceil(numel / 8)] to bool of `shape`, on the device of `bits`."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    flat = bits.unsqueeze(1).bitwise_right_shift(places).bitwise_and(1).reshape(-1)
    return flat[: shape.numel()].to(torch.bool).reshape(shape)


def num_bytes(shape: torch.Size) -> int:
    """Size of the packed mask of a weight of `shape`."""
    return (shape.numel() + 7) // 8


def has_mask(module: nn.Module) -> bool:
    return MASK in module._buffers


def get_mask(module: Any) -> torch.Tensor:
    """bool of the weight's shape; True is kept."""
    return unpack(module._buffers[MASK], module.weight.shape)


def masked_layers(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if has_mask(module)}


def set_mask(module: Any, mask: torch.Tensor) -> None:
    """Zero the weights outside `mask` (bool, of the weight's shape) and keep the mask beside them."""
    with torch.no_grad():
        module.weight.masked_fill_(~mask, 0)
    module.register_buffer(MASK, pack(mask))


def hold_masks(model: nn.Module) -> None:
    """Keep every pruned weight of `model` at zero while it is trained; may be called again after a change.

    A forward pre-hook of the whole model watches over it, so that copies of the model and replaced parameters are held
    as well.
    """
    if _hold not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_hold)
    _hold(model)


def _hold(model: nn.Module, _args: object = None) -> None:
    if not model.training and _args is not None:
        return
    for module in model.modules():
        if has_mask(module) and not getattr(module.weight, "bmctl_held", False):
            _hold_weight(module)


def _hold_weight(module: Any) -> None:
    """Zero the gradient of the pruned weights, for as long as this very parameter lives."""
    weight = module.weight

    def mask_gradient(grad: torch.Tensor) -> torch.Tensor:
        return grad.masked_fill(~get_mask(module), 0)

    def mask_part(part: Any) -> None:
        from torch.distributed.tensor import distribute_tensor

        # Every process has the whole mask: nothing is sent.
        mask = distribute_tensor(get_mask(module), part.device_mesh, part.placements, src_data_rank=None).to_local()
        gradient = part.grad.to_local()
        gradient.masked_fill_(~mask.to(gradient.device), 0)

    if not weight.requires_grad:
        return
    if hasattr(weight, "device_mesh"):  # a DTensor: fsdp gives it its gradient past autograd and its hooks
        weight.register_post_accumulate_grad_hook(mask_part)
    else:
        weight.register_hook(mask_gradient)
    weight.bmctl_held = True
