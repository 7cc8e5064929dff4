"""A model that several processes train together: whole in each of them (ddp), or each a part of it (fsdp).

Source: DDP, Li et al. 2020, https://arxiv.org/abs/2006.15704; FSDP, Zhao et al. 2023, https://arxiv.org/abs/2304.11277
"""

from __future__ import annotations

import copy
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
from bmctl.engine.parallel import Group, mesh_of
from bmctl.engine.sharding.communication import BucketClock, Clock, TimedAllGather, TimedReduceScatter
from bmctl.engine.sharding.moving import MovingBuffers
from bmctl.engine.sharding.outline import on_meta
from bmctl.engine.sharding.plan import Plan
from bmctl.engine.sharding.strategy import Strategy

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
    plan: Plan,
    *,
    group: Group,
    precision: Precision,
    takes: Sequence[str],
    gives: Sequence[str],
    offload: bool = False,
) -> SharedModel:
    """Hand a model to a group: from now on every rank has rank 0's weights, and steps exchange gradients.

    Args:
        model: The same architecture on every rank, in fp32; it is changed in place and goes to the group's device. For
            fsdp it comes in the machine's memory and goes there block by block, so that no GPU ever holds all of it.
        takes: Names of what it takes of a batch, in order.
        gives: Names of its outputs.
        offload: With fsdp on GPUs: what is not computed with stays in the machine's memory.
    """
    clock = Clock(group.device)
    made = partial(
        SharedModel,
        model,
        takes=takes,
        gives=gives,
        group=group,
        strategy=plan.strategy,
        reason=plan.reason,
        clock=clock,
    )
    if plan.strategy == "fsdp":
        empty = on_meta(model)
        keep_activations(empty)
        _shard(model, group=group, precision=precision, clock=clock, offload=offload)
        return made(forward=model, empty=empty)
    model.to(group.device)
    return made(forward=model if group.world == 1 else _replicated(model, group=group, clock=clock, looks=plan.looks))


def _replicated(model: nn.Module, *, group: Group, clock: Clock, looks: bool) -> nn.Module:
    """Under ddp; `looks` for parameters that get no gradient, in every step."""
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
    _follow_first(model)
    inner, outer = _policies(model, precision)
    offloading = CPUOffloadPolicy() if offload else OffloadPolicy()
    for block in _own_blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=inner, offload_policy=offloading)
    fully_shard(model, mesh=mesh, mp_policy=outer, offload_policy=offloading)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_custom_all_gather(TimedAllGather(clock))  # type: ignore[arg-type]
            module.set_custom_reduce_scatter(TimedReduceScatter(clock))  # type: ignore[arg-type]


@torch.no_grad()
def _follow_first(model: nn.Module) -> None:
    """Give every rank rank 0's weights. (A function of its own, so that no name keeps the last of them alive.)"""
    for tensor in [*model.parameters(), *model.buffers()]:
        # fully_shard cuts rows out of what lies in memory row by row.
        tensor.data = tensor.data.contiguous()
        dist.broadcast(tensor.data, 0)


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
