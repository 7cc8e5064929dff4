"""``bmctl:NAME``: the small networks of models/networks.py. A new one is a Config and a line in NETWORKS."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from pydantic import Field, ValidationError

from bmctl.core.published import Published
from bmctl.errors import RecipeError
from bmctl.models.spec import (
    Drops,
    ModelConfig,
    ModelSpec,
    Probability,
    bare_name,
    check_text,
    image_of,
    no_drop,
    told_of,
    unknown_argument,
)
from bmctl.schema import Many, Strict

if TYPE_CHECKING:
    from torch import nn

MIN_SIZE = 8
Width = Annotated[int, Field(ge=1, le=16384)]
Widths = Annotated[Many[Width], Field(max_length=64)]


class ResCNN(Strict):
    """Attributes:
    width: Channels of the first of three residual blocks; the others have twice and four times as many.
    """

    width: Width = 32
    dropout: Probability = 0.0
    stochastic_depth: Probability = 0.0


class MLP(Strict):
    """Attributes:
    hidden: Width of each hidden layer.
    """

    hidden: Widths | Width = (512, 256)
    dropout: Probability = 0.0


class Encoder(Strict):
    """Attributes:
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


class Network(NamedTuple):
    """What `model.args` may be, and how the network is made of it."""

    Config: type[Strict]
    make: Callable[[ModelSpec, Any], nn.Module]


def _rescnn(spec: ModelSpec, config: ResCNN) -> nn.Module:
    from bmctl.models import networks

    channels, size = image_of(spec)
    if min(size) < MIN_SIZE:
        raise RecipeError(f"{spec.name} takes images of at least {MIN_SIZE}x{MIN_SIZE} pixels, got {size}")
    return networks.ResCNN(
        num_classes=told_of(spec, "num_classes"),
        channels=channels,
        width=config.width,
        dropout=config.dropout,
        stochastic_depth=config.stochastic_depth,
    )


def _mlp(spec: ModelSpec, config: MLP) -> nn.Module:
    from bmctl.models import networks

    channels, (height, width) = image_of(spec)
    hidden = (config.hidden,) if isinstance(config.hidden, int) else config.hidden
    num_classes = told_of(spec, "num_classes")
    return networks.MLP(
        num_inputs=channels * height * width, num_classes=num_classes, hidden=hidden, dropout=config.dropout
    )


def _encoder(spec: ModelSpec, config: Encoder) -> nn.Module:
    from bmctl.models import networks

    check_text(spec)
    if config.width % config.heads:
        raise RecipeError(
            f"model.args.width: {config.width} is no multiple of heads, {config.heads}",
            hint=f"--set model.args.width={config.heads * max(1, config.width // config.heads)}",
        )
    return networks.Encoder(
        num_classes=told_of(spec, "num_classes"),
        vocab_size=told_of(spec, "vocab_size"),
        max_tokens=told_of(spec, "max_tokens"),
        width=config.width,
        depth=config.depth,
        heads=config.heads,
        hidden=config.hidden or 4 * config.width,
        dropout=config.dropout,
        stochastic_depth=config.stochastic_depth,
    )


NETWORKS: Mapping[str, Network] = MappingProxyType(
    {"rescnn": Network(ResCNN, _rescnn), "mlp": Network(MLP, _mlp), "encoder": Network(Encoder, _encoder)}
)


def names() -> list[str]:
    """Every name that may follow ``bmctl:``."""
    return sorted(NETWORKS)


def published(config: ModelConfig) -> Published:
    """Anything goes: size, channels and normalisation are the data's."""
    return Published()


def drop_arguments(config: ModelConfig) -> Drops:
    """Their own names; an MLP has no branches to leave out."""
    fields = NETWORKS[bare_name(config.name)].Config.model_fields
    return Drops(**{name: name for name in Drops.model_fields if name in fields})


def build(spec: ModelSpec, *, pretrained: bool = False) -> nn.Module:
    """A module from `spec.given` to logits [N, num_classes].

    Raises:
        RecipeError: An argument that the model does not take or of the wrong kind; `pretrained`; tiny images; inputs
            of another kind.
    """
    network = NETWORKS[bare_name(spec.name)]
    if pretrained:
        raise RecipeError(
            f"model.pretrained: there are no published weights of {spec.name}",
            hint="set model.pretrained to false, or take a torchvision: or timm: model",
        )
    known = network.Config.model_fields
    for name in sorted(set(spec.args) - set(known)):
        if name in Drops.model_fields:
            raise no_drop(spec.name, name)
        raise unknown_argument(spec.name, name, known=known)
    try:
        config = network.Config.model_validate(dict(spec.args))
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        raise RecipeError(
            f"model.args.{name}: {spec.args[name]!r}: {first['msg']}", hint=f"--set model.args.{name}=VALUE"
        ) from error
    return network.make(spec, config)
