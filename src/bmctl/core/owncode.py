"""A user's own .py in the place of a plug-in: it runs only where it is trusted, and goes along with what it made.

A recipe says ``{kind: file, path: my_task.py, args: {...}}``. What is saved says ``file:my_task.py@SHA256`` instead,
and the file lies in `code/` beside it: whatever that name stands for is this code, byte for byte, or nothing.
"""

from __future__ import annotations

import hashlib
import re
import sys
import traceback
from collections.abc import Collection
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple, cast

from pydantic import (
    Field,
    ModelWrapValidatorHandler,
    SerializerFunctionWrapHandler,
    create_model,
    model_serializer,
    model_validator,
)

from bmctl.errors import PackageError, RecipeError
from bmctl.schema import Strict

FOLDER = "code"
MAX_BYTES = 1 << 20
_NAME = re.compile(r"file:([A-Za-z0-9_][A-Za-z0-9_.\-]{0,99}\.py)@([0-9a-f]{64})")


class OwnCode(Strict):
    """A file in the place of a plug-in.

    Attributes:
        path: Beside the recipe that names it.
        args: For the Config that the file defines.
    """

    kind: Literal["file"] = "file"
    path: str
    args: dict[str, Any] = Field(default_factory=dict)


class _Loaded(NamedTuple):
    module: ModuleType
    content: bytes


_loaded: dict[str, _Loaded] = {}
_is_trusted = False


def trust(wanted: bool) -> None:
    """Whether files that recipes and packages name may run in this process."""
    global _is_trusted
    _is_trusted = wanted


def is_own(name: object) -> bool:
    """Whether it is the name of such code, as it is saved."""
    return isinstance(name, str) and _NAME.match(name) is not None


def module_of(name: str) -> ModuleType:
    """What was loaded under a name; of a model's, the part before its class.

    Raises:
        KeyError: Nothing was.
    """
    found = _NAME.match(name)
    return _loaded[found[0] if found else name].module


def load(path: Path, *, asked_by: str = "") -> str:
    """Run a file and return the name that it goes by from now on.

    Args:
        asked_by: Who names it, for messages.

    Raises:
        PackageError: Nobody said that it is to be trusted.
        RecipeError: It is not there, or it fails while it is run.
    """
    content = _read(path)
    if re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,99}\.py", path.name) is None:
        raise RecipeError(f"{path}: expected a file NAME.py, of letters, digits, _, - and .", hint="rename it")
    name = f"file:{path.name}@{hashlib.sha256(content).hexdigest()}"
    if name not in _loaded:
        if not _is_trusted:
            raise PackageError(
                f"{asked_by or 'the recipe'} names {path}, code that would run with all your rights",
                hint="read it, and if you trust it add --trust-code",
            )
        _loaded[name] = _Loaded(_run(content, path, name), content)
    return name


def open_beside(text: str, folder: Path) -> None:
    """Load all code that a saved recipe or manifest names, from the folder `code` beside it.

    Args:
        text: What the file holds.
        folder: Where it lies.

    Raises:
        PackageError: Nobody said that it is to be trusted; it is gone, or another than it was.
        RecipeError: It fails while it is run.
    """
    for name in names_in(text):
        if name in _loaded:
            continue
        path = folder / FOLDER / _file(name)
        if not path.is_file():
            raise PackageError(f"{path} is gone: {folder} was made with it", hint="restore it, or make it again")
        if hashlib.sha256(path.read_bytes()).hexdigest() != name.rpartition("@")[2]:
            raise PackageError(f"{path} is not the code that {folder} was made with", hint="restore it")
        if not _is_trusted:
            raise PackageError(
                f"{folder} needs {path}, code that would run with all your rights",
                hint="read it, and if you trust it add --trust-code",
            )
        content = path.read_bytes()
        _loaded[name] = _Loaded(_run(content, path, name), content)


def keep(text: str, folder: Path) -> None:
    """Write all code that a recipe or manifest names into the folder `code` beside it."""
    for name in names_in(text):
        (folder / FOLDER).mkdir(exist_ok=True)
        (folder / FOLDER / _file(name)).write_bytes(_loaded[name].content)


def names_in(text: str) -> list[str]:
    """Names of code in what a saved file holds, each once."""
    return list(dict.fromkeys(found[0] for found in _NAME.finditer(text)))


def _file(name: str) -> str:
    """``3f786850e387-my_task.py``: two files of one name do not meet."""
    found = _NAME.match(name)
    assert found is not None
    return f"{found[2][:12]}-{found[1]}"


def _read(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RecipeError(
            f"there is no file {path}" if isinstance(error, FileNotFoundError) else f"{path}: {error.strerror}",
            hint="the path of your own code is relative to the recipe that names it",
        ) from error
    if len(content) > MAX_BYTES:
        raise RecipeError(f"{path} has {len(content):,} bytes, more than {MAX_BYTES:,}", hint="is it the right file?")
    return content


def _run(content: bytes, path: Path, name: str) -> ModuleType:
    """The file's own code, not what may lie at its path by then."""
    module = ModuleType(f"bmctl_own_{name.rpartition('@')[2][:12]}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # dataclasses and pickles look their modules up
    try:
        exec(compile(content, str(path), "exec"), module.__dict__)
    except Exception as error:
        del sys.modules[module.__name__]
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        where = f"{path}, line {line}" if line else str(path)
        raise RecipeError(f"{where}: {type(error).__name__}: {error}", hint="mend the file") from error
    return module


# -- as a plug-in -----------------------------------------------------------------------------------


def fit(module: ModuleType, *, needs: Collection[str], base: ModuleType | None, what: str) -> None:
    """Complete a module with what another plug-in has, and refuse one that lacks something then.

    Args:
        needs: Names that such a plug-in has.
        base: The plug-in that the module names as its BASE.
        what: Such as ``tasks``, for messages.

    Raises:
        RecipeError: Something is missing, or Config is none.
    """
    for name, value in vars(base).items() if base is not None else ():
        if not name.startswith("__") and not hasattr(module, name):
            setattr(module, name, value)
    missing = sorted(name for name in needs if not hasattr(module, name))
    if missing:
        raise RecipeError(
            f"{module.__file__}: it lacks {', '.join(missing)}, which {what} have",
            hint='write them, or take those of another: BASE = "NAME"; see docs/own-code.md',
        )
    if not (isinstance(module.Config, type) and issubclass(module.Config, Strict)):
        raise RecipeError(f"{module.__file__}: Config is no class of bmctl.schema.Strict", hint="see docs/own-code.md")


def named(model: type[Strict], *, key: str, name: str, outside: Collection[str] = ()) -> type[Strict]:
    """A model as a section of a recipe: ``{KEY: NAME, args: {...}}`` in place of fields side by side.

    Args:
        key: The field that says what it is.
        name: What it says.
        outside: Fields that stand beside `args`.
    """

    class Own(model):  # type: ignore[misc, valid-type]
        @model_validator(mode="wrap")
        @classmethod
        def lift(cls, values: Any, handler: ModelWrapValidatorHandler[Any]) -> Any:
            if isinstance(values, dict) and isinstance(values.get("args", {}), dict):
                values = {**{at: value for at, value in values.items() if at != "args"}, **values.get("args", {})}
            return handler(values)

        @model_serializer(mode="wrap")
        def nest(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
            fields = handler(self)
            beside = {at: fields.pop(at) for at in (key, *outside) if at in fields}
            return {**beside, "args": fields}

    fields: dict[str, Any] = {key: (Literal[name], name)}
    return cast("type[Strict]", create_model(model.__name__, __base__=Own, **fields))
