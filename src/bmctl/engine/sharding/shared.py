"""A model that several processes train together: whole in each of them (ddp), or each a part of it (fsdp).

Source: DDP, Li et al. 2020, https://arxiv.org/abs/2006.15704; FSDP, Zhao et al. 2023, https://arxiv.org/abs/2304.11277
"""

from __future__ import annotations

import copy
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from bmctl.engine.batch import Batch, call, num_rows, rows
from bmctl.engine.computing.precision import Precision
from bmctl.engine.computing.recompute import keep_activations
from bmctl.engine.loading.order import share_of
from bmctl.engine.modules.blocks import find_blocks
from bmctl.engine.parallel import Group, gather, mesh_of
from bmctl.engine.sharding.communication import BucketClock, Clock, TimedAllGather, TimedReduceScatter
from bmctl.engine.sharding.moving import MovingBuffers
from bmctl.engine.sharding.outline import memory_at_hand, on_meta, outline_of
from bmctl.engine.sharding.strategy import Strategy, choose, untraced
from bmctl.errors import RecipeError
from bmctl.fit import Fit
from bmctl.recipe import LaunchConfig
from bmctl.schema import TensorSpec

_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


class SharedModel:
    """A model in the hands of a group.

    Attributes:
        model: As this process holds it; under fsdp its parameters are DTensors, by the names that they always had.
        forward: What a training step calls.
        takes: Names of what it takes of a batch, in order.
        gives: Names of its outputs.
        strategy: ``single``, ``ddp`` or ``fsdp``.
        reason: Why this one, for the user.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        forward: nn.Module,
        takes: Sequence[str],
        gives: Sequence[str],
        group: Group,
        strategy: Strategy,
        reason: str,
        clock: Clock,
        empty: nn.Module | None = None,
    ) -> None:
        self.model, self.forward, self.strategy, self.reason = model, forward, strategy, reason
        self.takes, self.gives = takes, gives
        self._group, self._clock, self._empty = group, clock, empty
        self._buffers = MovingBuffers(model) if group.world > 1 else None
        self._weights = list(model.parameters())

    def exchange(self, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of one part of an accumulated step.

        Under ddp gradients are exchanged in the last part only. Under fsdp they are in every part: kept whole until the
        last one, they would take the memory that fsdp is there to save.
        """
        if self._buffers is not None:
            self._buffers.follow_first(statistics=False)
        if isinstance(self.forward, nn.parallel.DistributedDataParallel) and not last:
            no_sync: AbstractContextManager[None] = self.forward.no_sync()
            return no_sync
        return nullcontext()

    @torch.no_grad()
    def clip(self, max_norm: float | None) -> torch.Tensor:
        """Scale all gradients, in place, so that together they are no longer than `max_norm`.

        Without scaling it costs one look at every gradient, and under fsdp the exchange of one number.

        Returns:
            The norm before, fp32 []; nan or inf on all ranks if a gradient anywhere is.
        """
        gradients = [_local(weight.grad) for weight in self._weights if weight.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.strategy == "fsdp":
            squared = norm.square()
            dist.all_reduce(squared)
            norm = squared.sqrt()
        if max_norm is not None:
            scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
            # On a CPU the number is at hand; nan is not 1, so that it spreads as in torch's own clipping.
            if scale.device.type != "cpu" or float(scale) != 1.0:
                torch._foreach_mul_(gradients, scale)
        return norm

    def take_communication_s(self) -> float:
        """Seconds in which a step waited for others' gradients and weights since this was asked last.

        What is counted, and what is hidden behind computation, stands in bmctl.engine.sharding.communication.
        """
        return self._clock.take()

    def outputs(self, batch: Batch) -> Batch:
        """The model in eval mode on all rows of a batch, of which each rank computes its share and gets all.

        Under ddp, and alone, in fp32; under fsdp in the format that its blocks are gathered in. The ranks compute with
        the batch statistics of rank 0, which are those that are saved.

        Args:
            batch: At least one row; of a rank only the rows of its `order.share_of` are looked at.

        Returns:
            Outputs with rows in the order of those of `batch`, the same on every rank; floating point is fp32.
        """
        training = self.model.training
        self.model.eval()
        try:
            # Not inference mode: the tensors that fsdp gathers into are those of the next training step.
            with torch.inference_mode(mode=False), torch.no_grad():
                return self._called(batch) if self._group.world == 1 else self._outputs(batch)
        finally:
            self.model.train(training)

    def _called(self, batch: Batch) -> Batch:
        outputs = call(self.model, batch, takes=self.takes, gives=self.gives)
        return {name: each.float() if each.is_floating_point() else each for name, each in outputs.items()}

    def _outputs(self, batch: Batch) -> Batch:
        assert self._buffers is not None
        self._buffers.follow_first(statistics=True)
        rank, world, num = self._group.rank, self._group.world, num_rows(batch)
        share = share_of(num, rank=0, world=world).stop
        mine = share_of(num, rank=rank, world=world)
        part = rows(batch, mine)
        if mine.stop - mine.start < share:  # the last row again, so that all ranks send alike
            chosen = torch.arange(mine.start, mine.start + share).clamp(max=num - 1)
            part = rows(batch, chosen.to(self._group.device))
        try:
            found = self._called(part)
        finally:
            # Whoever looks at the parameters now must find this rank's part, not what was gathered.
            for module in self.model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()
        return {name: self._gathered(each.contiguous())[:num] for name, each in found.items()}

    def _gathered(self, mine: torch.Tensor) -> torch.Tensor:
        every = mine.new_empty(self._group.world * len(mine), *mine.shape[1:])
        dist.all_gather_single(every, mine)
        return every

    def whole_model(self) -> nn.Module:
        """The model as it was before it was shared, with the weights that it has now, on every rank.

        Alone and under ddp it is the very model that is trained. Under fsdp it is a copy in the machine's memory, and
        training may go on without it.
        """
        if self._buffers is not None:
            self._buffers.follow_first(statistics=True)
        if self._empty is None:
            return self.model
        memo: dict[int, object] = {}
        held: Mapping[str, torch.Tensor] = dict(self.model.named_parameters())
        for name, weight in self._empty.named_parameters():
            value = held[name].detach()
            value = value.full_tensor() if isinstance(value, DTensor) else value
            memo[id(weight)] = nn.Parameter(value.to("cpu", copy=True), requires_grad=weight.requires_grad)
        held = dict(self.model.named_buffers())
        for name, buffer in self._empty.named_buffers():
            memo[id(buffer)] = held[name].detach().to("cpu", copy=True)
        return copy.deepcopy(self._empty, memo).train(self.model.training)


def share(
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
) -> SharedModel:
    """Hand a model to a group: from now on every rank has rank 0's weights, and steps exchange gradients.

    Args:
        model: The same architecture on every rank, in fp32; it is changed in place and goes to the group's device. For
            fsdp on GPUs it may come in the machine's memory, so that no GPU ever holds all of it.
        given: What it takes, in order.
        gives: Names of its outputs.
        sizes: Of the free axes of `given`, as a batch has them.
        batch_size: Samples of a step over all processes.

    Raises:
        RecipeError: `launch.cpu_offload` where there is nothing to offload.
    """
    clock = Clock(group.device)
    if launch.cpu_offload and (group.device.type != "cuda" or group.world == 1):
        where = "on the CPU it is there already" if group.device.type != "cuda" else "one process shares nothing"
        raise RecipeError(
            f"launch.cpu_offload keeps fsdp's part of a model off the GPU, but {where}",
            hint="--set launch.cpu_offload=false",
        )
    made = partial(SharedModel, model, takes=[spec.name for spec in given], gives=gives, group=group, clock=clock)
    if group.world == 1:
        model.to(group.device)
        return made(forward=model, strategy="single", reason="there is one process")
    outline = outline_of(model, given=given, gives=gives, sizes=sizes)
    strategy, reason = choose(
        outline,
        fit=fit.model_copy(update={"precision": precision.name}),
        launch=launch,
        world=group.world,
        batch_size=batch_size,
        memory_bytes=memory_at_hand(group.device, num_local=int(os.environ.get("LOCAL_WORLD_SIZE", group.world))),
    )
    # Machines may differ; the first one's memory decides for all.
    strategy, reason = gather(group, {"strategy": strategy, "reason": reason})[0].values()
    if strategy == "fsdp":
        empty = on_meta(model)
        keep_activations(empty)
        _shard(model, group=group, precision=precision, clock=clock, offload=launch.cpu_offload)
        return made(forward=model, strategy="fsdp", reason=reason, empty=empty)
    if outline.unused is None:
        reason += f"; parameters without a gradient are looked for in every step: {untraced(outline)}"
    forward = _replicated(model, group=group, clock=clock, looks=outline.unused is None or bool(outline.unused))
    return made(forward=forward, strategy="ddp", reason=reason)


def _replicated(model: nn.Module, *, group: Group, clock: Clock, looks: bool) -> nn.Module:
    """Under ddp; `looks` for parameters that get no gradient, in every step."""
    model.to(group.device)
    forward = nn.parallel.DistributedDataParallel(
        model,
        device_ids=[group.device] if group.device.type == "cuda" else None,
        forward_sync_buffers=False,  # MovingBuffers does, when somebody reads them
        gradient_as_bucket_view=True,
        # Not static_graph, which knows such parameters at no cost: torch refuses it with no_sync in the first step.
        find_unused_parameters=looks,
    )
    forward.register_comm_hook(None, BucketClock(clock, world=group.world).average)
    return forward


# -- fsdp -------------------------------------------------------------------------------------------


def _shard(model: nn.Module, *, group: Group, precision: Precision, clock: Clock, offload: bool) -> None:
    """Leave each rank with its rows of every parameter; blocks are gathered one at a time, the rest at the start."""
    mesh = mesh_of(group)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            # fully_shard cuts rows out of what lies in memory row by row.
            tensor.data = tensor.data.contiguous()
            dist.broadcast(tensor.data, 0)
    inner, outer = _policies(model, precision)
    offloading = CPUOffloadPolicy() if offload else OffloadPolicy()
    for block in _own_blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=inner, offload_policy=offloading)
    fully_shard(model, mesh=mesh, mp_policy=outer, offload_policy=offloading)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_custom_all_gather(TimedAllGather(clock))  # type: ignore[arg-type]
            module.set_custom_reduce_scatter(TimedReduceScatter(clock))  # type: ignore[arg-type]


def _policies(model: nn.Module, precision: Precision) -> tuple[MixedPrecisionPolicy, MixedPrecisionPolicy]:
    """Of blocks, and of the whole: gathered in half precision, summed in fp32, fp32 out.

    Batch norms take their weights in the format of their statistics, which is fp32: a model that has some is gathered
    in fp32, and autocast alone makes it compute in half.
    """
    half = _HALF.get(precision.name)
    if half is None or any(isinstance(module, nn.modules.batchnorm._NormBase) for module in model.modules()):
        return MixedPrecisionPolicy(), MixedPrecisionPolicy()
    inner = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32)
    return inner, MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, output_dtype=torch.float32)


def _own_blocks(model: nn.Module) -> list[nn.Module]:
    """Blocks that share no parameter with the rest of the model: one that does is gathered with the rest."""
    uses = Counter(id(weight) for module in model.modules() for weight in module.parameters(recurse=False))
    blocks = find_blocks(model).values()
    return [block for block in blocks if all(uses[id(weight)] == 1 for weight in block.parameters())]


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
