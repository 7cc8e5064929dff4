"""The repeated blocks of a network: transformer layers, residual blocks, dense layers, inception modules.

They are what sharding gathers at a time, what activation checkpointing computes again, and what layer decay counts.
"""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise

from torch import nn

_NUMBERED = re.compile(r"(.*?)\d+[a-z]?")
_MIN_LAYERS = 2


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks that a network repeats, by name, in the order in which it declares them: its depth.

    A block is a module of at least two layers (with weights of two or more dimensions) and a forward of its own, among
    numbered siblings of its class: ``blocks.0, blocks.1``, ``encoder_layer_0, encoder_layer_1``. Chains such as a
    ResNet's ``layer1`` are looked through. A lone layer is no block, so a plain MLP has none: computing a linear
    layer again saves nothing, as all that it keeps is its input.

    Where such modules hold others, as ConvNeXt's stages hold blocks, the inner ones are taken if no two neighbours
    of the outer class have the same shapes: stages get wider, while equal neighbours are blocks already, whatever
    they hold, such as the experts of a mixture.

    Args:
        model: As it is built: not yet wrapped, compiled or sharded.

    Returns:
        Disjoint modules, none inside another; empty where nothing repeats.
    """
    repeated = {kind for parent in model.modules() for kind in _repeated_kinds(parent)}
    found: dict[str, nn.Module] = {}
    _collect(model, "", repeated, _kinds_of_stages(model, repeated), found)
    return found


def _collect(module: nn.Module, name: str, repeated: set[type], stages: set[type], found: dict[str, nn.Module]) -> None:
    for child_name, child in module.named_children():
        path = f"{name}.{child_name}" if name else child_name
        kind = type(child)
        if kind in repeated and kind not in stages and _NUMBERED.fullmatch(child_name) and _is_unit(child):
            found[path] = child
        else:
            _collect(child, path, repeated, stages, found)


def _numbered_units(parent: nn.Module) -> list[tuple[str, nn.Module]]:
    """Children at numbered places that may be blocks, with what stands before their number."""
    places = ((_NUMBERED.fullmatch(name), child) for name, child in parent.named_children())
    return [(place.group(1), child) for place, child in places if place is not None and _is_unit(child)]


def _repeated_kinds(parent: nn.Module) -> set[type]:
    counts = Counter((prefix, type(child)) for prefix, child in _numbered_units(parent))
    return {kind for (_, kind), count in counts.items() if count > 1}


def _kinds_of_stages(model: nn.Module, repeated: set[type]) -> set[type]:
    """Of the repeated classes those that hold others of them, and of which no two neighbours have the same shapes."""
    holders = {
        type(unit)
        for unit in model.modules()
        if type(unit) in repeated and any(type(inner) in repeated for inner in unit.modules() if inner is not unit)
    }
    equal = {
        type(one)
        for parent in model.modules()
        for (_, one), (_, other) in pairwise(_numbered_units(parent))
        if type(one) is type(other) and type(one) in holders and _shapes(one) == _shapes(other)
    }
    return holders - equal


def _is_unit(module: nn.Module) -> bool:
    """Computes something of its own with the weights of at least two layers."""
    if type(module).forward in (nn.Sequential.forward, nn.Module.forward):
        return False
    layers = [each for each in module.modules() if any(weight.dim() > 1 for weight in each.parameters(recurse=False))]
    return len(layers) >= _MIN_LAYERS


def _shapes(module: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(parameter.shape) for parameter in module.parameters()]
