"""How models are named and described: torch-free, and shared by the sources of models beside this file."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Annotated, TypeVar

from pydantic import Field

from bmctl.errors import RecipeError
from bmctl.schema import Many, Strict, TensorSpec, resolve_env

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
        name: Of a folder, it may hold ``${ENV:NAME}``.
        pretrained: Download the published weights; naming it is asking for the download.
        dropout: Overrides the probability by which the model leaves activations out in training.
        stochastic_depth: The same for whole residual branches, at the last block; less at those before it.
    """

    name: Annotated[str, Field(pattern=r"^(bmctl|torchvision|timm|transformers|file):[A-Za-z0-9_.\-/${}:@]{1,200}$")]
    args: dict[str, Argument] = Field(default_factory=dict)
    pretrained: bool = False
    dropout: Probability | None = None
    stochastic_depth: Probability | None = None


class ModelSpec(Strict):
    """A model that can be built again without data or network: what a package's manifest records.

    Attributes:
        given: What it takes, in order.
        told: What data and task say of it: ``num_classes``, or ``head`` where it gives something else than classes; of
            texts ``vocab_size``, ``max_tokens`` and ``pad_id``.
    """

    name: str
    args: dict[str, Argument] = Field(default_factory=dict)
    given: Many[TensorSpec] = Field(min_length=1)
    told: dict[str, Argument] = Field(default_factory=dict)


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
    """``timm:vit_tiny_patch16_224`` without its source.

    Raises:
        RecipeError: It holds environment variables that are not set.
    """
    return resolve_env(name.partition(":")[2])


def takes_text(spec: ModelSpec) -> bool:
    """Whether it is given token ids and their mask."""
    return tuple((each.name, each.dtype, len(each.shape)) for each in spec.given) == (
        ("input_ids", "int64", 2),
        ("attention_mask", "int64", 2),
    )


def image_of(spec: ModelSpec) -> tuple[int, tuple[int, int]]:
    """Channels, and (height, width) in pixels, of the images that it is given.

    Raises:
        RecipeError: It is given something else, or images of any size.
    """
    shape = spec.given[0].shape
    if len(spec.given) != 1 or spec.given[0].dtype != "float32" or len(shape) != 4:
        raise RecipeError(
            f"model.name: {spec.name} takes images; the data give {words(spec.given)}",
            hint="take a model for such data" + (", such as bmctl:encoder" if takes_text(spec) else ""),
        )
    sizes = [size for size in shape[1:] if isinstance(size, int)]
    if len(sizes) < 3:
        raise RecipeError(f"model.name: {spec.name} takes images of one size; the data give {words(spec.given)}")
    return sizes[0], (sizes[1], sizes[2])


def num_inputs(spec: ModelSpec) -> int:
    """How many numbers a sample is, of a model to which an image is as good as a vector.

    Raises:
        RecipeError: It is given neither, or images of any size.
    """
    shape = spec.given[0].shape
    if len(spec.given) == 1 and spec.given[0].dtype == "float32" and len(shape) == 2 and isinstance(shape[1], int):
        return shape[1]
    channels, (height, width) = image_of(spec)
    return channels * height * width


def check_text(spec: ModelSpec) -> None:
    """Refuse inputs that are no token ids with their mask.

    Raises:
        RecipeError: It is given something else.
    """
    if not takes_text(spec):
        raise RecipeError(
            f"model.name: {spec.name} takes texts; the data give {words(spec.given)}", hint="take a model for such data"
        )


def is_causal(spec: ModelSpec) -> bool:
    """Whether it is to give logits of the next token, at every place."""
    return spec.told.get("head") == "causal"


def check_causal(spec: ModelSpec) -> None:
    """Refuse tasks that want anything but logits of the next token.

    Raises:
        RecipeError: This one does.
    """
    if not is_causal(spec):
        raise RecipeError(
            f"model.name: {spec.name} is a language model, and this task needs another",
            hint="set task.kind to lm, or take a model for the task, such as bmctl:encoder",
        )


def told_of(spec: ModelSpec, name: str) -> int:
    """A whole number that data or task tell the model, such as ``num_classes``.

    Raises:
        RecipeError: They tell no such thing.
    """
    value = spec.told.get(name)
    if type(value) is not int or value < 0:
        raise RecipeError(
            f"model.name: {spec.name} must be told {name}, and this task tells {sorted(spec.told) or 'nothing'}",
            hint="take a model for such a task",
        )
    return value


def words(given: Sequence[TensorSpec]) -> str:
    """What a model is given, as messages say it: ``input float32 [batch, 1, 28, 28]``."""
    return " and ".join(f"{each.name} {each.dtype} [{', '.join(map(str, each.shape))}]" for each in given)


def check_fits(spec: ModelSpec, *, reserved: Collection[str]) -> None:
    """Refuse arguments that bmctl sets itself.

    Raises:
        RecipeError: One of `reserved` is among the spec's arguments.
    """
    taken = sorted(set(spec.args) & set(reserved))
    if taken:
        raise RecipeError(
            f"model.args.{taken[0]}: bmctl sets this itself, from the data",
            hint=f"remove {taken[0]} from model.args",
        )


def unknown_argument(name: str, argument: str, *, known: Iterable[str]) -> RecipeError:
    """What to say to a key of `model.args` that the model does not have."""
    import difflib

    names = sorted(known)
    close = difflib.get_close_matches(argument, names, n=1)
    return RecipeError(
        f"model.args.{argument}: {name} takes no such argument",
        hint=f"did you mean {close[0]}?" if close else f"take one of {', '.join(names)}",
    )


def construct(make: Callable[[], T], *, spec: ModelSpec) -> T:
    """Call a constructor with a recipe's arguments.

    Raises:
        RecipeError: It does not take them.
    """
    try:
        return make()
    except (TypeError, ValueError, ArithmeticError, AssertionError, RuntimeError, AttributeError, LookupError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        args = f" with {dict(spec.args)}" if spec.args else ""
        raise RecipeError(
            f"model: {spec.name} cannot be built for {words(spec.given)}{args} ({reason})",
            hint="check model.args and data.input against the model's documentation",
        ) from error
