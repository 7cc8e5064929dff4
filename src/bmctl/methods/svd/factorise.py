"""A layer and the two that take its place.

Linear [O, I] -> [R, I] then [O, R]. Conv [O, I, k, k] -> the same conv with R outputs, then 1x1 [O, R]. The product is
the best approximation of rank R; a full-size weight is never rebuilt. The second layer of a conv works at the output's
resolution, as the whole did, so that fewer parameters are fewer multiplications in the same proportion.

Weight legend: O out channels, I in channels, k kernel, R rank.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.utils import skip_init

from bmctl.core.layers import Factors, deterministic, evaluating, get_layer, matching, replace_layer, weight_layers
from bmctl.core.masks import has_mask
from bmctl.errors import PackageError, UnsupportedError

if TYPE_CHECKING:
    from bmctl.methods import Example, Meta, MethodContext
    from bmctl.methods.svd import Config


def factorise(model: nn.Module, config: Config, context: MethodContext) -> Meta:
    """What `svd.apply` promises."""
    layers, kept = _chosen(model, config, context.example)
    ranks: dict[str, int] = {}
    notes: list[str] = []
    with deterministic():
        for name, layer in layers.items():
            context.check()
            rank, factors = _factorise(layer, config)
            if factors is None:
                kept[name] = f"rank {rank} would not make it smaller"
                continue
            if has_mask(layer):
                notes.append(f"{name}: its magnitude mask is dropped, as the factors of a sparse weight are dense")
            replace_layer(model, name, factors)
            ranks[name] = rank
    if not ranks:
        raise UnsupportedError(
            f"svd: no layer gets smaller ({'; '.join(f'{name}: {why}' for name, why in list(kept.items())[:4])})",
            hint="lower rank, ratio or energy, or name other layers in `include`",
        )
    _check_runs(model, context.example)
    return {"layers": ranks, "kept": kept, "notes": notes}


def restore(model: nn.Module, meta: Meta) -> None:
    """What `svd.restore` promises."""
    for name, rank in meta["layers"].items():
        layer = get_layer(model, name, what="svd")
        if type(layer) not in (nn.Linear, nn.Conv2d):
            raise PackageError(f"the package's svd step factorises {name!r}, which is a {type(layer).__name__} here")
        rows, columns = _matrix_shape(layer)
        if not isinstance(rank, int) or not 1 <= rank <= min(rows, columns):
            raise PackageError(
                f"the package's svd step gives {name!r} the rank {rank!r} of a {rows} x {columns} weight"
            )
        replace_layer(model, name, _empty(layer, rank))


def _chosen(model: nn.Module, config: Config, example: Example) -> tuple[dict[str, Any], dict[str, str]]:
    """Layers to factorise, and why each other one is left."""

    everything = weight_layers(model)
    names = list(everything)
    included = matching(names, config.include, key="svd.include") if config.include else set(names)
    ignored = matching(names, config.ignore, key="svd.ignore")
    inside = {f"{name}.{i}" for name, m in model.named_modules() if isinstance(m, Factors) for i in range(len(m))}
    called = _called(model, example)
    layers, kept = {}, {}
    for name, layer in everything.items():
        if layer.weight.numel() < config.min_weights:
            kept[name] = f"has {layer.weight.numel()} weights"
            continue
        if name not in included or name in ignored:
            continue
        if name in inside:
            kept[name] = "is a factor of an earlier svd step already"
        elif type(layer) not in (nn.Linear, nn.Conv2d):
            kept[name] = f"is a {type(layer).__name__}"
        elif getattr(layer, "groups", 1) != 1:
            kept[name] = f"has {layer.groups} groups"
        elif name not in called:
            kept[name] = "its weight is used without calling the layer"
        else:
            layers[name] = layer
    return layers, kept


def _called(model: nn.Module, example: Example) -> set[str]:
    """Names of the submodules that a forward pass calls."""

    called: set[str] = set()
    handles = [
        module.register_forward_hook(lambda *_, name=name: called.add(name)) for name, module in model.named_modules()
    ]
    try:
        with evaluating(model), torch.no_grad():
            model(*example.values())
    finally:
        for handle in handles:
            handle.remove()
    return called


def _matrix_shape(layer: Any) -> tuple[int, int]:
    """(O, I * k * k)."""
    return layer.weight.shape[0], layer.weight.shape[1:].numel()


def _choose_rank(config: Config, s_R: torch.Tensor, rows: int, columns: int) -> int:
    if config.rank is not None:
        return config.rank
    if config.ratio is not None:
        return max(1, math.floor(config.ratio * rows * columns / (rows + columns)))
    assert config.energy is not None
    share = s_R.square().cumsum(0) / s_R.square().sum().clamp_min(1e-300)
    return min(int((share < config.energy).sum()) + 1, len(s_R))


def _factorise(layer: Any, config: Config) -> tuple[int, nn.Module | None]:
    """The rank, and the two factors where they have fewer weights than the layer."""
    rows, columns = _matrix_shape(layer)
    # float64 and a fixed sign: the same factors on every machine to rounding.
    w_OI = layer.weight.detach().cpu().double().reshape(rows, columns)
    u_OR, s_R, v_RI = torch.linalg.svd(w_OI, full_matrices=False)
    rank = _choose_rank(config, s_R, rows, columns)
    if rank * (rows + columns) >= rows * columns:
        return rank, None
    u_OR, s_R, v_RI = u_OR[:, :rank], s_R[:rank], v_RI[:rank]
    largest = u_OR.abs().argmax(dim=0, keepdim=True)
    sign = torch.where(u_OR.gather(0, largest) < 0, -1.0, 1.0).squeeze(0)
    root = s_R.sqrt() * sign
    factors = _empty(layer, rank)
    with torch.no_grad():
        factors[0].weight.copy_((root[:, None] * v_RI).reshape(factors[0].weight.shape))
        factors[1].weight.copy_((u_OR * root).reshape(factors[1].weight.shape))
        if layer.bias is not None:
            factors[1].bias.copy_(layer.bias)
    return rank, factors.train(layer.training)


def _empty(layer: Any, rank: int) -> Any:
    """Factors of the layer's geometry, with weights to be filled in."""

    place = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    bias = layer.bias is not None
    if isinstance(layer, nn.Linear):
        return Factors(
            skip_init(nn.Linear, layer.in_features, rank, bias=False, **place),
            skip_init(nn.Linear, rank, layer.out_features, bias=bias, **place),
        )
    geometry = {key: getattr(layer, key) for key in ("kernel_size", "stride", "padding", "dilation", "padding_mode")}
    return Factors(
        skip_init(nn.Conv2d, layer.in_channels, rank, bias=False, **geometry, **place),
        skip_init(nn.Conv2d, rank, layer.out_channels, kernel_size=1, bias=bias, **place),
    )


def _check_runs(model: nn.Module, example: Example) -> None:
    try:
        with evaluating(model), torch.no_grad():
            model(*example.values())
    except (AttributeError, RuntimeError, TypeError) as error:
        raise UnsupportedError(
            f"svd: {type(model).__name__} does not run with factorised layers: {error}",
            hint="name the layer whose weight the forward pass reads itself in `ignore`",
        ) from error
