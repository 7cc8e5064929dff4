"""Whether the whole model goes into every process (ddp) or a part of it (fsdp): arithmetic, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from bmctl.fit import Fit, Optimizer
from bmctl.recipe.sections import LaunchConfig

Strategy = Literal["single", "ddp", "fsdp"]

USABLE = 0.7
"""Of the memory at hand: the rest is for what is not counted here, such as kernels' workspace, loaders and gaps."""

_STATE_BYTES = {"sgd": 4, "adam": 8, "adamw": 8, "rmsprop": 4, "adafactor": 0, "muon": 4}
"""Optimizers that fsdp has only a part of what they need for, with what that is."""


@dataclass(frozen=True)
class Outline:
    """What is known of a model before it is built.

    Attributes:
        num_params: Of all of it.
        num_trained: Of those an optimizer changes.
        num_gathered: Largest number that fsdp holds whole at once: a block, or what lies in no block.
        activation_bytes: Kept for the backward pass of one sample, in fp32; None if it could not be traced.
        unused: Names of trained parameters that the outputs do not depend on; None if it could not be traced.
        untraced: Why it could not.
    """

    num_params: int
    num_trained: int
    num_gathered: int
    activation_bytes: int | None = None
    unused: tuple[str, ...] | None = ()
    untraced: str = ""


@dataclass(frozen=True)
class Load:
    """Bytes of one process. Buffers are left out: they are small, and the same either way."""

    weights: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.gathered + self.activations

    def __str__(self) -> str:
        parts = [
            f"{amount(size)} {name}"
            for name in ("weights", "gradients", "optimizer", "gathered", "activations")
            if (size := getattr(self, name))
        ]
        return f"{' + '.join(parts)} = {amount(self.total)} in each process"


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes that an optimizer keeps for one parameter, in fp32; what it keeps for a row or a column is nothing."""
    if optimizer.name == "sgd":
        return 4 if optimizer.momentum else 0
    if optimizer.name == "rmsprop":
        return 8 if optimizer.momentum else 4
    return _STATE_BYTES[optimizer.name]


def loads(outline: Outline, *, fit: Fit, world: int, batch_size: int) -> Mapping[Strategy, Load]:
    """What each strategy would put into one process, by strategy.

    Args:
        world: Number of processes.
        batch_size: Samples of one optimizer step, over all processes.
    """
    copies = 4 * (2 if fit.ema else 1)
    num_samples = -(-batch_size // (world * fit.accumulate))
    kept = 0 if fit.activation_checkpointing else num_samples * (outline.activation_bytes or 0)
    if fit.precision in ("bf16", "fp16"):
        kept //= 2
    whole = Load(
        weights=copies * outline.num_params,
        gradients=4 * outline.num_trained,
        optimizer=state_bytes(fit.optimizer) * outline.num_trained,
        gathered=0,
        activations=kept,
    )
    part = Load(
        weights=-(-whole.weights // world),
        gradients=-(-whole.gradients // world),
        optimizer=-(-whole.optimizer // world),
        gathered=2 * 4 * outline.num_gathered,  # weights, and in the backward pass gradients
        activations=kept,
    )
    return {"ddp": whole, "fsdp": part}


def choose(
    outline: Outline, *, fit: Fit, launch: LaunchConfig, world: int, batch_size: int, memory_bytes: int
) -> tuple[Strategy, str]:
    """The strategy of a group and why, for the user: what `launch` says, or what fits.

    Args:
        memory_bytes: At hand for one process.
    """
    if world == 1:
        return "single", "there is one process"
    asked = "launch.strategy is fsdp" if launch.strategy == "fsdp" else ""
    if launch.cpu_offload and launch.strategy != "ddp":
        asked = asked or "launch.cpu_offload is for fsdp"
    if asked:
        return "fsdp", asked
    if launch.strategy == "ddp":
        return "ddp", "launch.strategy is ddp"
    found = loads(outline, fit=fit, world=world, batch_size=batch_size)
    whole, part, most = found["ddp"].total, found["fsdp"].total, int(USABLE * memory_bytes)
    at_hand = f"{USABLE:.0%} of {amount(memory_bytes)}"
    if outline.activation_bytes is None and not fit.activation_checkpointing:
        at_hand += f" (without activations: {untraced(outline)})"
    if whole <= most:
        return "ddp", f"{amount(whole)} in each process are at most {at_hand}"
    rest = f"fsdp takes {amount(part)}" + ("" if part <= most else ", which may be too much as well")
    return "fsdp", f"ddp's {amount(whole)} in each process are more than {at_hand}; {rest}"


def untraced(outline: Outline) -> str:
    """What to say of a model that could not be traced."""
    return "the model cannot be traced on shapes alone" + (f", {outline.untraced}" if outline.untraced else "")


def amount(size_bytes: int) -> str:
    """``41.2 MiB``."""
    size, unit = float(size_bytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
