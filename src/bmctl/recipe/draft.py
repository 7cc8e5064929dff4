"""A recipe before it is checked: plain data, where each key stands, and how layers are laid on each other."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bmctl.core import owncode
from bmctl.errors import Problem, RecipeError
from bmctl.recipe.diagnosis import dotted, nearest_place
from bmctl.recipe.shape import SHORTHAND
from bmctl.recipe.yamlio import MAX_DEPTH, KeyPath, parse_yaml
from bmctl.schema import VARIABLE, resolve_env

OWN: Mapping[KeyPath, str] = {
    ("task",): "kind",
    ("data", "source"): "kind",
    ("data", "input"): "kind",
    ("compress", "*"): "method",
}
"""Where a file may stand in the place of a plug-in, and the key that says so."""


@dataclass
class Draft:
    """A recipe on its way.

    Attributes:
        places: Key path to ``file:line:col`` or ``--set a.b=v``.
        problems: All that was found so far.
        num_files: Files read for it.
    """

    data: dict[str, Any] = field(default_factory=dict)
    places: dict[KeyPath, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    num_files: int = 0


def pattern(path: KeyPath) -> KeyPath:
    """The path with every list index as ``*``, as the tables above have them."""
    return tuple("*" if isinstance(key, int) else key for key in path)


def entries(value: Any) -> list[tuple[str | int, Any]]:
    if isinstance(value, dict):
        return list(value.items())
    return list(enumerate(value)) if isinstance(value, list) else []


def expand(value: Any, places: dict[KeyPath, str], *, kinds: Mapping[KeyPath, str], path: KeyPath = ()) -> None:
    """Write shorthand out, in place; fill in `kinds` where a mapping does not say what it is."""
    for key, item in entries(value):
        inner = (*path, key)
        shape = pattern(inner)
        if shape in SHORTHAND and isinstance(item, str):
            item = value[key] = {SHORTHAND[shape]: item}
            places[*inner, SHORTHAND[shape]] = nearest_place(places, inner)
        if shape in kinds and isinstance(item, dict):
            item.setdefault(SHORTHAND[shape], kinds[shape])
        expand(item, places, kinds=kinds, path=inner)


def read_own_code(draft: Draft, data: Any, places: dict[KeyPath, str], *, base: Path, path: KeyPath = ()) -> None:
    """Load the files that stand in the place of plug-ins, in place: what is saved names them by their contents.

    Args:
        draft: Takes the problems.
        base: Where the paths begin: the folder of the file that names them.
    """
    for key, item in entries(data):
        inner = (*path, key)
        if inner == ("model", "name") and isinstance(item, str) and item.startswith("file:"):
            data[key] = _own_model(draft, item, nearest_place(places, inner), base=base)
        kind = OWN.get(pattern(inner))
        if kind is None or not isinstance(item, dict):
            read_own_code(draft, item, places, base=base, path=inner)
        elif (item.get(kind) == "file" or owncode.is_own(item.get(kind))) and isinstance(item.get("path"), str):
            where = nearest_place(places, (*inner, "path"))
            item[kind] = _own_code(draft, item["path"], where, base=base) or "file"
            if item[kind] != "file":
                del item["path"]
        elif owncode.is_own(item.get(kind)):
            owncode.open_beside(item[kind], base)


def _own_model(draft: Draft, name: str, where: str, *, base: Path) -> str:
    """``file:net.py:Net`` with what net.py holds in it."""
    if owncode.is_own(name):
        owncode.open_beside(name, base)
        return name
    file, colon, made = name.removeprefix("file:").rpartition(":")
    if not colon or not made.isidentifier():
        draft.problems.append(Problem(where, "model.name", f"{name!r} names no class", "such as file:net.py:Net"))
        return name
    found = _own_code(draft, file, where, base=base)
    return f"{found}:{made}" if found else name


def _own_code(draft: Draft, path: str, where: str, *, base: Path) -> str:
    try:
        return owncode.load(base / resolve_env(path), asked_by=where)
    except RecipeError as error:
        draft.problems.append(Problem(where, "", error.message, error.hint))
        return ""


def merge(
    base: dict[str, Any],
    over: Mapping[str, Any],
    *,
    path: KeyPath,
    places: dict[KeyPath, str],
    over_places: Mapping[KeyPath, str],
) -> None:
    """Lay `over` on `base`, in place: mappings merge, all else replaces.

    A mapping that says it is of another kind (``optimizer: {name: sgd}`` on an adamw) replaces as well: the other's
    knobs mean nothing to it.
    """
    for key, value in over.items():
        inner = (*path, key)
        old = base.get(key)
        kind = SHORTHAND.get(inner, "")
        if isinstance(old, dict) and isinstance(value, dict) and value.get(kind, old.get(kind)) == old.get(kind):
            merge(old, value, path=inner, places=places, over_places=over_places)
        else:
            forget(old, places, path=inner)
            base[key] = value
            copy_places(value, inner, source=over_places, to=places)
        places[inner] = over_places[inner]


def forget(value: Any, places: dict[KeyPath, str], *, path: KeyPath) -> None:
    places.pop(path, None)
    for key, item in entries(value):
        forget(item, places, path=(*path, key))


def copy_places(value: Any, path: KeyPath, *, source: Mapping[KeyPath, str], to: dict[KeyPath, str]) -> None:
    to[path] = source[path]
    for key, item in entries(value):
        copy_places(item, (*path, key), source=source, to=to)


def apply_override(draft: Draft, override: str) -> None:
    """Set one value, in place; what cannot be set becomes a problem located at ``--set a.b=v``."""
    key, equals, text = override.partition("=")
    where = f"--set {override if len(override) <= 80 else override[:77] + '...'}"
    where = where if where.isprintable() else ascii(where)[1:-1]
    try:
        if not equals:
            raise Refused("expected KEY=VALUE", "such as --set train.epochs=5")
        document = parse_yaml(text, name=where)
        draft.problems += [Problem(where, key, problem.message, problem.hint) for problem in document.problems]
        set_value(draft, next(csv.reader([key.strip()], delimiter=".")), document.data, where=where)
    except Refused as refused:
        draft.problems.append(Problem(where, dotted((key,)) if equals else "", str(refused), refused.hint))
    except RecipeError as error:
        draft.problems.append(Problem(where, dotted((key,)), error.problems[0].message, error.hint))
    expand(draft.data, draft.places, kinds={})


class Refused(Exception):
    """An override that cannot be set; never leaves this module."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


def set_value(draft: Draft, keys: Sequence[str], value: Any, *, where: str) -> None:
    """Walk down `keys`, making mappings where nothing is, and replace what is there."""
    if not keys or not all(keys):
        raise Refused("an empty key", "such as --set train.epochs=5")
    if keys[0] == "include":
        raise Refused("an include cannot be set from the command line", "put it into a recipe file")
    if len(keys) > MAX_DEPTH:
        raise Refused(f"more than {MAX_DEPTH} keys deep")
    node: Any = draft.data
    path: KeyPath = ()
    for key, following in zip(keys, [*keys[1:], None], strict=True):
        here = item_of(node, key, path=path)
        old = dict(entries(node)).get(here)
        path = (*path, here)
        if following is None:
            forget(old, draft.places, path=path)
            node[here] = value
            draft.places[path] = where
        elif old is None:
            if following.isdecimal():
                raise Refused(
                    f"{dotted(path)} is not given, it has no item {following}", f"set all: {dotted(path)}=[...]"
                )
            node[here] = {}
            draft.places[path] = where
        node = node[here]


def item_of(node: Any, key: str, *, path: KeyPath) -> str | int:
    """The key or index that `key` means in `node`, which stands at `path`."""
    if isinstance(node, list):
        if key.isdecimal() and len(key) < 6 and int(key) < len(node):
            return int(key)
        raise Refused(f"{dotted(path)} has {len(node)} item(s), counted from 0, got {key[:60]!r}")
    if not isinstance(node, dict):
        raise Refused(f"{dotted(path)} is a single value, it has no key {key[:60]!r}")
    return key


def check_variables(draft: Draft, value: Any, *, path: KeyPath) -> None:
    """Refuse variables that are not set, and what only looks like one."""
    for key, item in entries(value):
        inner = (*path, key)
        check_variables(draft, item, path=inner)
        if not isinstance(item, str) or "${" not in item:
            continue
        where = nearest_place(draft.places, inner)
        for name in dict.fromkeys(VARIABLE.findall(item)):
            if name not in os.environ:
                message = f"the environment variable {name} is not set"
                draft.problems.append(Problem(where, dotted(inner), message, f"export {name}=..."))
        if "${" in VARIABLE.sub("", item):
            draft.problems.append(
                Problem(where, dotted(inner), f"{item[:60]!r} is not a variable", "the only form is ${ENV:NAME}")
            )
