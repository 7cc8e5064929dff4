"""Channels removed from a module, and a module given the shapes that were left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bmctl.core import masks
from bmctl.core.calling import tensors_of
from bmctl.core.layers import deterministic, evaluating, get_layer, matching, weight_layers
from bmctl.errors import PackageError, UnsupportedError
from bmctl.methods.structured import channels

if TYPE_CHECKING:
    from bmctl.methods import Example, Meta, MethodContext
    from bmctl.methods.structured import Config

# What pruning may change in a module besides its tensors: sizes that forward passes and exports read.
ATTRIBUTES = (
    "in_channels",
    "out_channels",
    "groups",
    "in_features",
    "out_features",
    "num_features",
    "num_channels",
    "num_parameters",
    "normalized_shape",
    "embedding_dim",
    "embed_dim",
    "kdim",
    "vdim",
    "hidden_dim",
    "head_dim",
    "attn_dim",
    "scale",
)


def prune(model: nn.Module, config: Config, context: MethodContext) -> Meta:
    """What `structured.apply` promises."""
    example = context.example
    before = _describe(model)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    model.requires_grad_(True)  # the graph is traced through autograd
    held = masks.masked_layers(model)
    for layer in held.values():
        # torch-pruning cuts a weight's gradient exactly as the weight: that carries the mask along.
        layer.weight.grad = masks.get_mask(layer).to(layer.weight.dtype)
    with deterministic(), evaluating(model):
        shapes = _shapes(model, example)
        groups = _prune(model, config, context)
        _mend(model)
        _check_runs(model, example, shapes)
    for layer in held.values():
        masks.set_mask(layer, layer.weight.grad.bool())
    for name, parameter in model.named_parameters():
        parameter.grad = None
        parameter.requires_grad_(name not in frozen)
    if held:
        masks.hold_masks(model)
    after = _describe(model)
    return {
        "shapes": {name: size for name, size in after[0].items() if before[0][name] != size},
        "attributes": _changed(before[1], after[1]),
        "groups": groups,
    }


def restore(model: nn.Module, meta: Meta) -> None:
    """What `structured.restore` promises."""
    for name, attributes in meta["attributes"].items():
        module = get_layer(model, name, what="structured")
        for key, value in attributes.items():
            old = getattr(module, key, None) if key in ATTRIBUTES else None
            if not _is_smaller(value, old):
                raise PackageError(f"the package's structured step sets {key} of {name!r} to {value!r}, it is {old!r}")
            setattr(module, key, tuple(value) if isinstance(value, list) else value)
    for name, shape in meta["shapes"].items():
        path, _, key = name.rpartition(".")
        _resize(get_layer(model, path, what="structured"), key, shape, name=name)
    if masks.masked_layers(model):
        masks.hold_masks(model)


def _is_smaller(value: Any, old: Any) -> bool:
    """Whether `value` may stand where `old` stands: pruning makes sizes smaller, and `scale` larger."""
    if isinstance(old, tuple) and isinstance(value, list) and len(value) == len(old):
        return all(_is_smaller(new, size) for new, size in zip(value, old, strict=True))
    if isinstance(old, float):
        return isinstance(value, float) and 0 < value < 1e3
    return type(value) is int and type(old) is int and 0 < value <= old


def _resize(module: nn.Module, key: str, shape: list[int], *, name: str) -> None:
    old: Any = module._parameters.get(key) if key in module._parameters else module._buffers.get(key)
    fits = old is not None and len(old.shape) == len(shape)
    if not fits or not all(
        isinstance(new, int) and 0 < new <= size for new, size in zip(shape, old.shape, strict=True)
    ):
        was = "nothing" if old is None else list(old.shape)
        raise PackageError(f"the package's structured step makes {name!r} {shape}, where the model has {was}")
    new = old.detach().new_zeros(shape)
    if key in module._parameters:
        module._parameters[key] = nn.Parameter(new, requires_grad=old.requires_grad)
    else:
        module._buffers[key] = new


def _prune(model: nn.Module, config: Config, context: MethodContext) -> dict[str, list[int]]:
    """{group: [channels before, channels after]}."""
    layers = weight_layers(model)
    ignored = [layers[name] for name in sorted(matching(list(layers), config.ignore, key="structured.ignore"))]
    outputs = channels.output_layers(model, context.example)
    graph = channels.dependency_graph(model, context.example)
    found: dict[str, list[int]] = {}
    try:
        groups = channels.find_groups(model, graph, ignored=[*ignored, *outputs], norm=int(config.norm[1]))
        if config.scope == "group":
            lost = channels.choose_per_group(groups, ratio=config.ratio)
        else:
            lost = channels.choose_globally(groups, ratio=config.ratio, max_ratio=config.max_ratio)
        lost = [channels.rounded(group, n, round_to=config.round_to) for group, n in zip(groups, lost, strict=True)]
        for group, num in zip(groups, lost, strict=True):
            context.check()
            if num:
                before = group.num_places * group.blocks
                found[group.name] = [before, before - channels.prune_group(graph, group, num)]
    except channels.TRACE_ERRORS as error:
        raise UnsupportedError(
            f"structured: {type(model).__name__} has channels that cannot be followed: {type(error).__name__}: {error}",
            hint="name the layer in `ignore`, or use `magnitude` or `svd`",
        ) from error
    if not found:
        raise UnsupportedError(
            f"structured: nothing left to prune in the {len(groups)} groups of {type(model).__name__}",
            hint="raise `ratio`, lower `round_to` or shorten `ignore`",
        )
    return found


def _mend(model: nn.Module) -> None:
    """Sizes that models keep as plain numbers and read in views, which torch-pruning does not know."""
    for attention, qkv in channels.attentions(model).items():
        head_dim = qkv.out_features // (3 * attention.num_heads)
        old = getattr(attention, "head_dim", head_dim)
        sizes = {"head_dim": head_dim, "attn_dim": attention.num_heads * head_dim, "scale": head_dim**-0.5}
        for key, value in sizes.items():
            if hasattr(attention, key) and getattr(attention, key) != value:
                setattr(attention, key, value)
        if isinstance(getattr(attention, "q_norm", None), nn.Identity):
            _rescale_queries(qkv, qkv.out_features // 3, head_dim / old)
    whole: Any = model
    if hasattr(whole, "hidden_dim") and hasattr(whole, "conv_proj"):  # torchvision's VisionTransformer
        whole.hidden_dim = whole.class_token.shape[-1]


def _rescale_queries(qkv: nn.Linear, num_rows: int, ratio: float) -> None:
    """Attention divides by the root of the width of a head, which has shrunk: queries shrink to keep the scores."""
    with torch.no_grad():
        qkv.weight[:num_rows] *= ratio**0.5
        if qkv.bias is not None:
            qkv.bias[:num_rows] *= ratio**0.5


def _shapes(model: nn.Module, example: Example) -> list[torch.Size]:
    """Of every tensor that the model gives."""
    return [tensor.shape for tensor in tensors_of(model(*example.values()))]


def _check_runs(model: nn.Module, example: Example, shapes: list[torch.Size]) -> None:
    """A forward pass at two batch sizes, with the outputs that it had."""
    for size in (1, 3):
        batch = {name: one[:1].expand(size, *one.shape[1:]).contiguous() for name, one in example.items()}
        try:
            with torch.no_grad():
                got = _shapes(model, batch)
        except (RuntimeError, ValueError, TypeError, AssertionError) as error:
            raise UnsupportedError(
                f"structured: {type(model).__name__} does not run after pruning: {error}",
                hint="its forward pass has a size written into it; name the layers around it in `ignore`",
            ) from error
        if got != [torch.Size((size, *shape[1:])) for shape in shapes]:
            raise UnsupportedError(
                f"structured: after pruning {type(model).__name__} gives {_shown(got)} for a batch of {size}, "
                f"before it gave {_shown([shape[1:] for shape in shapes])} per sample",
                hint="name the last layer in `ignore`",
            )


def _shown(shapes: Sequence[torch.Size]) -> str:
    return ", ".join(str(list(shape)) for shape in shapes)


def _describe(model: nn.Module) -> tuple[dict[str, list[int]], dict[str, dict[str, Any]]]:
    """Shapes of all tensors, and the sizes that modules hold."""
    shapes = {name: list(tensor.shape) for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    attributes = {}
    for name, module in model.named_modules():
        values = {key: vars(module)[key] for key in ATTRIBUTES if key in vars(module)}
        attributes[name] = {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in values.items()
            if isinstance(value, (int, float, tuple))
        }
    return shapes, attributes


def _changed(before: dict[str, dict[str, Any]], after: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    changes = {
        name: {key: value for key, value in values.items() if before[name].get(key) != value}
        for name, values in after.items()
    }
    return {name: values for name, values in changes.items() if values}
