"""What a recipe may name as a model: ``bmctl:rescnn``, ``torchvision:resnet18``, ``timm:NAME``, ``transformers:NAME``."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Protocol

from pydantic import Field

from bmctl.schema import Count, Many, Preprocess, Strict

if TYPE_CHECKING:
    from torch import nn

Argument = bool | int | float | str | Many[int]


class ModelConfig(Strict):
    """The `model` section: a name with its source as prefix, and the constructor's arguments.

    Attributes:
        pretrained: Download the published weights; naming it is asking for the download.
    """

    name: Annotated[str, Field(pattern=r"^(bmctl|torchvision|timm|transformers):[A-Za-z0-9_.\-/]{1,200}$")]
    args: dict[str, Argument] = {}
    pretrained: bool = False


class ModelSpec(Strict):
    """A model that can be built again without data or network: what a package's manifest records."""

    name: str
    args: dict[str, Argument] = {}
    num_classes: Count
    channels: int
    size: Many[Count]


class InputDefaults(Strict):
    """What a model's publisher says about its input; None where it takes anything.

    `channels` and `size` of None mean that the data decides.
    """

    size: Many[Count] | None = None
    channels: int | None = None
    mean: Many[float] | None = None
    std: Many[float] | None = None
    interpolation: str | None = None
    crop: float | None = None


class ModelSource(Protocol):
    """A module of this folder."""

    def names(self) -> list[str]: ...
    def input_defaults(self, config: ModelConfig) -> InputDefaults: ...
    def build(self, spec: ModelSpec, *, pretrained: bool) -> nn.Module:
        """A module from float32 [N, channels, H, W] to logits [N, num_classes]."""
        ...
