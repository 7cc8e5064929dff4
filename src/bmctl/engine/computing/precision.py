"""Which number format the loop computes in, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch

from bmctl.errors import DependencyError

Value = TypeVar("Value")
Name = Literal["fp32", "tf32", "bf16", "fp16"]

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Architectures older than Volta that multiply fp16 faster than fp32; 6.1 does it 64 times slower.
# Source: https://docs.nvidia.com/cuda/cuda-c-programming-guide/#arithmetic-instructions
_OLD_WITH_FP16 = {(5, 3), (6, 0), (6, 2)}


@dataclass(frozen=True)
class Precision:
    """What the loop computes in. Weights, gradients and optimizer state are fp32 whatever it is.

    Attributes:
        name: Of the format that most of forward and backward run in.
        reason: For the user.
        tf32: Whether a GPU multiplies what stays fp32 in TF32; None on a CPU, where there is nothing to switch.
    """

    name: Name
    reason: str
    tf32: bool | None = None

    def autocast(self, device: torch.device) -> torch.autocast:
        """The context in which the model's forward pass runs."""
        return torch.autocast(device.type, dtype=_DTYPES.get(self.name, torch.bfloat16), enabled=self.name in _DTYPES)

    def scaler(self, device: torch.device) -> torch.amp.GradScaler:
        """Keeps fp16's small gradients from becoming zero; does nothing in any other format."""
        return torch.amp.GradScaler(device.type, enabled=self.name == "fp16")

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The process-wide switches that this precision needs; on leaving they are as they were before."""
        if self.tf32 is None:
            yield
            return
        kept = _switches()
        _switch(matmul="high" if self.tf32 else "highest", cudnn=self.tf32, exact="tf32" if self.tf32 else "ieee")
        try:
            yield
        finally:
            _restore(kept)


def choose_precision(asked: Literal["auto", "fp32", "tf32", "bf16", "fp16"], device: torch.device) -> Precision:
    """What the recipe asks for, or for `auto` what the hardware is fastest in without harm.

    Raises:
        DependencyError: A format was asked for that the hardware does not have: it would be emulated, slower than
            fp32, or ignored.
    """
    tf32, has_tf32 = _tf32(device)
    if asked == "fp32":
        return Precision("fp32", "the recipe says so", tf32=False if device.type == "cuda" else None)
    found = {"bf16": _has_bf16(device), "fp16": _has_fp16(device), "tf32": has_tf32}
    if asked != "auto":
        has, why = found[asked]
        if not has:
            raise DependencyError(f"train.precision is {asked}, but {why}", hint="--set train.precision=auto")
        return Precision(asked, f"the recipe says so; {why}", tf32=tf32)
    (has, why), (has_half, why_half) = found["bf16"], found["fp16"]
    if has:
        return Precision("bf16", why, tf32=tf32)
    if device.type == "cuda" and has_half:
        return Precision("fp16", f"{why}; {why_half}", tf32=tf32)
    return Precision("fp32", why, tf32=tf32)


# -- what the hardware has ---------------------------------------------------------------------------


def _has_bf16(device: torch.device) -> tuple[bool, str]:
    if device.type == "cuda":
        with torch.cuda.device(device):
            has = torch.cuda.is_bf16_supported(including_emulation=False)
        return has, f"{torch.cuda.get_device_name(device)} {'has' if has else 'has no'} bf16 units"
    units = sorted(name for name, there in torch.cpu.get_capabilities().items() if "bf16" in name and there is True)
    if units:
        return True, f"the CPU has {' and '.join(units)}"
    return False, "the CPU has no bf16 instructions"


def _has_fp16(device: torch.device) -> tuple[bool, str]:
    if device.type != "cuda":
        return False, "a CPU emulates it, slower than fp32"
    version = torch.cuda.get_device_capability(device)
    has = version >= (7, 0) or version in _OLD_WITH_FP16
    return has, f"{torch.cuda.get_device_name(device)} {'has' if has else 'has no'} fp16 units"


def _tf32(device: torch.device) -> tuple[bool | None, tuple[bool, str]]:
    """The switch, and whether it does anything."""
    if device.type != "cuda":
        return None, (False, "TF32 is a format of NVIDIA GPUs since Ampere, and this trains on a CPU")
    with torch.cuda.device(device):
        has = torch.cuda.is_tf32_supported()
    name = torch.cuda.get_device_name(device)
    return has, (has, f"{name} has TF32 units" if has else f"{name} is older than Ampere: it has no TF32")


# -- TF32's switches ---------------------------------------------------------------------------------
# torch has an old and a new way to say it. Said in the new one alone, Inductor's look at the old one raises
# (https://github.com/pytorch/pytorch/issues/166387), so both are kept saying the same.


@dataclass(frozen=True)
class _Switches:
    matmul: str | None
    cudnn: bool | None
    exact: tuple[str, ...]


def _fp32_switches() -> tuple[Any, ...]:
    backends: Any = torch.backends
    return backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn, backends.mkldnn.matmul


def _switches() -> _Switches:
    return _Switches(
        matmul=_unless_mixed(torch.get_float32_matmul_precision),
        cudnn=_unless_mixed(lambda: torch.backends.cudnn.allow_tf32),
        exact=tuple(switch.fp32_precision for switch in _fp32_switches()),
    )


def _unless_mixed(read: Callable[[], Value]) -> Value | None:
    """The old way's value, or None where somebody's use of the new way forbids to ask for it."""
    try:
        return read()
    except RuntimeError:
        return None


def _switch(*, matmul: str, cudnn: bool, exact: str) -> None:
    *of_the_gpu, of_the_cpu = _fp32_switches()
    on_the_cpu = of_the_cpu.fp32_precision
    torch.set_float32_matmul_precision(matmul)
    torch.backends.cudnn.allow_tf32 = cudnn
    for switch in of_the_gpu:
        switch.fp32_precision = exact
    of_the_cpu.fp32_precision = on_the_cpu


def _restore(kept: _Switches) -> None:
    if kept.matmul is not None:
        torch.set_float32_matmul_precision(kept.matmul)
    if kept.cudnn is not None:
        torch.backends.cudnn.allow_tf32 = kept.cudnn
    for switch, value in zip(_fp32_switches(), kept.exact, strict=True):
        switch.fp32_precision = value
