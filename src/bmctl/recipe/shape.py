"""The shape of recipes as JSON Schema: for editors, and for saying what could have stood in a wrong place."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any

from bmctl.recipe.sections import Recipe, input_kind
from bmctl.recipe.yamlio import KeyPath

Json = Mapping[str, Any]

SHORTHAND: Mapping[KeyPath, str] = {
    ("model",): "name",
    ("data", "source"): "kind",
    ("data", "input"): "kind",
    ("task",): "kind",
    ("train", "optimizer"): "name",
    ("train", "schedule"): "name",
    ("compress", "*"): "method",
    ("compress", "*", "recover", "fit", "optimizer"): "name",
    ("compress", "*", "recover", "fit", "schedule"): "name",
    ("export", "backends", "*"): "name",
}
"""Where text stands for a mapping: ``task: classify`` is ``task: {kind: classify}``. A list's index is ``*``."""

DEFAULT_KIND: Mapping[KeyPath, str] = {
    ("task",): "classify",
    ("train", "optimizer"): "adamw",
    ("train", "schedule"): "cosine",
    ("compress", "*", "recover", "fit", "optimizer"): "adamw",
    ("compress", "*", "recover", "fit", "schedule"): "cosine",
}
"""What such a mapping is where it does not say."""


def default_kinds(data: Json) -> Mapping[KeyPath, str]:
    """DEFAULT_KIND, and of the input what suits the source."""
    section = data.get("data")
    return {**DEFAULT_KIND, ("data", "input"): input_kind(section.get("source") if isinstance(section, dict) else None)}


@lru_cache(maxsize=1)
def resolved_schema() -> Json:
    """The JSON Schema of the Recipe model: of recipes as they are saved."""
    return Recipe.model_json_schema()


def recipe_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe file as it may be written, with includes and shorthand."""
    schema = with_shorthand(copy.deepcopy(dict(resolved_schema())))
    properties = schema["properties"]
    properties["include"] = {
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
        "description": "Recipes that this one is laid over: paths beside it, or names of built-in recipes.",
    }
    properties["model"] = {"anyOf": [{"type": "string"}, properties["model"]]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def with_shorthand(node: Any) -> Any:
    """Let every union that says what it is by one key be that key's value alone."""
    if isinstance(node, list):
        return [with_shorthand(item) for item in node]
    if not isinstance(node, dict):
        return node
    opened = {key: item if key == "discriminator" else with_shorthand(item) for key, item in node.items()}
    if "discriminator" not in opened:
        return opened
    return {"anyOf": [{"type": "string", "enum": list(opened["discriminator"]["mapping"])}, opened]}


# -- looking things up ------------------------------------------------------------------------------


def siblings(path: KeyPath, data: Any) -> list[str]:
    """The keys that a mapping at `path` may have, given what `data` says about its unions."""
    nodes, value = step_to(path, data)
    return sorted({key for node in resolved(nodes, value) for key in node.get("properties", ())})


def tags(path: KeyPath, data: Any) -> list[str]:
    """What the value at `path` may say that it is: the choices of its union; empty where it is none."""
    return [tag for node in step_to(path, data)[0] for tag in node.get("discriminator", {}).get("mapping", ())]


@lru_cache(maxsize=1)
def all_paths() -> tuple[tuple[str, ...], ...]:
    """Every key of a recipe outside of lists."""

    def walk(nodes: Iterable[Json], path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        for node in resolved(nodes, None):
            for key, child in node.get("properties", {}).items():
                yield (*path, key)
                yield from walk([child], (*path, key))

    return tuple(walk([resolved_schema()], ()))


def step_to(path: KeyPath, data: Any) -> tuple[list[Json], Any]:
    """The schemas that may apply at `path`, unions unopened, and the value there."""
    nodes, value = [resolved_schema()], data
    for key in path:
        inner = [
            node.get("items")
            if isinstance(key, int)
            else node.get("properties", {}).get(key, node.get("additionalProperties"))
            for node in resolved(nodes, value)
        ]
        nodes = list(referred([node for node in inner if isinstance(node, Mapping)]))
        inside = (isinstance(value, dict) and key in value) or (isinstance(value, list) and isinstance(key, int))
        value = value[key] if inside else None
    return nodes, value


def referred(nodes: Iterable[Json]) -> Iterator[Json]:
    """`nodes` with references and optional parts opened, down to the unions that have a discriminator."""
    for node in nodes:
        if "$ref" in node:
            yield from referred([resolved_schema()["$defs"][node["$ref"].rpartition("/")[2]]])
        elif "discriminator" not in node and ("anyOf" in node or "oneOf" in node):
            yield from referred(node.get("anyOf") or node["oneOf"])
        else:
            yield node


def resolved(nodes: Iterable[Json], value: Any) -> Iterator[Json]:
    """`nodes` with unions opened too: the member that `value` says it is, else every member."""
    for node in referred(nodes):
        if "discriminator" not in node:
            yield node
            continue
        mapping = node["discriminator"]["mapping"]
        tag = value.get(node["discriminator"]["propertyName"]) if isinstance(value, dict) else None
        picked = [mapping[tag]] if isinstance(tag, str) and tag in mapping else list(mapping.values())
        yield from referred([{"$ref": one} for one in picked])
