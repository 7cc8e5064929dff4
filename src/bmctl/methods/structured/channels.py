"""Channel groups that must be pruned together, and which of their channels are worth least.

Built on torch-pruning's dependency graph; the choice is our own, so that it is the same on every run.
Source: Fang et al. 2023, https://arxiv.org/abs/2301.12900
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bmctl.core.calling import tensors_of
from bmctl.core.layers import last_linear, weight_layers
from bmctl.errors import UnsupportedError

if TYPE_CHECKING:
    from bmctl.methods import Example

# What torch-pruning raises on models that it cannot follow; it has no exceptions of its own.
TRACE_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    IndexError,
    KeyError,
    NotImplementedError,
    RecursionError,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that stand or fall together over several layers.

    Attributes:
        name: The layer that the group is rooted in.
        root: torch-pruning's group over all channels.
        blocks: Equal blocks (heads, convolution or normalisation groups) that must lose the same places.
        importance: float64 [num_channels / blocks], mean over the blocks, the smallest worth least.
    """

    name: str
    root: Any
    blocks: int
    importance: torch.Tensor

    @property
    def num_places(self) -> int:
        return self.importance.numel()


def attentions(model: nn.Module) -> dict[Any, nn.Linear]:
    """timm's kind of attention (`qkv`, `num_heads`, `proj`), each with the Linear that puts out q, k and v."""
    found = {}
    for module in model.modules():
        qkv, proj = (last_linear(getattr(module, key, None)) for key in ("qkv", "proj"))
        if qkv is not None and proj is not None and isinstance(getattr(module, "num_heads", None), int):
            found[module] = qkv
    return found


def output_layers(model: nn.Module, example: Example) -> list[nn.Module]:
    """The Conv and Linear layers whose outputs reach the model's output through no other one."""
    owners = {id(layer.weight): layer for layer in weight_layers(model).values()}
    with torch.enable_grad():
        output = model(*example.values())
    found: dict[int, nn.Module] = {}
    seen: set[Any] = set()
    todo = [tensor.grad_fn for tensor in tensors_of(output)]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        before = [following for following, _ in node.next_functions if following is not None]
        owner = next((owners[key] for key in map(_weight_id, before) if key in owners), None)
        if owner is not None:
            found[id(owner)] = owner
        else:
            todo += before
    return list(found.values())


def _weight_id(node: Any) -> int | None:
    """id of the parameter that enters here, directly or transposed."""
    for _ in range(2):
        if hasattr(node, "variable"):
            return id(node.variable)
        if type(node).__name__ not in ("TBackward0", "TransposeBackward0", "PermuteBackward0"):
            return None
        node = node.next_functions[0][0]
    return None


def dependency_graph(model: nn.Module, example: Example) -> Any:
    """torch-pruning's graph of the model.

    Raises:
        UnsupportedError: It cannot follow the model.
    """
    import torch_pruning

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns of every parameter that is no layer's own, and handles them
            return torch_pruning.DependencyGraph().build_dependency(
                model, example_inputs=tuple(example.values()), verbose=False
            )
    except TRACE_ERRORS as error:
        raise UnsupportedError(
            f"structured: the channels of {type(model).__name__} cannot be traced: {type(error).__name__}: {error}",
            hint="use `magnitude` or `svd` for this model",
        ) from error


def find_groups(model: nn.Module, graph: Any, *, ignored: Sequence[nn.Module], norm: int) -> list[ChannelGroup]:
    """Every prunable group of the model, in its own order.

    Args:
        model: The model that `graph` was traced from.
        ignored: Layers whose output channels stay.
        norm: 1 or 2, the norm of weights over all layers of the group that makes up the importance.
    """
    import torch_pruning

    measure = torch_pruning.importance.GroupMagnitudeImportance(p=norm, group_reduction="mean", normalizer="mean")
    names = {module: name for name, module in model.named_modules()}
    heads = {qkv: module.num_heads for module, qkv in attentions(model).items()}
    groups = []
    for root in graph.get_all_groups(ignored_layers=list(ignored)):
        name = names[root[0].dep.target.module]
        root = _at_projection(graph, root, heads)
        blocks = math.lcm(*_blocks(graph, root, heads))
        score = measure(root)
        if score is None or len(score) % blocks or len(score) == blocks:
            continue
        mean = score.detach().double().cpu().view(blocks, -1).mean(dim=0)
        groups.append(ChannelGroup(name=name, root=root, blocks=blocks, importance=mean))
    return groups


def _at_projection(graph: Any, root: Any, heads: dict[Any, int]) -> Any:
    """Attention is indexed by the input of its output projection: qkv is split three ways before that."""
    if not any(dep.target.module in heads and graph.is_out_channel_pruning_fn(dep.handler) for dep, _ in root):
        return root
    for dep, indices in reversed(list(root)):
        if isinstance(dep.target.module, nn.Linear) and graph.is_in_channel_pruning_fn(dep.handler):
            return graph.get_pruning_group(dep.target.module, dep.handler, indices)
    return root


def _blocks(graph: Any, root: Any, heads: dict[Any, int]) -> Iterable[int]:
    for dep, _ in root:
        module = dep.target.module
        if isinstance(module, nn.GroupNorm):
            yield module.num_groups
        elif isinstance(module, nn.MultiheadAttention):
            yield module.num_heads
        elif isinstance(module, nn.modules.conv._ConvNd) and 1 < module.groups < module.out_channels:
            yield module.groups
        elif module in heads and graph.is_out_channel_pruning_fn(dep.handler):
            yield heads[module]
    yield 1


def choose_per_group(groups: Sequence[ChannelGroup], *, ratio: float) -> list[int]:
    """How many places each group loses when each loses the same fraction."""
    return [group.num_places - round(group.num_places * (1 - ratio)) for group in groups]


def choose_globally(groups: Sequence[ChannelGroup], *, ratio: float, max_ratio: float) -> list[int]:
    """How many places each group loses when all are ranked together and no group loses more than `max_ratio`."""
    total = sum(group.num_places for group in groups)
    budget = total - round(total * (1 - ratio))
    scores = torch.cat([group.importance for group in groups])
    owners = torch.cat([torch.full((group.num_places,), i) for i, group in enumerate(groups)])
    most = [math.floor(group.num_places * max_ratio) for group in groups]
    lost = [0] * len(groups)
    for place in torch.argsort(scores, stable=True).tolist():
        owner = int(owners[place])
        if budget and lost[owner] < most[owner]:
            lost[owner] += 1
            budget -= 1
    if budget:
        raise UnsupportedError(
            f"structured: ratio {ratio:g} of all channels cannot be reached with max_ratio {max_ratio:g} per group",
            hint="lower `ratio` or raise `max_ratio`",
        )
    return lost


def rounded(group: ChannelGroup, lost: int, *, round_to: int) -> int:
    """The same loss with what is left a multiple of `round_to` channels, at least one such multiple.

    Raises:
        UnsupportedError: Nothing would be left.
    """
    left = group.num_places - lost
    if left < 1:
        raise UnsupportedError(
            f"structured: nothing would be left of the {group.num_places * group.blocks} channels of {group.name}",
            hint="lower `ratio`, or name the layer in `ignore`",
        )
    step = round_to // math.gcd(round_to, group.blocks)
    return group.num_places - min(group.num_places, max(step, round(left / step) * step))


def prune_group(graph: Any, group: ChannelGroup, lost: int) -> int:
    """Remove the `lost` least important places of every block; returns the number of channels removed."""
    order = torch.argsort(group.importance, stable=True)[:lost]
    indices = sorted(int(place) + block * group.num_places for place in order for block in range(group.blocks))
    first = group.root[0].dep
    graph.get_pruning_group(first.target.module, first.handler, indices).prune()
    return len(indices)
