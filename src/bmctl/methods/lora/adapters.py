"""Thin layers beside a model's own: put there, and merged."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from bmctl.core.layers import deterministic, get_layer, matching, replace_layer
from bmctl.core.masks import has_mask
from bmctl.errors import DependencyError, PackageError, UnsupportedError

if TYPE_CHECKING:
    from bmctl.methods import Meta
    from bmctl.methods.lora import Config


def adapt(model: nn.Module, config: Config) -> Meta:
    """What `lora.apply` promises."""
    names = _chosen(model, config)
    _inject(model, names, config)
    return {"layers": names, "merged": False}


def merge(model: nn.Module, names: Sequence[str]) -> None:
    """What `lora.finish` promises."""
    for name in names:
        layer: Any = model.get_submodule(name)
        layer.merge(safe_merge=True)
        replace_layer(model, name, layer.get_base_layer())
    model.requires_grad_(True)


def restore(model: nn.Module, config: Config, meta: Meta) -> None:
    """What `lora.restore` promises."""
    if meta["merged"]:
        return
    for name in meta["layers"]:
        layer = get_layer(model, name, what="lora")
        if not _is_linear(layer):
            raise PackageError(f"the package's lora step adapts {name!r}, which is a {type(layer).__name__} here")
    _inject(model, meta["layers"], config)


def _chosen(model: nn.Module, config: Config) -> list[str]:
    users: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            users[id(parameter)] = users.get(id(parameter), 0) + 1
    layers = {name: module for name, module in model.named_modules() if _is_linear(module)}
    free = [name for name, layer in layers.items() if users[id(layer.weight)] == 1 and not has_mask(layer)]
    included = matching(free, config.include, key="lora.include") if config.include else set(free)
    ignored = matching(free, config.ignore, key="lora.ignore")
    names = [name for name in free if name in included - ignored]
    if not names:
        raise UnsupportedError(
            f"lora: {type(model).__name__} has no Linear layer to adapt", hint="shorten `ignore`, or train the model"
        )
    return names


def _is_linear(module: Any) -> bool:
    """A Linear, or what GPT-2 has in its place."""
    return type(module) is nn.Linear or type(module).__name__ == "Conv1D"


def _inject(model: nn.Module, names: Sequence[str], config: Config) -> None:
    try:
        import peft
    except ImportError as error:
        raise DependencyError(
            "the method lora needs peft, which is not installed", hint="pip install 'bmctl[peft]'"
        ) from error
    asked = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha or 2 * config.rank,
        lora_dropout=config.dropout,
        target_modules="|".join(re.escape(name) for name in names),  # as text: the whole name must fit
    )
    with deterministic(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a Conv1D is stored the other way round
        peft.inject_adapter_in_model(asked, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
