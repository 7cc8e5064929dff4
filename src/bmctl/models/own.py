"""``bmctl:NAME``: the small networks of models/networks.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bmctl.errors import RecipeError
from bmctl.models.spec import Drops, InputDefaults, ModelConfig, ModelSpec, bare_name

if TYPE_CHECKING:
    from torch import nn

MIN_SIZE = 8
_ARGS = {"rescnn": {"width", "dropout", "stochastic_depth"}, "mlp": {"hidden", "dropout"}}


def names() -> list[str]:
    """Every name that may follow ``bmctl:``."""
    return sorted(_ARGS)


def input_defaults(config: ModelConfig) -> InputDefaults:
    """Anything goes: size, channels and normalisation are the data's."""
    return InputDefaults()


def drop_arguments(config: ModelConfig) -> Drops:
    """Their own names; an MLP has no branches to leave out."""
    name = bare_name(config.name)
    return Drops(dropout="dropout", stochastic_depth="stochastic_depth" if name == "rescnn" else None)


def build(spec: ModelSpec, *, pretrained: bool = False) -> nn.Module:
    """A module from float32 [N, channels, H, W] to logits [N, num_classes].

    Raises:
        RecipeError: An argument that the model does not take or of the wrong kind; `pretrained`; tiny images.
    """
    from bmctl.models.networks import MLP, ResCNN

    name = bare_name(spec.name)
    if pretrained:
        raise RecipeError(
            f"model.pretrained: there are no published weights of {spec.name}",
            hint="set model.pretrained to false, or take a torchvision: or timm: model",
        )
    unknown = sorted(set(spec.args) - _ARGS[name])
    if unknown:
        raise RecipeError(f"model.args: {spec.name} takes {sorted(_ARGS[name])}, not {unknown}")
    if name == "mlp":
        hidden = spec.args.get("hidden", (512, 256))
        hidden = (hidden,) if type(hidden) is int else hidden
        if not isinstance(hidden, tuple) or min(hidden, default=1) < 1:
            raise RecipeError(f"model.args.hidden: {hidden!r}, expected positive whole numbers such as [512, 256]")
        num_inputs = spec.channels * spec.size[0] * spec.size[1]
        dropout = _probability(spec, "dropout")
        return MLP(num_inputs=num_inputs, num_classes=spec.num_classes, hidden=hidden, dropout=dropout)
    width = spec.args.get("width", 32)
    if type(width) is not int or width < 1:
        raise RecipeError(f"model.args.width: {width!r}, expected a positive whole number such as 32")
    if min(spec.size) < MIN_SIZE:
        raise RecipeError(f"{spec.name} takes images of at least {MIN_SIZE}x{MIN_SIZE} pixels, got {tuple(spec.size)}")
    return ResCNN(
        num_classes=spec.num_classes,
        channels=spec.channels,
        width=width,
        dropout=_probability(spec, "dropout"),
        stochastic_depth=_probability(spec, "stochastic_depth"),
    )


def _probability(spec: ModelSpec, name: str) -> float:
    value = spec.args.get(name, 0.0)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise RecipeError(f"model.args.{name}: {value!r}, expected a probability from 0 to below 1, such as 0.1")
    return float(value)
