"""Who will hold what of a model: decided before it is put anywhere, as it may fit no GPU."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from bmctl.engine.computing.precision import Precision
from bmctl.engine.parallel import Group, gather
from bmctl.engine.sharding.outline import memory_at_hand, outline_of
from bmctl.engine.sharding.strategy import Strategy, choose, untraced
from bmctl.errors import RecipeError
from bmctl.fit import Fit
from bmctl.recipe import LaunchConfig
from bmctl.schema import TensorSpec


@dataclass(frozen=True)
class Plan:
    """How a group will hold a model: decided while it may still be in no GPU's memory.

    Attributes:
        strategy: As of the SharedModel to come; so is `reason`.
        looks: Under ddp, parameters that get no gradient are looked for in every step.
    """

    strategy: Strategy
    reason: str
    looks: bool = False


def plan(
    model: nn.Module,
    *,
    group: Group,
    launch: LaunchConfig,
    precision: Precision,
    given: Sequence[TensorSpec],
    gives: Sequence[str],
    sizes: Mapping[str, int] | None = None,
    fit: Fit = Fit(),  # noqa: B008  (frozen)
    batch_size: int = 1,
) -> Plan:
    """What `launch` says, or what fits: the same on every rank.

    Args:
        model: On any device; it is not run.
        given: What it takes, in order.
        gives: Names of its outputs.
        sizes: Of the free axes of `given`, as a batch has them.
        batch_size: Samples of a step over all processes.

    Raises:
        RecipeError: `launch.cpu_offload` where there is nothing to offload.
    """
    if launch.cpu_offload and (group.device.type != "cuda" or group.world == 1):
        where = "on the CPU it is there already" if group.device.type != "cuda" else "one process shares nothing"
        raise RecipeError(
            f"launch.cpu_offload keeps fsdp's part of a model off the GPU, but {where}",
            hint="--set launch.cpu_offload=false",
        )
    if group.world == 1:
        return Plan("single", "there is one process")
    outline = outline_of(model, given=given, gives=gives, sizes=sizes)
    strategy, reason = choose(
        outline,
        fit=fit.model_copy(update={"precision": precision.name}),
        launch=launch,
        world=group.world,
        batch_size=batch_size,
        memory_bytes=memory_at_hand(group.device, num_local=int(os.environ.get("LOCAL_WORLD_SIZE", group.world))),
    )
    if strategy == "ddp" and outline.unused is None:
        reason += f"; parameters without a gradient are looked for in every step: {untraced(outline)}"
    looks = outline.unused is None or bool(outline.unused)
    # Machines may differ; the first one's memory decides for all.
    return Plan(**gather(group, {"strategy": strategy, "reason": reason, "looks": looks})[0])
