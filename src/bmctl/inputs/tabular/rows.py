"""Columns of rows to arrays.

n: rows of a batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from bmctl.core.columns import Class
from bmctl.errors import DataError
from bmctl.inputs.tabular.spec import CATEGORIES, NUMBERS, UNKNOWN, Category, Config, Number, Spec

if TYPE_CHECKING:
    from bmctl.inputs import Examples, Records


def resolve(asked: Config, examples: Examples) -> Spec:
    """See bmctl.inputs.tabular.resolve."""
    records = examples.read(None)
    numbers, categories = [], []
    for name, column in examples.columns.items():
        if column.kind == "real":
            numbers.append(_number(name, np.asarray(records[name], np.float64)))
        elif isinstance(column, Class):
            categories.append(Category(name=name, values=column.names))
        else:
            categories.append(_category(name, records[name], most=asked.max_categories))
    return Spec(numbers=tuple(numbers), categories=tuple(categories))


def _number(name: str, values: np.ndarray) -> Number:
    known = values[~np.isnan(values)]
    if not len(known):
        raise DataError(f"data.source: the column {name!r} has no numbers in training", hint="leave it out: drop")
    # A column that never changes says nothing, and has no deviation to divide by.
    return Number(name=name, mean=float(known.mean()), std=float(known.std()) or 1.0, missing=len(known) < len(values))


def _category(name: str, values: Sequence[Any], *, most: int) -> Category:
    counts = Counter(map(str, values))
    if len(counts) > most:
        example = ", ".join(repr(value[:20]) for value in sorted(counts)[:3])
        raise DataError(
            f"data.source: the column {name!r} has {len(counts):,} different values, such as {example}; "
            f"data.input.max_categories is {most:,}",
            hint=f"leave it out: --set 'data.source.drop=[{name}]'",
        )
    return Category(name=name, values=tuple(sorted(counts)))


def encode(records: Records, *, spec: Spec) -> dict[str, np.ndarray]:
    """See bmctl.inputs.tabular.encode."""
    found: dict[str, np.ndarray] = {}
    if spec.numbers:
        found[NUMBERS] = _numbers(records, spec.numbers)
    if spec.categories:
        found[CATEGORIES] = np.stack([_places(records[one.name], one) for one in spec.categories], axis=1)
    return found


def _numbers(records: Records, columns: Sequence[Number]) -> np.ndarray:
    """float32 [n, columns and which are missing]: standardised in float64, as dates in seconds need."""
    made, flags = [], []
    for one in columns:
        values = np.asarray(records[one.name], np.float64)
        absent = np.isnan(values)
        if absent.any() and not one.missing:
            raise DataError(
                f"the column {one.name!r} has no number in {int(absent.sum())} of {len(values)} rows; in training none "
                "was missing",
                hint="fill them in, or train with rows that lack some too",
            )
        made.append(np.where(absent, 0.0, (values - one.mean) / one.std))
        if one.missing:
            flags.append(absent.astype(np.float64))
    return np.stack([*made, *flags], axis=1).astype(np.float32)


def _places(values: Sequence[Any], column: Category) -> np.ndarray:
    """int32 [n]."""
    array = np.asarray(values)
    if array.dtype.kind in "iu":  # classes come as their places
        return (array + 1).astype(np.int32)
    places = _index(column)
    return np.array([places.get(str(value), UNKNOWN) for value in values], np.int32)


@lru_cache(maxsize=256)
def _index(column: Category) -> Mapping[str, int]:
    return {value: place for place, value in enumerate(column.values, UNKNOWN + 1)}


def of_arrays(arrays: Mapping[str, np.ndarray], *, spec: Spec, name: str) -> dict[str, Any]:
    """Records of arrays by the names of columns.

    Raises:
        DataError: Not a vector of numbers, or not one of words.
    """
    for place, column in enumerate(spec.names):
        array, is_number = arrays[column], place < len(spec.numbers)
        if array.ndim != 1 or array.dtype.kind not in ("fiub" if is_number else "U"):
            what = "numbers" if is_number else "words"
            raise DataError(f"{name}: {column!r} is {array.dtype} {list(array.shape)}, expected a vector of {what}")
    records: dict[str, Any] = {one.name: arrays[one.name].astype(np.float64) for one in spec.numbers}
    return records | {one.name: arrays[one.name].tolist() for one in spec.categories}


def unknown(records: Records, spec: Spec) -> dict[str, list[str]]:
    """By column the words that training never saw."""
    found = {one.name: sorted({str(v) for v in records[one.name]} - set(one.values)) for one in spec.categories}
    return {name: words for name, words in found.items() if words}
