"""What a recipe may name as a model: ``bmctl:rescnn``, ``torchvision:resnet18``, ``timm:NAME``, ``transformers:NAME``.

A new source of models is a file here and a line in MODELS.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING, Protocol

from bmctl.core.published import Published
from bmctl.errors import RecipeError
from bmctl.models import file, own, timm, torchvision, transformers
from bmctl.models.spec import Argument, Drops, ModelConfig, ModelSpec, bare_name, construct, no_drop, words
from bmctl.schema import BATCH

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = [
    "MODELS",
    "Argument",
    "Drops",
    "ModelConfig",
    "ModelSource",
    "ModelSpec",
    "build",
    "check_name",
    "published",
    "resolve",
    "spec_args",
]


class ModelSource(Protocol):
    """A module of this folder."""

    def names(self) -> list[str]: ...
    def published(self, config: ModelConfig) -> Published: ...
    def drop_arguments(self, config: ModelConfig) -> Drops: ...
    def build(self, spec: ModelSpec, *, pretrained: bool = False) -> nn.Module:
        """A module from `spec.given`, by position, to logits [N, num_classes]."""
        ...


MODELS: Mapping[str, ModuleType] = MappingProxyType(
    {"bmctl": own, "torchvision": torchvision, "timm": timm, "transformers": transformers, "file": file}
)

_SMALL = 8
"""Size of a free axis of which nothing is told."""


def check_name(name: str) -> None:
    """Refuse a model that its source does not have.

    Args:
        name: With its source as prefix.

    Raises:
        RecipeError: Unknown, with the names that come closest.
    """
    import difflib

    prefix, bare = name.partition(":")[0], bare_name(name)
    known = MODELS[prefix].names()
    if bare not in known and not (prefix in ("transformers", "file") and MODELS[prefix].is_elsewhere(bare)):
        close = difflib.get_close_matches(bare, known, n=3)
        meant = " or ".join(f"{prefix}:{each}" for each in close)
        raise RecipeError(
            f"model.name: there is no model {name!r}",
            hint=f"did you mean {meant}?" if meant else f"take one of {known[:20]}",
        )


def published(config: ModelConfig) -> Published:
    """What the model's publisher says of its input, and of the classes of published weights.

    Raises:
        RecipeError: Unknown name.
        DependencyError: Told by a file that has to be downloaded and cannot be.
    """
    check_name(config.name)
    return MODELS[config.name.partition(":")[0]].published(config)


def spec_args(config: ModelConfig) -> dict[str, Argument]:
    """What a ModelSpec keeps: `args`, with `dropout` and `stochastic_depth` under the names of the model's constructor.

    Raises:
        RecipeError: The model has no such argument, or `args` has it as well.
        DependencyError: Told by a file that has to be downloaded and cannot be.
    """
    asked = {"dropout": config.dropout, "stochastic_depth": config.stochastic_depth}
    wanted = {field: value for field, value in asked.items() if value is not None}
    if not wanted:
        return dict(config.args)
    check_name(config.name)
    known = MODELS[config.name.partition(":")[0]].drop_arguments(config)
    args = dict(config.args)
    for field, value in wanted.items():
        argument = getattr(known, field)
        if argument is None:
            raise no_drop(config.name, field)
        if argument in args:
            raise RecipeError(
                f"model.{field} and model.args.{argument} are the same argument of {config.name}",
                hint=f"remove {argument} from model.args",
            )
        args[argument] = value
    return args


def resolve(spec: ModelSpec) -> ModelSpec:
    """The spec with everything inside that `build` needs without a network; for a package's manifest.

    Raises:
        DependencyError: A repository's configuration cannot be downloaded.
    """
    _check_spec(spec)
    return transformers.resolve(spec) if spec.name.startswith("transformers:") else spec


def _check_spec(spec: ModelSpec) -> None:
    """Of what is stored whole, the name says only where it came from."""
    if transformers.CONFIG not in spec.args:
        check_name(spec.name)


def build(spec: ModelSpec, *, pretrained: bool = False) -> nn.Module:
    """A module from `spec.given`, by position, to logits [N, num_classes] where the spec is told a number of classes.

    With `pretrained` and another number of classes than Published.num_classes, the head is new.

    Raises:
        RecipeError: Unknown name, arguments or inputs that the model does not take, or outputs that are no logits.
        DependencyError: Weights that cannot be downloaded, or an extra that is not installed.
    """
    import torch

    _check_spec(spec)
    model = MODELS[spec.name.partition(":")[0]].build(spec, pretrained=pretrained)
    # Networks that halve too often for small images, or know too few positions, say so only when they run.
    training = model.training
    with torch.no_grad():
        found = construct(lambda: model.eval()(*_zeros(spec)), spec=spec)
    num_classes = spec.told.get("num_classes")
    if num_classes is not None and not (isinstance(found, torch.Tensor) and found.shape == (1, num_classes)):
        raise RecipeError(
            f"model: {spec.name} gives no logits [N, {num_classes}] for {words(spec.given)}",
            hint="take a model that classifies",
        )
    return model.train(training)


def _zeros(spec: ModelSpec) -> list[torch.Tensor]:
    """One sample of what the model takes; a free axis is as long as the model is told that it may get.

    Ids are of no padding: some models count positions only where there is none.
    """
    import torch

    token = int(spec.told.get("pad_id") == 0)

    def size(axis: int | str) -> int:
        longest = spec.told.get(f"max_{axis}", _SMALL)
        return axis if isinstance(axis, int) else 1 if axis == BATCH else longest if type(longest) is int else _SMALL

    def fill(dtype: str) -> int:
        return token if dtype == "int64" else 0

    return [
        torch.full([size(axis) for axis in each.shape], fill(each.dtype), dtype=getattr(torch, each.dtype))
        for each in spec.given
    ]
