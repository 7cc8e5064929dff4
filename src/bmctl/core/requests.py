"""What is to be predicted, as an input finds it and a runner takes it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

OnBad = Literal["refuse", "skip"]
"""What happens to requests that cannot be read: `refuse` reads on without giving any, to name all of them."""


@dataclass(frozen=True)
class Requested:
    """Attributes:
    names: Of each sample, [n].
    fields: Array [n, ...] of each field that the model takes, in their order.
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
