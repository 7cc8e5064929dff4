"""Tables of plug-ins."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from importlib import import_module
from types import ModuleType
from typing import Annotated, Any, Union

from pydantic import BaseModel, Field, SerializeAsAny, ValidationError, ValidatorFunctionWrapHandler, WrapValidator
from pydantic_core import PydanticCustomError

from bmctl.core import owncode
from bmctl.errors import RecipeError


class Table(Mapping[str, ModuleType]):
    """Plug-ins by name. Iterating gives those of the folder; a user's own are found by the names that they go by.

    Args:
        modules: Files and folders of the package.
        needs: Names that each of them has.
        key: The field of a Config that names the plug-in.
        outside: Fields of a Config that do not stand among a user's `args`.
        models: Names of its classes that are sections of a recipe or a manifest.
        adapt: What else is to be done to a user's own, with its name.
    """

    def __init__(
        self,
        modules: Mapping[str, ModuleType],
        *,
        needs: Collection[str] = (),
        key: str = "kind",
        outside: Collection[str] = (),
        models: Collection[str] = ("Config",),
        adapt: Callable[[ModuleType, str], None] | None = None,
    ) -> None:
        self._modules, self._own = dict(modules), dict[str, ModuleType]()
        self._needs, self._key, self._outside, self._models, self._adapt = needs, key, outside, models, adapt

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
        module = owncode.module_of(name)
        base = getattr(module, "BASE", None)
        what = next(iter(self._modules.values())).__name__.split(".")[1]
        if base is not None and base not in self._modules:
            raise RecipeError(
                f"{module.__file__}: BASE is {base!r}, and there is no such one among {what}",
                hint=f"one of {', '.join(self._modules)}",
            )
        owncode.fit(module, needs=self._needs, base=self._modules[base] if base is not None else None, what=what)
        for model in self._models:
            shaped = owncode.named(getattr(module, model), key=self._key, name=name, outside=self._outside)
            setattr(module, model, shaped)
        if self._adapt is not None:
            self._adapt(module, name)
        return module


def plugins(
    package: str,
    *names: str,
    needs: type | None = None,
    key: str = "kind",
    outside: Collection[str] = (),
    models: Collection[str] = ("Config",),
    adapt: Callable[[ModuleType, str], None] | None = None,
) -> Table:
    """Files and folders of a package by their names, in this order: a new one is one line more where this is called.

    Args:
        needs: The Protocol of such a plug-in.
    """
    found = {name: import_module(f"{package}.{name}") for name in names}
    return Table(found, needs=members(needs), key=key, outside=outside, models=models, adapt=adapt)


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
