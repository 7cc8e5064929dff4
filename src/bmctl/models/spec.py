"""How models are named and described: torch-free, and shared by the sources of models beside this file."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Annotated, Literal, TypeVar

from pydantic import Field

from bmctl.errors import RecipeError
from bmctl.schema import Count, Many, Strict

T = TypeVar("T")

_WITH = {
    "dropout": "bmctl:rescnn or bmctl:mlp (dropout), torchvision:vgg*, *efficientnet* or vit_* (dropout), "
    "most of timm (drop_rate), many of transformers (hidden_dropout_prob)",
    "stochastic_depth": "bmctl:rescnn (stochastic_depth), torchvision:convnext_* or efficientnet_* "
    "(stochastic_depth_prob), most of timm and many of transformers (drop_path_rate)",
}

Probability = Annotated[float, Field(ge=0, lt=1)]
Argument = bool | int | float | str | Many[int]


class ModelConfig(Strict):
    """The `model` section: a name with its source as prefix, and the constructor's arguments.

    Attributes:
        pretrained: Download the published weights; naming it is asking for the download.
        dropout: Overrides the probability by which the model leaves activations out in training.
        stochastic_depth: The same for whole residual branches, at the last block; less at those before it.
    """

    name: Annotated[str, Field(pattern=r"^(bmctl|torchvision|timm|transformers):[A-Za-z0-9_.\-/]{1,200}$")]
    args: dict[str, Argument] = Field(default_factory=dict)
    pretrained: bool = False
    dropout: Probability | None = None
    stochastic_depth: Probability | None = None


class ModelSpec(Strict):
    """A model that can be built again without data or network: what a package's manifest records."""

    name: str
    args: dict[str, Argument] = Field(default_factory=dict)
    num_classes: Count
    channels: int
    size: Many[Count]


class InputDefaults(Strict):
    """What a publisher says about a model's input and, for published weights, its classes; None leaves it to the data.

    Attributes:
        size: (height, width) in pixels.
        mean: Per channel, of pixels in [0, 1]; only for published weights.
        std: Per channel, of pixels in [0, 1]; only for published weights.
        num_classes: What the published weights tell apart; with another number of classes the head starts anew.
        class_names: In the order of the logits.
    """

    size: Many[Count] | None = None
    channels: Literal[1, 3] | None = None
    mean: Many[float] | None = None
    std: Many[float] | None = None
    interpolation: Literal["nearest", "bilinear", "bicubic"] | None = None
    crop: float | None = None
    num_classes: Count | None = None
    class_names: Many[str] | None = None


class Drops(Strict):
    """How a model's constructor calls its dropout and its stochastic depth; None where it has none."""

    dropout: str | None = None
    stochastic_depth: str | None = None


def no_drop(name: str, field: str) -> RecipeError:
    """What to say to a `dropout` or `stochastic_depth` that a model cannot have."""
    return RecipeError(
        f"model.{field}: {name} takes no such probability",
        hint=f"remove model.{field}, or take a model that has it: {_WITH[field]}",
    )


def bare_name(name: str) -> str:
    """``timm:vit_tiny_patch16_224`` without its source."""
    return name.partition(":")[2]


def check_fits(spec: ModelSpec, *, reserved: Collection[str]) -> None:
    """Refuse arguments that bmctl sets itself.

    Raises:
        RecipeError: One of `reserved` is among the spec's arguments.
    """
    taken = sorted(set(spec.args) & set(reserved))
    if taken:
        raise RecipeError(
            f"model.args.{taken[0]}: bmctl sets this itself, from the data and from data.input",
            hint=f"remove {taken[0]} from model.args",
        )


def construct(make: Callable[[], T], *, spec: ModelSpec) -> T:
    """Call a constructor with a recipe's arguments.

    Raises:
        RecipeError: It does not take them.
    """
    try:
        return make()
    except (TypeError, ValueError, AssertionError, RuntimeError, AttributeError, KeyError, ZeroDivisionError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        given = f" with {dict(spec.args)}" if spec.args else ""
        raise RecipeError(
            f"model: {spec.name} cannot be built for images of {spec.size[0]}x{spec.size[1]}{given} ({reason})",
            hint="check model.args and data.input.size against the model's documentation",
        ) from error
