"""From pydantic's errors to problems that say where, what was expected, what was got, and what would mend it."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from bmctl.errors import Problem
from bmctl.models import MODELS, own
from bmctl.recipe import shape
from bmctl.recipe.yamlio import KeyPath, resolve_scalar

EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "path_type": "a path",
    "finite_number": "a finite number",
    "greater_than": "greater than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "too_short": "a list of at least {min_length}",
    "too_long": "a list of at most {max_length}",
    "string_too_short": "text of at least {min_length} characters",
    "string_too_long": "text of at most {max_length} characters",
}
WRONG_TYPE = {name for name in EXPECTED if name.endswith("_type") or name == "int_from_float"}
PATTERNS = {
    ("name",): "letters, digits, '.', '_' and '-', at most 100, beginning with a letter or digit",
    ("compress", "*", "name"): "letters, digits, '_' and '-', at most 40, beginning with a letter or digit",
}


def explain(error: ValidationError, *, data: Any, places: Mapping[KeyPath, str]) -> list[Problem]:
    """Every error of a failed validation of plain data against Recipe, one problem for each wrong value."""
    found: dict[KeyPath, list[dict[str, Any]]] = {}
    for one in error.errors(include_url=False):
        path, union = follow(one["loc"], data, missing=one["type"] == "missing")
        found.setdefault(union or path, []).append({**one, "path": path})
    problems = []
    for group in found.values():
        # A value that fits no member of a union fails once per member: what is wrong inside the fitting one tells more.
        deep = [one for one in group if one["type"] not in WRONG_TYPE or one["path"] != group[0]["path"]]
        if all(one["type"] == "literal_error" for one in deep):
            deep = []  # a word that would do as well: "a whole number or one of auto"
        if len({one["path"] for one in deep or group}) > 1 or len(deep or group) == 1:
            problems += [describe_error(one, data, places) for one in deep or group]
        else:
            alike = deep or group
            problems.append(describe_error(alike[0], data, places, expected=[expectation(one) for one in alike]))
    return problems


def follow(loc: Sequence[str | int], data: Any, *, missing: bool) -> tuple[KeyPath, KeyPath | None]:
    """A pydantic location as a path in the data: tags of unions are not part of it.

    Args:
        missing: The last key is one that is not there.

    Returns:
        The path, and where a union without a discriminator was entered, if one was.
    """
    path: list[str | int] = []
    union: KeyPath | None = None
    node, tagged = data, False
    for i, key in enumerate(loc):
        if not tagged and key in shape.tags(tuple(path), data):
            tagged = True
            continue
        inside = isinstance(node, dict) and key in node
        inside = inside or (isinstance(node, list) and isinstance(key, int) and key < len(node))
        if not inside and not (missing and i == len(loc) - 1):
            union = tuple(path)  # the name of a member, which is no key
            continue
        node = node[key] if inside else None
        path.append(key)
        tagged = False
    return tuple(path), union


def nearest_place(places: Mapping[KeyPath, str], path: KeyPath) -> str:
    """Where `path` stands, or what it would be part of."""
    while path and path not in places:
        path = path[:-1]
    return places.get(path, "recipe")


# -- one error --------------------------------------------------------------------------------------


def describe_error(
    error: Mapping[str, Any], data: Any, places: Mapping[KeyPath, str], *, expected: Sequence[str] = ()
) -> Problem:
    path: KeyPath = error["path"]
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    where = nearest_place(places, path)
    if kind == "extra_forbidden":
        return Problem(where, dotted(path), "unknown key", unknown_key_hint(path, data))
    if kind == "missing":
        return Problem(where, dotted(path), "is missing, and has no default", f"add `{path[-1]}: ...`")
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        key = context["discriminator"].strip("'")
        choices = shape.tags(path, data)
        if kind == "union_tag_not_found":
            message = f"does not say its {key}, one of {', '.join(choices)}"
            return Problem(where, dotted(path), message, f"add `{key}: {choices[0]}`")
        tag, path = str(context["tag"]), (*path, key)
        message = f"must be one of {', '.join(choices)}, got {shown(tag)}"
        return Problem(nearest_place(places, path), dotted(path), message, did_you_mean(tag, choices))
    if kind == "string_pattern_mismatch" and path == ("model", "name"):
        return Problem(where, dotted(path), *model_name_problem(value))
    if kind in ("value_error", "assertion_error"):
        return Problem(where, dotted(path), str(context.get("error", error["msg"])))
    wanted = list(dict.fromkeys(expected)) or [expectation(error)]
    message = f"must be {', '.join(wanted[:-1])}{' or ' if wanted[1:] else ''}{wanted[-1]}, got {shown(value)}"
    return Problem(where, dotted(path), message, value_hint(error, value, wanted))


def expectation(error: Mapping[str, Any]) -> str:
    """What should have been there."""
    kind, context = error["type"], error.get("ctx", {})
    if kind == "literal_error":
        choices = re.sub(r"'([^']*)'", r"\1", str(context["expected"])).replace(" or ", ", ")
        return f"one of {choices}" if "," in choices else choices
    if kind == "string_pattern_mismatch":
        shape = tuple("*" if isinstance(key, int) else key for key in error["path"])
        return PATTERNS.get(shape, f"text that matches {context['pattern']}")
    if kind in EXPECTED:
        return EXPECTED[kind].format(**{key: plain_number(value) for key, value in context.items()})
    return str(error["msg"]).removeprefix("Input should be ").removeprefix("Value should be ")


def plain_number(value: Any) -> Any:
    """``0`` for 0.0: bounds of floats are often whole."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def value_hint(error: Mapping[str, Any], value: Any, wanted: Sequence[str]) -> str:
    """An edit that would mend the value, where one is at hand."""
    if error["type"] == "literal_error" and isinstance(value, str):
        return did_you_mean(value, re.findall(r"'([^']*)'", error["ctx"]["expected"]))
    if isinstance(value, str) and {"a whole number", "a number"} & set(wanted):
        number = resolve_scalar(value)
        return "remove the quotes" if isinstance(number, int | float) and not isinstance(number, bool) else ""
    if isinstance(value, str) and "true or false" in wanted:
        return "YAML 1.2 knows true and false; yes, no, on and off are text"
    if isinstance(value, float) and "a whole number" in wanted and value == value // 1:
        return f"write {value:.0f}"
    if isinstance(value, bool | int | float) and "text" in wanted:
        return "write it in quotes"
    return ""


def shown(value: Any) -> str:
    """A value as a message quotes it: short, printable."""
    if value is None:
        return "nothing"
    if isinstance(value, list | tuple):
        return "a list" if value else "an empty list"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, float):
        return {"inf": ".inf", "-inf": "-.inf", "nan": ".nan"}.get(repr(value), repr(value))
    text = json.dumps(value, ensure_ascii=not str(value).isprintable())
    return text if len(text) <= 60 else f"{text[:50]}... ({len(str(value))} characters)"


def dotted(path: KeyPath) -> str:
    keys = (str(key) if str(key).isprintable() else ascii(key)[1:-1] for key in path)
    return ".".join(key if len(key) <= 60 else key[:57] + "..." for key in keys)


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    close = difflib.get_close_matches(word[:100], list(choices), n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else ""


def unknown_key_hint(path: KeyPath, data: Any) -> str:
    """The nearest sibling, or the place where a key of that name belongs, or what is known here."""
    key, parent = str(path[-1]), path[:-1]
    known = shape.siblings(parent, data)
    if close := did_you_mean(key.replace("-", "_"), known):
        return close
    # Its own place stands for another member of a union, such as sgd's momentum where adam was chosen.
    elsewhere = [".".join(one) for one in shape.all_paths() if one[-1] == key and one != path]
    if elsewhere:
        return f"did you mean {min(elsewhere, key=len)}?"
    return f"known here: {', '.join(known)}" if known else "remove it"


def model_name_problem(value: str) -> tuple[str, str]:
    """Message and hint for a model's name that has not the form SOURCE:NAME."""
    sources = list(MODELS)
    prefix, colon, name = value.partition(":")
    if not colon:
        known = [own for own in own_models() if own == f"bmctl:{value}"]
        hint = (
            f"did you mean {known[0]}?"
            if known
            else "such as bmctl:rescnn, torchvision:resnet18, timm:vit_tiny_patch16_224"
        )
        return f"must be SOURCE:NAME with SOURCE one of {', '.join(sources)}, got {shown(value)}", hint
    if prefix not in sources:
        close = difflib.get_close_matches(prefix[:100], sources, n=1)
        hint = f"did you mean {close[0]}:{name[:60]}?" if close else ""
        return f"must begin with one of {', '.join(f'{s}:' for s in sources)}, got {shown(value)}", hint
    return f"must be {prefix}: and then letters, digits, '_', '.', '-' and '/', at most 200, got {shown(value)}", ""


def own_models() -> list[str]:
    """bmctl's own models, as recipes write them."""
    return [f"bmctl:{name}" for name in own.names()]
