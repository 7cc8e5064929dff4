"""Tables of plug-ins."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Annotated, Any, Union

from pydantic import BaseModel, Field, SerializeAsAny, ValidationError, ValidatorFunctionWrapHandler, WrapValidator
from pydantic_core import PydanticCustomError

from bmctl.core import owncode
from bmctl.errors import RecipeError


@dataclass(frozen=True)
class Room:
    """A folder of plug-ins, and what a user's own file has to be in the place of one.

    Attributes:
        package: Of the folder.
        needs: The Protocol of its plug-ins.
        key: The field of a Config that names the plug-in.
        outside: Fields of a Config that do not stand among a user's `args`.
        models: Names of its classes that are sections of a recipe or a manifest.
        adapt: What else is to be done to a user's own, with its name.
    """

    package: str
    needs: type | None = None
    key: str = "kind"
    outside: Collection[str] = ()
    models: Collection[str] = ("Config",)
    adapt: Callable[[ModuleType, str], None] | None = None


class Table(Mapping[str, ModuleType]):
    """Plug-ins by name. Iterating gives those of the folder; a user's own are found by the names that they go by."""

    def __init__(self, room: Room, modules: Mapping[str, ModuleType]) -> None:
        self._room, self._modules, self._own = room, dict(modules), dict[str, ModuleType]()

    def __getitem__(self, name: str) -> ModuleType:
        if name in self._modules or not owncode.is_own(name):
            return self._modules[name]
        if name not in self._own:
            self._own[name] = self._fitted(name)
        return self._own[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    def _fitted(self, name: str) -> ModuleType:
        room, module = self._room, owncode.module_of(name)
        base, what = getattr(module, "BASE", None), room.package.rpartition(".")[2]
        if base is not None and base not in self._modules:
            raise RecipeError(
                f"{module.__file__}: BASE is {base!r}, and there is no such one among {what}",
                hint=f"one of {', '.join(self._modules)}",
            )
        owncode.fit(
            module, needs=members(room.needs), base=self._modules[base] if base is not None else None, what=what
        )
        for model in room.models:
            shaped = owncode.named(getattr(module, model), key=room.key, name=name, outside=room.outside)
            setattr(module, model, shaped)
        if room.adapt is not None:
            room.adapt(module, name)
        return module


def plugins(room: Room, *names: str) -> Table:
    """Files and folders of a room by their names, in this order: a new one is one line more where this is called."""
    return Table(room, {name: import_module(f"{room.package}.{name}") for name in names})


def section(table: Table, *, model: str = "Config", key: str = "kind", own: type | None = None) -> Any:
    """What a recipe or a manifest may hold where a plug-in of a table is named: its model, or that of a user's own.

    Args:
        model: Name of the class in each plug-in.
        own: How a recipe names a file, which is read before anything is checked.
    """
    known = (*(getattr(module, model) for module in table.values()), *((own,) if own else ()))

    def of_own(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        name = value.get(key) if isinstance(value, Mapping) else getattr(value, key, None)
        if not owncode.is_own(name):
            found = handler(value)
            if own is not None and isinstance(found, own):
                raise ValueError("the file was not read")
            return found
        if isinstance(value, BaseModel):
            return value
        try:
            return getattr(table[str(name)], model).model_validate(value)
        except ValidationError as error:
            raise _placed(error, name=str(name)) from error

    union: Any = Annotated[Union[known], Field(discriminator=key), SerializeAsAny()]
    return Annotated[union, WrapValidator(of_own)]


def _placed(error: ValidationError, *, name: str) -> ValidationError:
    """With the places that the fields have among `args`, under the plug-in's name as in any union."""
    lines: list[Any] = []
    for one in error.errors(include_url=False):
        kind = (
            one["type"]
            if one["type"] not in ("value_error", "assertion_error")
            else PydanticCustomError("own", "{said}", {"said": one["msg"]})
        )
        lines.append(
            {"type": kind, "loc": (name, "args", *one["loc"]), "input": one["input"], "ctx": one.get("ctx", {})}
        )
    return ValidationError.from_exception_data(error.title, lines)


def members(protocol: type | None) -> frozenset[str]:
    """Names that a Protocol asks for, those that it inherits among them."""
    found: set[str] = set()
    for one in protocol.__mro__ if protocol is not None else ():
        if one.__module__.startswith("bmctl."):
            found |= {name for name in (*vars(one), *inspect.get_annotations(one)) if not name.startswith("_")}
    return frozenset(found)
