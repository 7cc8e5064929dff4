"""What the columns of samples are: what a source gives, an input encodes and a task takes its targets from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Picture:
    """uint8 [H, W] or [H, W, 3] as an array, or as Pillow holds it, of mode L or RGB; one array where sizes agree."""

    kind: ClassVar[str] = "picture"


@dataclass(frozen=True)
class Text:
    """Strings."""

    kind: ClassVar[str] = "text"


@dataclass(frozen=True)
class Class:
    """int64, each the place of its class among `names`."""

    kind: ClassVar[str] = "class"
    names: tuple[str, ...]


@dataclass(frozen=True)
class Id:
    """int64, below `size`: users, items, words."""

    kind: ClassVar[str] = "id"
    size: int


@dataclass(frozen=True)
class Real:
    """float32; nan where a feature is missing.

    Attributes:
        mean: Of the training samples, whichever split this is of; so is `std`.
    """

    kind: ClassVar[str] = "real"
    mean: float = 0.0
    std: float = 1.0


@dataclass(frozen=True)
class Episode:
    """int64, each the seed that an episode of an environment begins with.

    Attributes:
        env: Its name in gymnasium's registry.
        max_steps: After so many steps it ends, if it did not before.
    """

    kind: ClassVar[str] = "episode"
    env: str
    max_steps: int


Column = Picture | Text | Class | Id | Real | Episode
