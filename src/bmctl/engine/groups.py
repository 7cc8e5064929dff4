"""Which parameters an optimizer treats alike: weight decay or none, the rate of their layer, Muon or AdamW."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from bmctl.engine.blocks import find_blocks
from bmctl.engine.masks import has_mask
from bmctl.errors import RecipeError
from bmctl.fit import Optimizer

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


def parameter_groups(model: nn.Module, config: Optimizer, *, only: Collection[str] | None = None) -> list[Any]:
    """Parameter groups as torch's optimizers take them, in the order in which the model declares them.

    Args:
        only: Names of the parameters to take; None is all that are trained.

    Returns:
        Dicts with `params`, `weight_decay` and `scale`, by which the learning rate is multiplied.

    Raises:
        RecipeError: `layer_decay` for a model without repeated blocks.
    """
    scales = layer_scales(model, config.layer_decay)
    exempt = undecayed(model, decay_all=config.decay_all)
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, weight in model.named_parameters():
        if not weight.requires_grad or (only is not None and name not in only):
            continue
        decay = 0.0 if name in exempt else config.weight_decay
        group = groups.setdefault((scales[name], decay), {"params": [], "weight_decay": decay, "scale": scales[name]})
        group["params"].append(weight)
    return list(groups.values())


def undecayed(model: nn.Module, *, decay_all: bool) -> set[str]:
    """Names of the parameters without weight decay: norms and biases, and what the model names (as timm's do)."""
    patterns = set(_own_wishes(model))
    return {
        name
        for name, weight in model.named_parameters()
        if (weight.dim() <= 1 and not decay_all) or any(fnmatchcase(name, pattern) for pattern in patterns)
    }


def _own_wishes(model: nn.Module) -> Iterator[str]:
    for prefix, module in model.named_modules():
        told = getattr(module, "no_weight_decay", None)
        if callable(told):
            yield from (f"{prefix}.{name}" if prefix else name for name in told())


def layer_scales(model: nn.Module, decay: float | None) -> dict[str, float]:
    """Factor of each parameter's learning rate: 1 behind the last block, and `decay` times less per block before it.

    A parameter between two blocks goes with the one before it; what comes before all blocks has the lowest rate.

    Raises:
        RecipeError: There is a decay, but no blocks.

    Source: Bao et al. 2021, https://arxiv.org/abs/2106.08254
    """
    names = [name for name, _ in model.named_parameters()]
    if decay is None:
        return dict.fromkeys(names, 1.0)
    blocks = list(find_blocks(model))
    if not blocks:
        raise RecipeError(
            f"layer_decay: {type(model).__name__} has no repeated blocks whose rates could differ",
            hint="remove optimizer.layer_decay",
        )
    place = {block: index for index, block in enumerate(blocks, start=1)}
    last_block_seen, depths = 0, {}
    last_inside = max(index for index, name in enumerate(names) if _block_of(name, place))
    for index, name in enumerate(names):
        last_block_seen = max(last_block_seen, _block_of(name, place))
        inside = _block_of(name, place) or last_block_seen
        depths[name] = inside if index <= last_inside else len(blocks) + 1
    return {name: decay ** (len(blocks) + 1 - depth) for name, depth in depths.items()}


def _block_of(name: str, place: dict[str, int]) -> int:
    """Number of the block, from 1, that a parameter lies in; 0 for none."""
    parts = name.split(".")
    return next((place[path] for path in (".".join(parts[:end]) for end in range(len(parts))) if path in place), 0)


def matrices(model: nn.Module) -> list[str]:
    """Names of the weights that multiply their layer's input: what Muon is for.

    Not among them are embeddings and other tables, convolutions, the last layer, and pruned weights, which would not
    stay zero when their matrix is made orthogonal.
    """
    head = _last_layer(model)
    return [
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if not isinstance(module, _EMBEDDINGS) and not has_mask(module) and prefix not in head
        for name, weight in module.named_parameters(recurse=False)
        if weight.dim() == 2 and weight.requires_grad and (name == "weight" or name.endswith("_weight"))
    ]


def _last_layer(model: nn.Module) -> set[str]:
    """The module, declared last, that makes the logits; all of them where a timm model names several."""
    layers = {id(module): prefix for prefix, module in model.named_modules() if "weight" in dict(_own(module))}
    told = getattr(model, "get_classifier", None)
    named = told() if callable(told) else None
    heads = named if isinstance(named, (tuple, list)) else (named,)
    found = {layers[id(head)] for head in heads if id(head) in layers}
    matrix = [
        prefix
        for prefix, module in model.named_modules()
        for name, weight in _own(module)
        if name == "weight" and weight.dim() > 1
    ]
    return found or set(matrix[-1:])


def _own(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(module.named_parameters(recurse=False))
