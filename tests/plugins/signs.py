"""A method: every Linear keeps the signs of its weights, and one size for all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from bmctl.errors import UnsupportedError
from bmctl.fit import ModuleStepConfig
from bmctl.schema import Many

if TYPE_CHECKING:
    from torch import nn

    from bmctl.methods import Meta, MethodContext

VERB = "quantize"
LEVEL = "module"
CALIBRATES = False
QUANTIZES = False


class Config(ModuleStepConfig):
    method: Literal["signs"] = "signs"
    ignore: Many[str] = ()


def apply(model: nn.Module, config: Config, context: MethodContext) -> Meta:
    import torch
    from torch import nn

    layers = [
        name for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and name not in config.ignore
    ]
    if not layers:
        raise UnsupportedError("signs: the model has no Linear layer")
    with torch.no_grad():
        for name in layers:
            layer = model.get_submodule(name)
            size = layer.weight.abs().mean()
            layer.weight.copy_(torch.where(layer.weight < 0, -size, size))
            layer.register_buffer("size", size)
    return {"layers": layers}


def restore(model: nn.Module, config: Config, meta: Meta) -> None:
    """The sizes are buffers, which weights are loaded into."""
    import torch

    for name in meta["layers"]:
        model.get_submodule(name).register_buffer("size", torch.zeros(()))
