"""What a recipe may say of rows of a table, and what a manifest keeps of it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from bmctl.schema import Many, Positive, Strict

NUMBERS, CATEGORIES = "numbers", "categories"
UNKNOWN = 0
"""The id of values that training never saw; those that it saw follow, in the order of `Category.values`."""


class Config(Strict):
    """Attributes:
    max_categories: Different values that a column of words may have; more are a sign of names or ids.
    """

    kind: Literal["tabular"] = "tabular"
    max_categories: Annotated[int, Field(ge=2, le=1_000_000)] = 1000


class Number(Strict):
    """A column of numbers, brought to mean 0 and standard deviation 1.

    Attributes:
        missing: Some are missing in training: a second number then says which, and these count as the mean.
    """

    name: str
    mean: float
    std: Positive
    missing: bool = False


class Category(Strict):
    """A column of words, each told by its place among `values`; an empty one is a word as well."""

    name: str
    values: Many[str]


class Spec(Strict):
    """From a row to the model's input, exactly as in training."""

    kind: Literal["tabular"] = "tabular"
    numbers: Many[Number]
    categories: Many[Category]

    @property
    def names(self) -> tuple[str, ...]:
        """Of the columns, those of numbers first."""
        return (*(one.name for one in self.numbers), *(one.name for one in self.categories))

    @property
    def num_numbers(self) -> int:
        """Columns of `numbers`, those that say what is missing among them."""
        return len(self.numbers) + sum(one.missing for one in self.numbers)
