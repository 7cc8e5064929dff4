"""Which parameters an optimizer treats alike: weight decay or none, the rate of their layer, Muon or AdamW."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from fnmatch import fnmatchcase
from itertools import accumulate
from typing import Any

from torch import nn

from bmctl.core.masks import has_mask
from bmctl.engine.modules.blocks import find_blocks
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
    number = {block: index for index, block in enumerate(blocks, start=1)}
    inside = [_block_of(name, number) for name in names]
    num_before_head = max(index for index, block in enumerate(inside, start=1) if block)
    reached = accumulate(inside, max)
    depths = [block or before for block, before in zip(inside, reached, strict=True)][:num_before_head]
    depths += [len(blocks) + 1] * (len(names) - num_before_head)
    return {name: decay ** (len(blocks) + 1 - depth) for name, depth in zip(names, depths, strict=True)}


def _block_of(name: str, number: dict[str, int]) -> int:
    """Number of the block, from 1, that a parameter lies in; 0 for none."""
    parts = name.split(".")
    above = (".".join(parts[:end]) for end in range(1, len(parts)))
    return next((number[path] for path in above if path in number), 0)


def matrices(model: nn.Module) -> list[str]:
    """Names of the weights that multiply their layer's input: what Muon is for.

    Not among them are embeddings and other tables, convolutions, the last layer, and pruned weights, which would not
    stay zero when their matrix is made orthogonal.
    """
    heads = _heads(model)
    return [
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if module not in heads and not isinstance(module, _EMBEDDINGS) and not has_mask(module)
        for name, weight in module.named_parameters(recurse=False)
        if weight.dim() == 2
        and min(weight.shape) > 1
        and weight.requires_grad
        and (name == "weight" or name.endswith("_weight"))
    ]


def _heads(model: nn.Module) -> list[nn.Module]:
    """The layers that make the logits: those that a timm model names, else the one that is declared last."""
    told = getattr(model, "get_classifier", None)
    named = told() if callable(told) else None
    found = [head for head in (named if isinstance(named, tuple | list) else [named]) if isinstance(head, nn.Module)]
    layers = [module for module in model.modules() if getattr(module, "weight", None) is not None]
    matrix = [layer for layer in layers if isinstance(layer.weight, nn.Parameter) and layer.weight.dim() > 1]
    return [head for head in found if head in layers] or matrix[-1:]
