"""Which kernels compute the steps of a training on a CPU: torch's own, or this folder's where these are faster.

They take the place of torch's for the whole process, and round otherwise: which of them hold is told, kept in the
package's notes and in checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import MappingProxyType, ModuleType
from typing import Literal

from bmctl.engine.computing import attention, convolution, linear
from bmctl.engine.computing.tiles import has_tiles
from bmctl.engine.parallel import Group, gather

KERNELS: Mapping[str, ModuleType] = MappingProxyType(
    {"attention": attention, "convolution": convolution, "linear": linear}
)


@dataclass(frozen=True)
class Kernels:
    """What was chosen.

    Attributes:
        names: Of KERNELS, in place of torch's; empty for torch's own throughout.
        reason: For the user.
    """

    names: tuple[str, ...]
    reason: str

    def __str__(self) -> str:
        whose = f"{', '.join(self.names)} by bmctl" if self.names else "torch's own"
        return f"kernels: {whose} ({self.reason})"

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Have them in torch's place; on leaving torch's are there again."""
        with ExitStack() as stack:
            for name in self.names:
                stack.enter_context(KERNELS[name].tuned())
            yield


def choose(asked: Literal["auto", "torch"], *, precision: str, group: Group, compiled: bool) -> Kernels:
    """The same for all processes.

    Args:
        asked: `train.kernels`.
        precision: What the steps are computed in; see precision.Precision.
        compiled: Whether torch.compile makes kernels of its own.
    """
    reason = ""
    if asked == "torch":
        reason = "the recipe says so"
    elif group.device.type != "cpu":
        reason = f"bmctl's are for CPUs, and this is {group.device.type}"
    elif precision != "bf16":
        reason = f"bmctl's are for bf16, and steps are in {precision}"
    elif compiled:
        reason = "torch.compile makes its own"
    elif not all(one["has_tiles"] for one in gather(group, {"has_tiles": has_tiles()})):
        reason = "bmctl's are for CPUs with AMX tiles"
    return Kernels((), reason) if reason else Kernels(tuple(KERNELS), "bf16 on a CPU with AMX tiles")
