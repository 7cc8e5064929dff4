"""constraints.txt names everything that pyproject.toml brings along, in versions that go together.

What is installed may be older or newer than it says (`make bounds`, `make newest`): it is held to what was installed as
it says.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution

import pytest
from packaging.requirements import Requirement
from tests.versions import ROOT, SAME_RELEASE, asked, canonical, oldest

LINES = (ROOT / "constraints.txt").read_text().splitlines()
PINS = dict(line.split("==") for line in LINES if not line.startswith("#"))
ASKED = [Requirement(text) for text in asked(groups=True)]


def find(name: str) -> Distribution | None:
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


def needs(package: Distribution, extras: set[str]) -> Iterator[Requirement]:
    """What it requires here, with these extras."""
    for requirement in map(Requirement, package.requires or ()):
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in {"", *extras}):
            yield requirement


def is_as_pinned(package: Distribution) -> bool:
    return package.version.partition("+")[0] == PINS.get(canonical(package.name))


def brought_along() -> dict[str, list[Requirement]]:
    """All that is installed because pyproject.toml asks for it, however far behind: canonical name -> what it needs.

    What a package needs that is not in its pinned version is its own business.
    """
    found: dict[str, list[Requirement]] = {}
    left, seen = list(ASKED), set()
    while left:
        requirement = left.pop()
        name, extras = canonical(requirement.name), frozenset(requirement.extras)
        package = find(name)
        if package is None or (name, extras) in seen:
            continue
        seen.add((name, extras))
        further = list(needs(package, {*extras})) if is_as_pinned(package) else []
        found[name] = [*found.get(name, []), *further]
        left += further
    return found


def test_a_line_is_a_name_and_a_version() -> None:
    for line in LINES:
        assert re.fullmatch(r"#.*|[a-z0-9]+(-[a-z0-9]+)*==[0-9][0-9a-z.]*", line), line
    names = [line.split("==")[0] for line in LINES if not line.startswith("#")]
    assert names == sorted(set(names))


@pytest.mark.parametrize("requirement", ASKED, ids=str)
def test_what_is_asked_for_is_pinned_within_its_bounds(requirement: Requirement) -> None:
    assert requirement.specifier.contains(PINS[canonical(requirement.name)]), requirement


def test_nothing_is_installed_that_is_not_pinned() -> None:
    found = brought_along()
    assert {"torch", "nncf", "pytest", "sympy"} <= set(found), "what is asked for, and what that needs"
    assert not sorted(set(found) - set(PINS))


def test_versions_go_together() -> None:
    """As pip would find out, of all that is installed in the version that is pinned."""
    wrong = [
        f"{name} {PINS[name]} needs {requirement}, not {PINS[canonical(requirement.name)]}"
        for name, further in brought_along().items()
        for requirement in further
        if not requirement.specifier.contains(PINS[canonical(requirement.name)])
    ]
    assert not wrong, "\n".join(wrong)


def test_parts_of_one_release_have_one_version() -> None:
    for known, others in SAME_RELEASE.items():
        assert {PINS[other] for other in others} == {PINS[known]}


def test_the_oldest_are_within_the_bounds_too() -> None:
    lower = dict(line.split("==") for line in oldest())
    for requirement in map(Requirement, asked(groups=False)):
        assert requirement.specifier.contains(lower[requirement.name])
