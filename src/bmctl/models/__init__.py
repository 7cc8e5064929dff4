"""What a recipe may name as a model: ``bmctl:rescnn``, ``torchvision:resnet18``, ``timm:NAME``, ``transformers:NAME``.

A new source of models is a file here and a line in MODELS.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING, Protocol

from bmctl.errors import RecipeError
from bmctl.models import own, timm, torchvision, transformers
from bmctl.models.spec import Argument, Drops, InputDefaults, ModelConfig, ModelSpec, construct, no_drop

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "MODELS",
    "Argument",
    "Drops",
    "InputDefaults",
    "ModelConfig",
    "ModelSource",
    "ModelSpec",
    "build",
    "check_name",
    "input_defaults",
    "resolve",
    "spec_args",
]


class ModelSource(Protocol):
    """A module of this folder."""

    def names(self) -> list[str]: ...
    def input_defaults(self, config: ModelConfig) -> InputDefaults: ...
    def drop_arguments(self, config: ModelConfig) -> Drops: ...
    def build(self, spec: ModelSpec, *, pretrained: bool = False) -> nn.Module:
        """A module from float32 [N, channels, H, W] to logits [N, num_classes]."""
        ...


MODELS: Mapping[str, ModuleType] = MappingProxyType(
    {"bmctl": own, "torchvision": torchvision, "timm": timm, "transformers": transformers}
)


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
    if bare not in known and not (prefix == "transformers" and "/" in bare):  # a repository, which the hub knows
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
    check_name(spec.name)
    return transformers.resolve(spec) if spec.name.startswith("transformers:") else spec


def build(spec: ModelSpec, *, pretrained: bool = False) -> nn.Module:
    """A module from float32 [N, channels, H, W] to logits [N, num_classes].

    With `pretrained` and another number of classes than the published InputDefaults.num_classes, the head is new.

    Raises:
        RecipeError: Unknown name, arguments, size or channels that the model does not take.
        DependencyError: Weights that cannot be downloaded, or an extra that is not installed.
    """
    import torch

    check_name(spec.name)
    model = MODELS[spec.name.partition(":")[0]].build(spec, pretrained=pretrained)
    # Networks that halve too often for small images say so only when they run.
    training = model.training
    with torch.no_grad():
        logits = construct(lambda: model.eval()(torch.zeros(1, spec.channels, *spec.size)), spec=spec)
    if not isinstance(logits, torch.Tensor) or logits.shape != (1, spec.num_classes):
        raise RecipeError(
            f"model: {spec.name} gives no logits [N, {spec.num_classes}]", hint="take a model that classifies images"
        )
    return model.train(training)
