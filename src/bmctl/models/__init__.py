"""What a recipe may name as a model: ``bmctl:rescnn``, ``torchvision:resnet18``, ``timm:NAME``, ``transformers:NAME``.

A new source of models is a file here and a line in MODELS.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING, Protocol

from bmctl.errors import RecipeError
from bmctl.models import own
from bmctl.models.spec import Argument, InputDefaults, ModelConfig, ModelSpec

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "MODELS",
    "Argument",
    "InputDefaults",
    "ModelConfig",
    "ModelSource",
    "ModelSpec",
    "build",
    "check_name",
    "input_defaults",
]


class ModelSource(Protocol):
    """A module of this folder."""

    def names(self) -> list[str]: ...
    def input_defaults(self, config: ModelConfig) -> InputDefaults: ...
    def build(self, spec: ModelSpec, *, pretrained: bool = False) -> nn.Module:
        """A module from float32 [N, channels, H, W] to logits [N, num_classes]."""
        ...


MODELS: Mapping[str, ModuleType] = MappingProxyType({"bmctl": own})


def check_name(name: str) -> None:
    """Refuse a model that its source does not have.

    Args:
        name: With its source as prefix.

    Raises:
        RecipeError: Unknown, with the names that come closest.
    """
    import difflib

    prefix, _, bare = name.partition(":")
    known = MODELS[prefix].names()
    if known and bare not in known:
        close = difflib.get_close_matches(bare, known, n=3)
        meant = " or ".join(f"{prefix}:{each}" for each in close)
        raise RecipeError(
            f"model.name: there is no model {name!r}",
            hint=f"did you mean {meant}?" if meant else f"take one of {known[:20]}",
        )


def input_defaults(config: ModelConfig) -> InputDefaults:
    """What the model's publisher says about its input.

    Raises:
        RecipeError: Unknown name.
        DependencyError: Told by a file that has to be downloaded and cannot be.
    """
    check_name(config.name)
    return MODELS[config.name.partition(":")[0]].input_defaults(config)


def build(spec: ModelSpec, *, pretrained: bool = False) -> nn.Module:
    """A module from float32 [N, channels, H, W] to logits [N, num_classes].

    With `pretrained` and another number of classes than the published InputDefaults.num_classes, the head is new.

    Raises:
        RecipeError: Unknown name, arguments, size or channels that the model does not take.
        DependencyError: Weights that cannot be downloaded, or an extra that is not installed.
    """
    check_name(spec.name)
    return MODELS[spec.name.partition(":")[0]].build(spec, pretrained=pretrained)
