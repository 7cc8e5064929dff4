"""The YAML reader: what it takes, where it says things stand, what it refuses."""

from __future__ import annotations

import math
import os
import re
import socket
from pathlib import Path
from typing import Any

import pytest

from bmctl.errors import RecipeError, ResourceError
from bmctl.recipe.yamlio import MAX_BYTES, MAX_DEPTH, parse_yaml, read_yaml, yaml_text


def refusal(text: str) -> str:
    """What is said of `text`: the error that is raised, or the first problem."""
    try:
        document = parse_yaml(text, name="r.yaml")
    except RecipeError as error:
        return str(error.problems[0])
    assert document.problems, document.data
    return str(document.problems[0])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1.", 1.0),
        (".5", 0.5),
        ("-2.5E+3", -2500.0),
        ("0123", 123),
        ("0o17", 15),
        ("0x1F", 31),
        ("+7", 7),
        ("-.inf", -math.inf),
        ("no", "no"),
        ("Yes", "Yes"),
        ("on", "on"),
        ("true", True),
        ("False", False),
        ("~", None),
        ("", None),
        ("null", None),
        ("2026-01-31", "2026-01-31"),
        ("12:30:45", "12:30:45"),
        ("1_000", "1_000"),
        ("0b11", "0b11"),
        ("'5'", "5"),
        ('"null"', "null"),
        ("1e999", math.inf),
        ("=", "="),
        ("é ☃ 𝄞", "é ☃ 𝄞"),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: Any) -> None:
    found = parse_yaml(f"a: {text}", name="x").data["a"]
    assert (found, type(found)) == (value, type(value))


def test_nan_is_read() -> None:
    assert math.isnan(parse_yaml(".nan", name="x").data)


def test_positions_are_of_keys_and_items() -> None:
    text = "a: 1\nb:\n  - x\n  - {c: 2,  d: [7, 8]}\né: {f: 1}\n"
    positions = parse_yaml(text, name="x").positions
    assert positions["a",] == (1, 1)
    assert positions["b", 0] == (3, 5)
    assert positions["b", 1, "d"] == (4, 13)
    assert positions["b", 1, "d", 1] == (4, 20)
    assert positions["é", "f"] == (5, 5)
    assert positions[()] == (1, 1)


def test_aliases_are_copies_with_positions_of_their_own() -> None:
    document = parse_yaml("a: &x {k: [1]}\nb: *x\n", name="x")
    assert document.data == {"a": {"k": [1]}, "b": {"k": [1]}}
    assert document.data["a"]["k"] is not document.data["b"]["k"]
    assert document.positions["b",] == (2, 1)
    assert ("b", "k", 0) in document.positions


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("a: 1\nb: 2\na: 3\n", r"r\.yaml:3:1: the key 'a' is already given in line 1"),
        ("a: {b: 1, b: 2}", r"1:11: the key 'b'"),
        ("a: !!python/object/apply:os.system [ls]", r"1:4: the tag '!!python/object"),
        ("a: !env HOME", r"the tag '!env'"),
        ("a: ! 5", r"the tag '!'"),
        ("a: !!str 5", r"the tag '!!str'"),
        ("<<: {a: 1}", r"merge keys"),
        ("1: a", r"a key must be text, got 1"),
        ("true: a", r"a key must be text, got true"),
        ("? \n: b", r"a key must be text, got null"),
        ("? [a]\n: b", r"a key must be text, got a list"),
        ("a: *nope", r"1:4: the alias \*nope has no anchor"),
        ("a: &x [*x]", r"1:8: the alias \*x contains itself"),
        ("a: 1\n\tb: 2", r"r\.yaml:2:\d+: not YAML.*\n.*no tabs"),
        ("a: b: c", r"1:5: not YAML.*\n.*quote the value"),
        ("a: [1, 2", r"not YAML"),
        ("a: 'x", r"not YAML"),
        ("a: 1\n---\nb: 2", r"2:1: a second document"),
        ("%YAML 1.1\n---\na: 1", r"YAML 1\.2"),
        ("a: 99999999999999999999", r"beyond 64 bits \(20 digits\)"),
        ("a: " + "9" * 100_000, r"beyond 64 bits \(100000 digits\)"),
        ('a: "x\\0y"', r"the character U\+0000"),
        ("a: \x07", r"1:4: control character U\+0007"),
        ("a: 1\nb: \x00", r"binary"),
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), rf"deeper than {MAX_DEPTH}"),
        ("{a: " * 10_000, r"deeper than"),
        ("[" * 20_000, rf"deeper than {MAX_DEPTH}"),  # newer libyaml stops by itself, and says so in other words
        ("[" + "1," * 150_000 + "1]", r"more than 100000 values"),
    ],
)
def test_refusals_say_where_and_why(text: str, pattern: str) -> None:
    assert re.search(pattern, refusal(text))


def test_the_deepest_allowed_is_read() -> None:
    parse_yaml("[" * MAX_DEPTH + "]" * MAX_DEPTH, name="x")
    assert "deeper" in refusal("a: &x [[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]\nb: [[[[[[[[[[[[[[[[*x]]]]]]]]]]]]]]]]")


def test_alias_bomb_is_refused_before_it_goes_off() -> None:
    lines = ["a0: &a0 [x,x,x,x,x,x,x,x,x]"]
    lines += [f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    assert "aliases expanded" in refusal("\n".join(lines))


def test_every_refused_key_is_told_at_once() -> None:
    document = parse_yaml("a: !x 1\na: 2\nb: 1\nb: 2\n", name="r")
    assert len(document.problems) == 3
    assert document.data == {"a": "1", "b": 1}


def test_file_with_bom_and_crlf(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: 1\r\nb: x\r\n")
    document = read_yaml(path)
    assert document.data == {"a": 1, "b": "x"}
    assert document.positions["b",] == (2, 1)


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        (b"a: 1\nb: caf\xe9\n", r":2:7: not UTF-8: byte 0xe9"),
        (b"\x89PNG\r\n\x1a\n\x00\x00", r"binary"),
        (b"\xff\xfea\x00:\x00", r"binary"),
        (b"a: 1\n" * (MAX_BYTES // 5 + 1), r"larger than"),
    ],
)
def test_files_that_are_not_text(tmp_path: Path, content: bytes, pattern: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=pattern):
        read_yaml(path)


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(tmp_path / "socket"))
        for name, pattern in {
            "gone": "no such file",
            ".": "is a directory",
            "fifo": "not a regular file",
            "loop": "cannot be read",
            "x" * 300: "cannot be read",
            "nul\0": "cannot be read",
            "socket": "cannot be read",
        }.items():
            with pytest.raises(RecipeError, match=pattern) as caught:
                read_yaml(tmp_path / name)
            assert caught.value.exit_code == 3
    with pytest.raises(RecipeError, match="not a regular file"):
        read_yaml(Path("/dev/zero"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
def test_unreadable_file(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("a: 1")
    path.chmod(0)
    with pytest.raises(ResourceError, match="may not be read"):
        read_yaml(path)


@pytest.mark.parametrize(
    "value",
    [
        "1e-3", "no", "null", "", "~", "0o17", "0x1f", ".nan", "12", "1.5", "2026-01-31", "a: b", "# x", " x ", "é\n☃",
        "a\tb", "*x", "!x", "-", "=", "<<", "%", "@", "${ENV:X}", "'", '"', "1_000", "on", "x" * 300,
        1e-3, 1e-9, 1e300, -0.5, 3, -(2**62), True, None, [], {}, [[], {"a": [1, "1"]}], {"b": 1, "a": {"no": "1e5"}},
    ],
)  # fmt: skip
def test_dumped_data_reads_back_the_same(value: Any) -> None:
    text = yaml_text({"v": value})
    document = parse_yaml(text, name="x")
    assert document.data == {"v": value}
    assert type(document.data["v"]) is type(value)
    assert not document.problems
    assert parse_yaml(yaml_text(value), name="x").data == value
