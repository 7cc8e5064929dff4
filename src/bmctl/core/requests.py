"""What is to be predicted, as an input finds it and a runner takes it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

OnBad = Literal["refuse", "skip"]
"""What happens to requests that cannot be read: `refuse` reads on without giving any, to name all of them."""


@dataclass(frozen=True)
class Requested:
    """Attributes:
    names: Of each sample, [n].
    fields: Array [n, ...] of each field that the model takes, in their order; then what the task asks for besides.
    """

    names: Sequence[str]
    fields: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Requests:
    """Attributes:
    num_samples: How many there are.
    batches: To be read once.
    """

    num_samples: int
    batches: Iterator[Requested]


def path_name(path: Path) -> str:
    """The path as text that any encoding takes: bytes that are no UTF-8 come out as \\xNN."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")
