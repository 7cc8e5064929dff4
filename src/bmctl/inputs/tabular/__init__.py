"""Rows of a table: numbers, standardised, and words, each as its place among those that training saw."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bmctl.inputs.tabular.spec import CATEGORIES, NUMBERS, Category, Config, Number, Spec
from bmctl.schema import BATCH, Emit, Span, TensorSpec

if TYPE_CHECKING:
    import numpy as np
    import torch

    from bmctl.core.chance import Luck
    from bmctl.core.requests import OnBad, Requests
    from bmctl.inputs import Examples, Records, Resolved

READS = ("real", "text", "class")

__all__ = ["CATEGORIES", "NUMBERS", "READS", "Category", "Config", "Number", "Spec"]


def check(given: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Nothing in it has to fit together."""
    return iter(())


def resolve(asked: Config, examples: Examples, *, published: Mapping[str, Any]) -> tuple[Spec, dict[str, bytes]]:
    """Mean and deviation of each column of numbers, and the words of every other, all of the training rows.

    Raises:
        DataError: A column of words has more of them than `max_categories`.
    """
    from bmctl.inputs.tabular.rows import resolve

    return resolve(asked, examples), {}


def specs(spec: Spec) -> tuple[TensorSpec, ...]:
    """The numbers, and the categories: each only where there are any."""
    numbers = TensorSpec(
        name=NUMBERS,
        dtype="float32",
        shape=(BATCH, spec.num_numbers),
        meaning="standardised: " + ", ".join(one.name for one in spec.numbers),
    )
    categories = TensorSpec(
        name=CATEGORIES,
        dtype="int64",
        shape=(BATCH, len(spec.categories)),
        meaning="places among known values, 0 is unknown: " + ", ".join(one.name for one in spec.categories),
    )
    return (*((numbers,) if spec.numbers else ()), *((categories,) if spec.categories else ()))


def fitted(asked: Config, inputs: Sequence[TensorSpec]) -> Config:
    """A foreign graph says nothing of columns."""
    return asked


def axes(spec: Spec) -> dict[str, Span]:
    """None but the batch is free."""
    return {}


def told(given: Resolved) -> dict[str, Any]:
    """``category_sizes``: ids that each column of words has, the unknown among them."""
    return {"category_sizes": tuple(len(one.values) + 1 for one in given.spec.categories)}


def prepare(samples: Any, *, given: Resolved, folder: Path | None) -> Any:
    """As they are: rows cost little to encode."""
    return samples


def encode(
    records: Records, *, given: Resolved, asked: Config | None = None, luck: Luck | None = None
) -> dict[str, np.ndarray]:
    """float32 [n, numbers] and int32 [n, categories].

    Raises:
        DataError: A number is missing in a column where training had all of them.
    """
    from bmctl.inputs.tabular.rows import encode

    return encode(records, spec=given.spec)


def finish(
    fields: Mapping[str, torch.Tensor],
    *,
    given: Resolved,
    channels_last: bool = False,
    empty: Callable[[tuple[int, ...], torch.dtype], torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """float32 numbers and int64 categories."""
    return {
        spec.name: fields[spec.name].long() if spec.dtype == "int64" else fields[spec.name]
        for spec in specs(given.spec)
    }


def unprepared(arrays: Mapping[str, np.ndarray], *, given: Resolved, name: str) -> dict[str, Any] | None:
    """Columns by their names, [n] each; what the model takes is prepared."""
    if not set(given.spec.names) <= set(arrays):
        return None
    from bmctl.inputs.tabular.rows import of_arrays

    return of_arrays(arrays, spec=given.spec, name=name)


def requests(source: str | Path, *, given: Resolved, batch_size: int, on_bad: OnBad = "refuse", emit: Emit) -> Requests:
    """A table with the columns of training (others are passed over), or one row as a JSON object.

    Raises:
        DataError: Nothing there, a column is missing, or there are no rows. While reading: bad rows.
    """
    from bmctl.inputs.tabular.files import requests

    return requests(source, given=given, batch_size=batch_size, on_bad=on_bad, emit=emit)
