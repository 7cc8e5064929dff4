"""Magnitude pruning: the smallest weights of all layers together become zero, and stay zero.

Source: Han et al. 2015, https://arxiv.org/abs/1506.02626
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from bmctl.fit import ModuleStepConfig
from bmctl.schema import Many

if TYPE_CHECKING:
    import torch
    from torch import nn

    from bmctl.methods import Meta, MethodContext

FAMILY = "prune"
LEVEL = "module"


class Config(ModuleStepConfig):
    """Prune the smallest weights of all Conv and Linear layers, ranked together.

    Attributes:
        sparsity: Fraction of the ranked weights that are zero afterwards, earlier pruning included.
        ignore: Names of layers left as they are, such as ``head`` or ``layer1.*``.
        min_weights: Layers with fewer weights than this are left as they are.
    """

    method: Literal["magnitude"] = "magnitude"
    sparsity: Annotated[float, Field(gt=0, lt=1)] = 0.5
    ignore: Many[str] = ()
    min_weights: Annotated[int, Field(ge=0)] = 0


def apply(model: nn.Module, config: Config, context: MethodContext) -> Meta:
    """Zero the smallest weights in place and hold them there.

    Args:
        model: Changed in place; layers get a `weight_mask` buffer.
        config: The step.
        context: Not looked at.

    Returns:
        `layers`: {name: number of weights kept}.

    Raises:
        UnsupportedError: Nothing to prune, or as sparse already.
        RecipeError: A pattern of `ignore` matches no layer.
    """
    from bmctl.core.layers import deterministic
    from bmctl.core.masks import get_mask, has_mask, hold_masks, set_mask
    from bmctl.errors import UnsupportedError

    layers = _chosen(model, config)
    with deterministic():
        masks = {name: get_mask(layer) for name, layer in layers.items() if has_mask(layer)}
        num_weights = sum(layer.weight.numel() for layer in layers.values())
        num_pruned = round(config.sparsity * num_weights)
        before = sum(int((~mask).sum()) for mask in masks.values())
        if num_pruned <= before:
            raise UnsupportedError(
                f"magnitude: sparsity {config.sparsity:g} prunes {num_pruned} of {num_weights} weights, "
                f"and {before} of them are pruned already",
                hint="raise `sparsity`: it counts what earlier steps pruned",
            )
        keep = _smallest_dropped(layers, masks, num_pruned)
        for name, layer in layers.items():
            set_mask(layer, keep[name])
    hold_masks(model)
    return {"layers": {name: int(mask.sum()) for name, mask in keep.items()}}


def restore(model: nn.Module, config: Config, meta: Meta) -> None:
    """Give the layers their mask buffers, whose bits are loaded with the weights.

    Raises:
        PackageError: The meta does not fit the model.
    """
    import torch

    from bmctl.core.layers import get_layer, weight_layers
    from bmctl.core.masks import MASK, has_mask, hold_masks, num_bytes
    from bmctl.errors import PackageError

    known = weight_layers(model)
    for name in meta["layers"]:
        layer = get_layer(model, name, what="magnitude")
        if name not in known:
            raise PackageError(f"the package's magnitude step masks {name!r}, which is no Conv or Linear layer")
        if not has_mask(layer):
            size = num_bytes(layer.weight.shape)
            layer.register_buffer(MASK, torch.full((size,), 255, dtype=torch.uint8, device=layer.weight.device))
    hold_masks(model)


def _chosen(model: nn.Module, config: Config) -> dict[str, Any]:
    from bmctl.core.layers import matching, weight_layers
    from bmctl.errors import UnsupportedError

    layers = weight_layers(model)
    ignored = matching(list(layers), config.ignore, key="magnitude.ignore")
    chosen = {
        name: layer
        for name, layer in layers.items()
        if name not in ignored and layer.weight.numel() >= config.min_weights
    }
    if not chosen:
        raise UnsupportedError(
            f"magnitude: none of the model's {len(layers)} Conv and Linear layers is left to prune",
            hint="shorten `ignore` or lower `min_weights`",
        )
    return chosen


def _smallest_dropped(
    layers: dict[str, Any], masks: dict[str, torch.Tensor], num_pruned: int
) -> dict[str, torch.Tensor]:
    """bool masks with exactly `num_pruned` False, ties broken by position; pruned weights stay pruned."""
    import torch

    scores = []
    for name, layer in layers.items():
        score = layer.weight.detach().abs().float().cpu()
        scores.append(score.masked_fill(~masks[name].cpu(), -1.0) if name in masks else score)
    order = torch.argsort(torch.cat([score.reshape(-1) for score in scores]), stable=True)
    keep = torch.ones(order.numel(), dtype=torch.bool)
    keep[order[:num_pruned]] = False
    parts = keep.split([score.numel() for score in scores])
    return {
        name: part.reshape(layer.weight.shape).to(layer.weight.device)
        for (name, layer), part in zip(layers.items(), parts, strict=True)
    }
