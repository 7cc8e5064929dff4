"""``file:net.py:Net``: a user's own nn.Module, from a file that goes along in every package; see core.owncode."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from bmctl.core import owncode
from bmctl.core.published import Published
from bmctl.errors import RecipeError
from bmctl.models.spec import Drops, ModelConfig, ModelSpec, construct, unknown_argument

if TYPE_CHECKING:
    from torch import nn


def names() -> list[str]:
    """None of them is known beforehand."""
    return []


def is_elsewhere(bare: str) -> bool:
    """Whether it names a class of a file that was read."""
    try:
        return callable(_made_by(f"file:{bare}"))
    except (KeyError, AttributeError):
        return False


def published(config: ModelConfig) -> Published:
    """Nothing: its input is what the data make of it."""
    return Published()


def drop_arguments(config: ModelConfig) -> Drops:
    """Arguments of these names, where its constructor has them."""
    known = inspect.signature(_made_by(config.name)).parameters
    return Drops(**{name: name for name in Drops.model_fields if name in known})


def build(spec: ModelSpec, *, pretrained: bool = False) -> nn.Module:
    """What the class makes of `args`, and of what data and task tell, as far as its constructor has such arguments.

    `given` is all that the model is given, as TensorSpecs in order, where it asks for it.

    Raises:
        RecipeError: There is no such class, it does not take the arguments or makes no module; `pretrained`.
    """
    from torch import nn

    if pretrained:
        raise RecipeError(f"model.pretrained: there are no published weights of {spec.name}", hint="set it to false")
    try:
        make = _made_by(spec.name)
    except AttributeError as error:
        raise RecipeError(f"model.name: {error}", hint="name a class of the file: file:net.py:Net") from error
    known = inspect.signature(make).parameters
    takes_any = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in known.values())
    for name in spec.args:
        if name not in known and not takes_any:
            raise unknown_argument(shown(spec.name), name, known=known)
    told: dict[str, Any] = {**spec.told, "given": spec.given}
    args = {**{name: value for name, value in told.items() if name in known}, **spec.args}
    made = construct(lambda: make(**args), spec=spec)
    if not isinstance(made, nn.Module):
        raise RecipeError(f"model.name: {shown(spec.name)} makes a {type(made).__name__}, expected a torch.nn.Module")
    return made


def shown(name: str) -> str:
    """``net.py:Net`` of the name that it goes by."""
    file, _, made = name.removeprefix("file:").rpartition(":")
    return f"{file.partition('@')[0]}:{made}"


def _made_by(name: str) -> Any:
    return getattr(owncode.module_of(name), name.rpartition(":")[2])
