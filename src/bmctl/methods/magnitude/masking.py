"""Weights masked by their magnitude."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bmctl.core.layers import deterministic, get_layer, matching, weight_layers
from bmctl.core.masks import MASK, get_mask, has_mask, hold_masks, num_bytes, set_mask
from bmctl.errors import PackageError, UnsupportedError

if TYPE_CHECKING:
    from bmctl.methods import Meta
    from bmctl.methods.magnitude import Config


def prune(model: nn.Module, config: Config) -> Meta:
    """What `magnitude.apply` promises."""
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


def restore(model: nn.Module, meta: Meta) -> None:
    """What `magnitude.restore` promises."""
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
