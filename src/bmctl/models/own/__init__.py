"""``bmctl:NAME``: small networks of our own.

A new one is a class in a file of this folder, its arguments here, which build it for a spec, and a line in NETWORKS.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError

from bmctl.core.published import Published
from bmctl.errors import RecipeError
from bmctl.models.spec import (
    Drops,
    ModelConfig,
    ModelSpec,
    Probability,
    bare_name,
    check_causal,
    check_text,
    image_of,
    num_inputs,
    told_of,
    words,
)
from bmctl.schema import Many, Strict

if TYPE_CHECKING:
    from torch import nn

Width = Annotated[int, Field(ge=1, le=65536)]
Widths = Annotated[Many[Width], BeforeValidator(lambda value: (value,) if type(value) is int else value)]


class ResCNN(Strict):
    """Attributes:
    width: Channels of the first block; the others have twice and four times as many.
    """

    width: Width = 32
    dropout: Probability = 0.0
    stochastic_depth: Probability = 0.0

    def build(self, spec: ModelSpec) -> nn.Module:
        """Raises:
        RecipeError: Images that two halvings leave nothing of.
        """
        from bmctl.models.own import networks

        channels, size = image_of(spec)
        if min(size) < networks.ResCNN.MIN_SIZE:
            raise RecipeError(
                f"{spec.name} takes images of at least {networks.ResCNN.MIN_SIZE}x{networks.ResCNN.MIN_SIZE} pixels, "
                f"got {size}"
            )
        return networks.ResCNN(num_classes=told_of(spec, "num_classes"), channels=channels, **self.model_dump())


class MLP(Strict):
    """Attributes:
    hidden: Width of each hidden layer; one number is one layer.
    """

    hidden: Widths = (512, 256)
    dropout: Probability = 0.0

    def build(self, spec: ModelSpec) -> nn.Module:
        from bmctl.models.own import networks

        num_classes = told_of(spec, "num_classes")
        return networks.MLP(num_inputs=num_inputs(spec), num_classes=num_classes, **self.model_dump())


class Tabular(Strict):
    """Rows of a table: linear layers over numbers and embedded categories.

    Attributes:
        hidden: Width of each hidden layer; one number is one layer.
        embedding: Numbers that a category becomes.
    """

    hidden: Widths = (128, 64)
    embedding: Annotated[int, Field(ge=1, le=4096)] = 8
    dropout: Probability = 0.0

    def build(self, spec: ModelSpec) -> nn.Module:
        """Raises:
        RecipeError: An input that is no row of a table.
        """
        from bmctl.models.own import tables

        return tables.Tabular(**_of_rows(spec), **self.model_dump())


class Factors(Strict):
    """Rows with categories, such as users and items: a factorisation machine, with hidden layers beside it on request.

    Attributes:
        embedding: Numbers that a category becomes.
        hidden: Width of each hidden layer; none is plain matrix factorisation.
    """

    embedding: Annotated[int, Field(ge=1, le=4096)] = 16
    hidden: Widths = ()
    dropout: Probability = 0.0

    def build(self, spec: ModelSpec) -> nn.Module:
        """Raises:
        RecipeError: An input that is no row of a table, or that has no categories.
        """
        from bmctl.models.own import tables

        rows = _of_rows(spec)
        if not rows["category_sizes"]:
            raise RecipeError(
                f"model.name: {spec.name} multiplies categories, and the data have none",
                hint="name columns that are ids: data.source.categories, or take bmctl:tabular",
            )
        return tables.Factors(**rows, **self.model_dump())


def _of_rows(spec: ModelSpec) -> dict[str, Any]:
    """Columns of numbers, sizes of categories, and classes."""
    sizes = spec.told.get("category_sizes")
    if not isinstance(sizes, tuple):
        raise RecipeError(
            f"model.name: {spec.name} takes rows of a table; the data give {words(spec.given)}",
            hint="take a model for such data",
        )
    widths = [one.shape[1] for one in spec.given if one.dtype == "float32"]
    return {
        "num_numbers": sum(width for width in widths if isinstance(width, int)),
        "category_sizes": sizes,
        "num_classes": told_of(spec, "num_classes"),
    }


class Duelling(Strict):
    """An MLP for Q-learning, which says apart what a state is worth and what each action adds.

    Attributes:
        hidden: Width of each hidden layer; one number is one layer.
    """

    hidden: Widths = (256, 256)

    def build(self, spec: ModelSpec) -> nn.Module:
        from bmctl.models.own import networks

        num_actions = told_of(spec, "num_classes")
        return networks.Duelling(num_inputs=num_inputs(spec), num_actions=num_actions, **self.model_dump())


class Encoder(Strict):
    """A small transformer encoder over texts.

    Attributes:
        width: Of the embeddings and of each layer; a multiple of `heads`.
        depth: Number of layers.
        hidden: Width inside the feed-forward half of a layer; None for four times `width`.
    """

    width: Width = 128
    depth: Annotated[int, Field(ge=1, le=96)] = 4
    heads: Annotated[int, Field(ge=1, le=128)] = 4
    hidden: Width | None = None
    dropout: Probability = 0.0
    stochastic_depth: Probability = 0.0

    def build(self, spec: ModelSpec) -> nn.Module:
        """Raises:
        RecipeError: A width that the heads cannot share, or an input that is no text.
        """
        from bmctl.models.own import networks

        check_text(spec)
        if self.width % self.heads:
            raise RecipeError(
                f"model.args.width: {self.width} is no multiple of heads, {self.heads}",
                hint=f"--set model.args.width={self.heads * max(1, self.width // self.heads)}",
            )
        told = {name: told_of(spec, name) for name in ("num_classes", "vocab_size", "max_tokens")}
        return networks.Encoder(**told, **{**self.model_dump(), "hidden": self.hidden or 4 * self.width})


class Decoder(Strict):
    """A small causal language model.

    Attributes:
        width: Of the embeddings and of each layer; a multiple of `heads`.
        depth: Number of layers.
        kv_heads: Heads of keys and values, of which `heads` is a multiple; None for as many.
        hidden: Width inside the gated feed-forward half of a layer; None for 8/3 of `width`, up to a multiple of 16.
        positions: How it knows where a token stands.
        tied: The table of the embeddings makes the logits as well.
    """

    width: Width = 256
    depth: Annotated[int, Field(ge=1, le=96)] = 4
    heads: Annotated[int, Field(ge=1, le=128)] = 4
    kv_heads: Annotated[int, Field(ge=1, le=128)] | None = None
    hidden: Width | None = None
    positions: Literal["rotary", "learned", "sinusoidal"] = "rotary"
    norm: Literal["rms", "layer"] = "rms"
    tied: bool = True
    dropout: Probability = 0.0

    def build(self, spec: ModelSpec) -> nn.Module:
        """Raises:
        RecipeError: Heads that do not share width or keys and values evenly, or an input or a task of another kind.
        """
        from bmctl.models.own import decoder

        check_text(spec)
        check_causal(spec)
        even = 2 * self.heads
        if self.width % even:
            raise RecipeError(
                f"model.args.width: {self.width} does not give each of {self.heads} heads an even number",
                hint=f"--set model.args.width={even * max(1, self.width // even)}",
            )
        kv_heads = self.kv_heads or self.heads
        if self.heads % kv_heads:
            raise RecipeError(
                f"model.args.kv_heads: heads, {self.heads}, is no multiple of {kv_heads}",
                hint="leave it out, or take 1",
            )
        args: dict[str, Any] = {name: told_of(spec, name) for name in ("vocab_size", "max_tokens")}
        hidden = self.hidden or -(-8 * self.width // 48) * 16
        return decoder.Decoder(**{**args, **self.model_dump(), "kv_heads": kv_heads, "hidden": hidden})


NETWORKS: Mapping[str, type[Strict]] = MappingProxyType(
    {
        "rescnn": ResCNN,
        "mlp": MLP,
        "duelling": Duelling,
        "tabular": Tabular,
        "factors": Factors,
        "encoder": Encoder,
        "decoder": Decoder,
    }
)


def names() -> list[str]:
    """Every name that may follow ``bmctl:``."""
    return sorted(NETWORKS)


def published(config: ModelConfig) -> Published:
    """Anything goes: size, channels and normalisation are the data's."""
    return Published()


def drop_arguments(config: ModelConfig) -> Drops:
    """Their own names, of those that have them: an MLP has no branches to leave out."""
    known = NETWORKS[bare_name(config.name)].model_fields
    return Drops(**{field: field for field in Drops.model_fields if field in known})


def problems(name: str, args: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """What is wrong with a network's arguments: for each its key, a message and a hint.

    Args:
        name: With its prefix, of a network that there is.
        args: Plain data, as a recipe has them.
    """
    network = NETWORKS[bare_name(name)]
    try:
        network.model_validate(args)
    except ValidationError as error:
        found: dict[str, tuple[str, str, str]] = {}
        for one in error.errors(include_url=False):
            key = str(one["loc"][0])
            if one["type"] == "extra_forbidden":
                close = difflib.get_close_matches(key[:100], network.model_fields, n=1)
                hint = f"did you mean {close[0]}?" if close else f"{name} takes {', '.join(network.model_fields)}"
                found.setdefault(key, (key, f"{name} takes no such argument", hint))
            else:
                wanted = one["msg"].removeprefix("Input should be ")
                found.setdefault(key, (key, f"must be {wanted}, got {one['input']!r:.60}", ""))
        return list(found.values())
    return []


def build(spec: ModelSpec, *, pretrained: bool = False) -> nn.Module:
    """A module from `spec.given` to logits, of the classes or of the next token.

    Raises:
        RecipeError: An argument that the model does not take or out of its bounds; `pretrained`; tiny images.
    """
    if pretrained:
        raise RecipeError(
            f"model.pretrained: there are no published weights of {spec.name}",
            hint="set model.pretrained to false, or take a torchvision: or timm: model",
        )
    for key, message, hint in problems(spec.name, spec.args):
        raise RecipeError(f"model.args.{key}: {message}", hint=hint)
    args: Any = NETWORKS[bare_name(spec.name)].model_validate(spec.args)
    model: nn.Module = args.build(spec)
    return model
