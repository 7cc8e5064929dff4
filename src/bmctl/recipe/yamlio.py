"""A safe reader for YAML 1.2 over PyYAML's parser events: plain data and where each key stands; no constructors.

Source: the core schema, https://yaml.org/spec/1.2.2/#103-core-schema
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from bmctl.errors import Problem, RecipeError, ResourceError

KeyPath = tuple[str | int, ...]
Position = tuple[int, int]

MAX_BYTES = 2**20
MAX_DEPTH = 32
MAX_NODES = 100_000
"""After aliases are expanded: no file of MAX_BYTES that means well comes near it."""

NULL = {"", "~", "null", "Null", "NULL"}
BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
UNPRINTABLE = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class Document:
    """One YAML document.

    Attributes:
        data: None, bool, int, float, str, list and dict with str keys.
        positions: Key path to (line, column), from 1; of a mapping's entry the key's, of a list's entry its own.
        problems: What is refused but did not keep the rest from being read.
    """

    data: Any
    positions: Mapping[KeyPath, Position]
    problems: tuple[Problem, ...]


@dataclass(frozen=True)
class Node:
    """A value, or the (key, key's position, value) triples of a mapping, or the items of a list.

    Attributes:
        size: Nodes in it, aliases expanded.
        depth: Levels of collections in it.
    """

    value: Any
    at: Position
    size: int = 1
    depth: int = 0


@dataclass
class Reader:
    """The state of one parse."""

    name: str
    events: Iterator[yaml.Event]
    anchors: dict[str, Node | None] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def read_yaml(path: Path, *, name: str = "") -> Document:
    """Read one YAML file.

    Args:
        name: What messages call it; the path if empty.

    Raises:
        RecipeError: It is not there, not a regular file, too large, not UTF-8, or not YAML.
        ResourceError: It may not be read.
    """
    name = name or str(path)
    content = read_bytes(path, name=name)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if b"\0" in content:
            raise fatal(name, "is a binary file, expected YAML text") from error
        line = content.count(b"\n", 0, error.start) + 1
        column = error.start - content.rfind(b"\n", 0, error.start)
        hint = f"convert it: iconv -f LATIN1 -t UTF-8 {name}"
        raise fatal(f"{name}:{line}:{column}", f"not UTF-8: byte 0x{content[error.start]:02x}", hint) from error
    return parse_yaml(text, name=name)


def read_bytes(path: Path, *, name: str) -> bytes:
    """A regular file's content, up to MAX_BYTES; never waits on a FIFO or a device."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise fatal(name, "no such file", "name a file, or a recipe of `bmctl recipes ls`") from error
    except PermissionError as error:
        raise ResourceError(f"{name}: may not be read", hint=f"chmod +r {name}") from error
    except (OSError, ValueError) as error:
        raise fatal(name, f"cannot be read: {getattr(error, 'strerror', '') or error}") from error
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        if stat.S_ISDIR(mode):
            raise fatal(name, "is a directory, expected a YAML file", "name the file in it")
        raise fatal(name, "is not a regular file, expected a YAML file", "save it to a file first")
    with os.fdopen(descriptor, "rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise fatal(name, f"is larger than {MAX_BYTES} bytes, which no recipe needs", "is this the right file?")
    return content


def parse_yaml(text: str, *, name: str) -> Document:
    """Read one YAML document from a string.

    Raises:
        RecipeError: With `name`, line and column: a syntax error, too deep, too large, more than one document.
    """
    if found := UNPRINTABLE.search(text):
        if found.group() == "\0":
            raise fatal(name, "is a binary file, expected YAML text")
        line, column = text.count("\n", 0, found.start()) + 1, found.start() - text.rfind("\n", 0, found.start())
        raise fatal(f"{name}:{line}:{column}", f"control character U+{ord(found.group()):04X}", "remove it")
    reader = Reader(name, iter(yaml.parse(text, Loader=LOADER)))
    try:
        root = read_document(reader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        what = ", ".join(part for part in (error.context, error.problem) if part)
        if "nesting depth" in what:  # libyaml looks ahead within a line, and has a limit of its own
            raise too_deep(where) from error
        raise fatal(where, f"not YAML: {what}", syntax_hint(text, mark)) from error
    except yaml.YAMLError as error:
        raise fatal(name, f"not YAML: {error}") from error
    positions: dict[KeyPath, Position] = {}
    return Document(plain(root, path=(), positions=positions), positions, tuple(reader.problems))


def fatal(where: str, message: str, hint: str = "") -> RecipeError:
    problem = Problem(where, "", message, hint)
    return RecipeError(f"{where}: {message}", hint=hint, problems=(problem,))


def too_deep(where: str) -> RecipeError:
    return fatal(where, f"nested deeper than {MAX_DEPTH} levels", "is this the right file?")


def syntax_hint(text: str, mark: yaml.Mark | None) -> str:
    lines = text.splitlines()
    line = lines[mark.line] if mark and mark.line < len(lines) else ""
    if "\t" in line[: len(line) - len(line.lstrip())]:
        return "indent with spaces, YAML allows no tabs there"
    if ": " in line.partition(": ")[2]:
        return "quote the value, it contains a colon and a space"
    return "check the indentation, brackets and quotes there and in the line before"


def read_document(reader: Reader) -> Node:
    """The only document of the stream; an empty stream is null."""
    next(reader.events)  # StreamStart
    event = next(reader.events)
    if isinstance(event, yaml.StreamEndEvent):
        return Node(None, (1, 1))
    if isinstance(event, yaml.DocumentStartEvent) and event.version not in (None, (1, 2)):
        refuse(reader, position(event), "recipes are YAML 1.2", "remove the %YAML line")
    root = read_node(reader, next(reader.events), depth=0)
    next(reader.events)  # DocumentEnd
    event = next(reader.events)
    if not isinstance(event, yaml.StreamEndEvent):
        line, column = position(event)
        raise fatal(f"{reader.name}:{line}:{column}", "a second document begins, expected one", "remove it")
    return root


def position(event: yaml.Event) -> Position:
    mark = event.start_mark
    assert mark is not None
    return mark.line + 1, mark.column + 1


def refuse(reader: Reader, at: Position, message: str, hint: str = "") -> None:
    reader.problems.append(Problem(f"{reader.name}:{at[0]}:{at[1]}", "", message, hint))


def read_node(reader: Reader, event: yaml.Event, *, depth: int) -> Node:
    """The node that begins with `event`, inside `depth` collections."""
    at = position(event)
    if isinstance(event, yaml.AliasEvent):
        assert event.anchor is not None
        node = reader.anchors.get(event.anchor)
        if node is None:
            # libyaml hands out aliases to nothing, and to what they stand in, just the same.
            known = "contains itself" if event.anchor in reader.anchors else "has no anchor before it"
            raise fatal(f"{reader.name}:{at[0]}:{at[1]}", f"the alias *{event.anchor} {known}", "spell the value out")
        check_budget(reader, at, depth=depth + node.depth, size=node.size)
        return Node(node.value, at, node.size, node.depth)
    assert isinstance(event, yaml.NodeEvent)
    if getattr(event, "tag", None) is not None:
        tag = str(event.tag).replace("tag:yaml.org,2002:", "!!")  # type: ignore[attr-defined]
        refuse(reader, at, f"the tag {tag!r} is refused: a recipe is plain data", "remove the tag")
    if event.anchor is not None:
        reader.anchors[event.anchor] = None
    if isinstance(event, yaml.ScalarEvent):
        node = Node(scalar(reader, event, at), at)
    elif isinstance(event, yaml.SequenceStartEvent):
        node = read_sequence(reader, at, depth=depth)
    else:
        node = read_mapping(reader, at, depth=depth)
    if event.anchor is not None:
        reader.anchors[event.anchor] = node
    return node


def check_budget(reader: Reader, at: Position, *, depth: int, size: int) -> None:
    where = f"{reader.name}:{at[0]}:{at[1]}"
    if depth > MAX_DEPTH:
        raise too_deep(where)
    if size > MAX_NODES:
        raise fatal(where, f"more than {MAX_NODES} values, aliases expanded", "is this the right file?")


def read_sequence(reader: Reader, at: Position, *, depth: int) -> Node:
    check_budget(reader, at, depth=depth + 1, size=1)
    items: list[Node] = []
    size, inner = 1, 0
    while not isinstance(event := next(reader.events), yaml.SequenceEndEvent):
        item = read_node(reader, event, depth=depth + 1)
        size, inner = size + item.size, max(inner, item.depth)
        check_budget(reader, item.at, depth=0, size=size)
        items.append(item)
    return Node(items, at, size, inner + 1)


def read_mapping(reader: Reader, at: Position, *, depth: int) -> Node:
    check_budget(reader, at, depth=depth + 1, size=1)
    entries: dict[str, tuple[Position, Node]] = {}
    size, inner = 1, 0
    while not isinstance(event := next(reader.events), yaml.MappingEndEvent):
        key = read_node(reader, event, depth=depth + 1)
        item = read_node(reader, next(reader.events), depth=depth + 1)
        size, inner = size + item.size + 1, max(inner, item.depth)
        check_budget(reader, item.at, depth=0, size=size)
        if not isinstance(key.value, str):
            what = "a list or mapping" if key.depth else yaml_text(key.value)
            refuse(reader, key.at, f"a key must be text, got {what}", "write it in quotes")
        elif key.value == "<<":
            refuse(reader, key.at, "merge keys (<<) are not part of YAML 1.2", "use `include:`, or repeat the keys")
        elif key.value in entries:
            line = entries[key.value][0][0]
            refuse(reader, key.at, f"the key {key.value!r} is already given in line {line}", "remove one of them")
        else:
            entries[key.value] = (key.at, item)
    return Node(entries, at, size, inner + 1)


def scalar(reader: Reader, event: yaml.ScalarEvent, at: Position) -> bool | int | float | str | None:
    text: str = event.value
    if not event.implicit[0] or event.style:
        if found := re.search("[\0\ud800-\udfff]", text):
            refuse(reader, at, f"text with the character U+{ord(found.group()):04X}", "remove it")
        return text
    value = resolve_scalar(text)
    if isinstance(value, int) and abs(value) >= 2**63:
        refuse(reader, at, f"a whole number beyond 64 bits ({len(text)} digits)", "write it in quotes if it is text")
        return 0
    return value


def resolve_scalar(text: str) -> bool | int | float | str | None:
    """What an unquoted scalar means in YAML 1.2: ``1e-3`` is a float, ``no`` and dates are text.

    Whole numbers of more than 400 digits come back as 2**63: they are refused anyway, and converting them is slow.
    """
    if text in NULL:
        return None
    if text in BOOL:
        return BOOL[text]
    if INT.fullmatch(text):
        return int(text, 0 if text[:2] in ("0o", "0x") else 10) if len(text) <= 400 else 2**63
    if FLOAT.fullmatch(text):
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text


def plain(node: Node, *, path: KeyPath, positions: dict[KeyPath, Position]) -> Any:
    """The node as fresh plain data; records where its entries stand."""
    positions.setdefault(path, node.at)
    if isinstance(node.value, list):
        return [plain(item, path=(*path, i), positions=positions) for i, item in enumerate(node.value)]
    if isinstance(node.value, dict):
        mapping = {}
        for key, (at, item) in node.value.items():
            positions[*path, key] = at
            mapping[key] = plain(item, path=(*path, key), positions=positions)
        return mapping
    return node.value


class Dumper(yaml.SafeDumper):
    """Quotes whatever YAML 1.2 would not read back as text; PyYAML itself thinks of YAML 1.1 only."""


def represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = None if isinstance(resolve_scalar(text), str) else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


Dumper.add_representer(str, represent_text)


def yaml_text(data: Any, *, flow: bool = False) -> str:
    """Plain data as YAML 1.2 that `parse_yaml` reads back as equal; keys in their own order."""
    text = yaml.dump(data, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120, default_flow_style=flow)
    return text.removesuffix("\n...\n") if not isinstance(data, dict | list) else text
