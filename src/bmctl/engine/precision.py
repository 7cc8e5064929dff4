"""Which number format the loop computes in, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from bmctl.errors import DependencyError


@dataclass(frozen=True)
class Precision:
    """`reason` is for the user. Weights, gradients and optimizer state are fp32 either way."""

    name: Literal["fp32", "bf16"]
    reason: str

    def autocast(self, device: torch.device) -> torch.autocast:
        """The context in which the model's forward pass runs."""
        return torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.name == "bf16")


def choose_precision(asked: Literal["auto", "fp32", "bf16"], device: torch.device) -> Precision:
    """What the recipe asks for, or for `auto` bf16 where the hardware multiplies in it.

    Raises:
        DependencyError: bf16 was asked for and the hardware has none: it would be emulated, slower than fp32.
    """
    if asked == "fp32":
        return Precision("fp32", "the recipe says so")
    has, why = _has_bf16(device)
    if asked == "bf16" and not has:
        raise DependencyError(f"train.precision is bf16, but {why}", hint="--set train.precision=auto")
    if asked == "bf16":
        return Precision("bf16", f"the recipe says so; {why}")
    return Precision("bf16" if has else "fp32", why)


def _has_bf16(device: torch.device) -> tuple[bool, str]:
    if device.type == "cuda":
        has = torch.cuda.is_bf16_supported(including_emulation=False)
        return has, f"{torch.cuda.get_device_name(device)} {'has' if has else 'has no'} bf16 units"
    units = sorted(name for name, there in torch.cpu.get_capabilities().items() if "bf16" in name and there is True)
    if units:
        return True, f"the CPU has {' and '.join(units)}"
    return False, "the CPU has no bf16 instructions"
