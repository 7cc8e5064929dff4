"""A recipe's data: its source, opened once, the choice among its samples, and the splits that come of it.

N: samples of a split.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bmctl.core.chance import shuffled
from bmctl.core.columns import Column
from bmctl.engine.loading.order import balanced_order
from bmctl.engine.loading.split import Split, input_columns
from bmctl.errors import DataError, RecipeError
from bmctl.inputs import INPUTS, Records, Resolved
from bmctl.models import ModelConfig, published
from bmctl.recipe.sections import DataConfig, Recipe
from bmctl.sources import SOURCES, Samples
from bmctl.tasks import TASKS, writes

MOST_OF_STREAM = 4096
"""Calibration samples of a stream, which is read in order, so that its beginning need not hold all classes."""


class Data:
    """The source of a recipe: each split is opened when it is first asked for, and once.

    Attributes:
        recipe: Its `data` section says which source, and how many samples of each split.
        folder: Where an input may keep what it made of the samples; None: nowhere.
    """

    def __init__(self, recipe: Recipe, *, folder: Path | None = None) -> None:
        self.recipe, self.folder = recipe, folder
        self._opened: dict[str, Samples] = {}
        self._orders: dict[str, np.ndarray] = {}

    @property
    def section(self) -> DataConfig:
        """The recipe's `data`.

        Raises:
            RecipeError: It has none.
        """
        if self.recipe.data is None:
            raise RecipeError(
                "the recipe has no data section", hint="add `data: {source: {kind: bundled}}`, or your own data"
            )
        return self.recipe.data

    def samples(self, split: str) -> Samples:
        """Everything that the source has of `train`, `val` or `test`.

        Raises:
            DataError: Missing, empty, corrupt or inconsistent data, or none for the recipe's task.
        """
        if split not in self._opened:
            source: Any = self.section.source
            samples: Samples = SOURCES[source.kind].open(source, split=split)
            if len(samples) == 0:
                raise DataError(f"data.source: the {split} split is empty")
            if (task := self.recipe.task) is not None:  # says what the task misses before anybody looks for it
                TASKS[task.kind].facts(samples.columns, task, {})
            self._opened[split] = samples
        return self._opened[split]

    def order(self, split: str) -> np.ndarray:
        """int64 [N]: all samples, every beginning of which holds the task's classes in equal numbers."""
        if split not in self._orders:
            samples = self.samples(split)
            self._orders[split] = fair_order(samples, np.arange(len(samples)), self.recipe)
        return self._orders[split]

    def chosen(self, name: str) -> np.ndarray:
        """int64 [N]: the samples of ``train``, ``val``, ``test`` or ``calib`` that the recipe's limits leave."""
        data = self.section
        split = self.split_of(name)
        order = self.order(split)[: {"train": data.train, "val": data.val, "test": data.test}[split].limit]
        if not self.samples(split).sequential:
            return order[: data.calib.limit] if name == "calib" else order
        if name == "calib":
            order = order[: data.calib.limit or MOST_OF_STREAM]
        return np.sort(order)

    def split_of(self, name: str) -> str:
        """Of the source: calibration takes from train or val."""
        return self.section.calib.split if name == "calib" else name


def fair_order(samples: Samples, indices: np.ndarray, recipe: Recipe) -> np.ndarray:
    """`indices` in an order of which every beginning is fair to the task: classes in equal numbers, if it has any."""
    task: Any = recipe.task
    column = TASKS[task.kind].balance(task) if task is not None else None
    if column is None:
        return indices[shuffled(len(indices), keys=())]
    return indices[balanced_order(np.asarray(samples.read(indices, only=(column,))[column]))]


def open_split(data: Data, *, name: str, given: Resolved, augment: bool = False, facts: Any = None) -> Split:
    """The samples that the recipe asks for.

    Args:
        data: Of the recipe.
        name: ``train``, ``val``, ``test``, or ``calib`` for calibration, which never takes from test.
        given: As `resolve_input` or a package's manifest says.
        augment: Do what the recipe's input says about training.
        facts: Those of the package that is held against the samples; None takes the data's.

    Raises:
        DataError: Missing, empty, corrupt or inconsistent data.
    """
    samples, indices, task = data.samples(data.split_of(name)), data.chosen(name), data.recipe.task
    module = INPUTS[given.spec.kind]
    if facts is None and task is not None:
        facts = TASKS[task.kind].facts(samples.columns, task, module.told(given))
    return Split(
        samples=module.prepare(samples, given=given, folder=data.folder),
        indices=indices,
        fingerprint=hashlib.sha256(samples.fingerprint.encode() + indices.astype("<i8").tobytes()).hexdigest(),
        given=given,
        task=task,
        facts=facts,
        asked=data.section.input if augment and data.section.input.kind == given.spec.kind else None,
    )


def data_fingerprint(data: Data) -> str:
    """SHA-256 over what training, selection and calibration look at; the test split is not opened for it."""
    digest = hashlib.sha256()
    for name in ("train", "val"):
        digest.update(data.samples(name).fingerprint.encode() + data.chosen(name).astype("<i8").tobytes())
    return digest.hexdigest()


# -- the input --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingExamples:
    """What an input may look at where it has to decide for itself: see inputs.Examples."""

    data: Data
    columns: dict[str, Column]

    @property
    def in_memory(self) -> bool:
        return self.data.samples("train").in_memory

    def __len__(self) -> int:
        return len(self.data.chosen("train"))

    def read(self, most: int | None = None) -> Records:
        samples, indices = self.data.samples("train"), self.data.chosen("train")
        if most is not None and samples.sequential:
            indices = np.sort(fair_order(samples, indices, self.data.recipe)[:most])
        return samples.read(indices[:most], only=tuple(self.columns))


def resolve_input(data: Data, *, model: ModelConfig | None = None, asked: Any = None) -> Resolved:
    """What the recipe says, over what the model's publisher says, over what the training data say.

    Args:
        data: Of the recipe.
        model: Whose publisher; None takes the recipe's.
        asked: Instead of the recipe's `data.input`.

    Raises:
        DataError: Neither says enough.
        RecipeError: The recipe contradicts the publisher, or itself.
    """
    asked = asked or data.section.input
    model = model or data.recipe.model
    said = published(model).of(asked.kind) if model else {}
    module = INPUTS[asked.kind]
    task: Any = data.recipe.task
    columns = input_columns(data.samples("train").columns, kind=asked.kind, task=task)
    options = {"writes": True} if task is not None and writes(task.kind) else {}
    if options and not hasattr(module, "decode"):
        raise RecipeError(
            f"data.input.kind: the task {task.kind} writes, and {asked.kind} cannot be written",
            hint="set data.input.kind to text",
        )
    return Resolved(*module.resolve(asked, TrainingExamples(data, columns), published=said, **options))
