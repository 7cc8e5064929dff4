"""Versions as pip constraints: ``python tests/versions.py oldest``, or ``installed``.

oldest      of every dependency the oldest version that pyproject.toml allows: what `make bounds` installs
installed   what stands beside this interpreter: what `make renew` makes constraints.txt of

Needs nothing but Python: it runs before anything is installed.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Sequence
from importlib.metadata import distributions
from pathlib import Path

ROOT = Path(__file__).parents[1]
HEADER = """\
# What `make setup` installs, and so what is tested: what pyproject.toml asks for, with its extras and groups, and what
# that brings along. On Linux, x86-64. `make renew` tries the newest that pyproject.toml allows, and writes this file.
"""
SAME_RELEASE = {"tensorrt-cu13-bindings": ("tensorrt-cu13", "tensorrt-cu13-libs")}
"""NVIDIA's own server has these, which not everybody reaches: known by a part of the release that PyPI has."""


def asked(*, groups: bool) -> list[str]:
    """Requirements of pyproject.toml with its extras, and with its groups for developers."""
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = pyproject["project"]
    found = [project["dependencies"], *project["optional-dependencies"].values()]
    found += pyproject["dependency-groups"].values() if groups else []
    return [requirement for some in found for requirement in some]


def canonical(name: str) -> str:
    """As package indexes compare names."""
    return re.sub(r"[-_.]+", "-", name).lower()


def oldest() -> list[str]:
    """Of what users install; developers' tools may be the newest."""
    pins = []
    for requirement in asked(groups=False):
        found = re.fullmatch(r"([A-Za-z0-9_.-]+)>=([0-9.]+),<[0-9.]+", requirement)
        if not found:
            sys.exit(f"{requirement}: expected NAME>=LOWER,<UPPER")
        pins.append(f"{found[1]}=={found[2]}")
    return pins


def installed() -> list[str]:
    """Everything but bmctl; a build's own label, such as +cpu, is left out, as indexes differ in it."""
    pins = {canonical(each.name): each.version.partition("+")[0] for each in distributions() if each.name != "bmctl"}
    for known, others in SAME_RELEASE.items():
        pins |= dict.fromkeys(others, pins[known])
    return [f"{name}=={pins[name]}" for name in sorted(pins)]


def main(argv: Sequence[str]) -> None:
    match list(argv):
        case ["oldest"]:
            sys.stdout.write("\n".join([*oldest(), ""]))
        case ["installed"]:
            sys.stdout.write(HEADER + "\n".join([*installed(), ""]))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
