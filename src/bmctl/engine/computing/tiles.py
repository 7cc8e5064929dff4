"""Where the faster kernels of this folder hold: in training steps in bf16, on a CPU with AMX tiles."""

from __future__ import annotations

import torch
from torch import nn


def has_tiles() -> bool:
    """Whether this CPU multiplies bf16 matrices in AMX tiles."""
    return torch.cpu.get_capabilities().get("amx_bf16") is True


def trains_in_bf16(*tensors: torch.Tensor) -> bool:
    """Whether an operator on these is part of a plain training step on the CPU that autocast, or they, put in bf16.

    Inference is not, and neither is what torch.compile or torch.func takes over, nor a tensor of a class of its own.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or not torch.is_grad_enabled():
        return False
    if not any(tensor.requires_grad for tensor in tensors):
        return False
    if any(type(tensor) not in (torch.Tensor, nn.Parameter) or tensor.device.type != "cpu" for tensor in tensors):
        return False
    if torch.is_autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu") == torch.bfloat16
    return all(tensor.dtype == torch.bfloat16 for tensor in tensors)
