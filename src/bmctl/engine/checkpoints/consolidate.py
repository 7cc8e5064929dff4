"""One model of a checkpoint, whatever number of processes wrote it: what `bmctl import` makes a package of.

Which weights: those of the best evaluation so far, where the training keeps them; else those of the checkpoint's own
step, averaged where the training averages. So a package of the last checkpoint is what the training would end with.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError
from torch import nn

from bmctl.engine.checkpoints.checkpoint import INDEX, STATE, Checkpoint, open_checkpoint
from bmctl.errors import PackageError
from bmctl.inputs import InputSpec, Resolved
from bmctl.models import ModelSpec
from bmctl.package import Structure
from bmctl.recipe import Recipe
from bmctl.restore import restored
from bmctl.schema import Many, Signature, Strict
from bmctl.tasks import TASKS


class About(Strict):
    """What a checkpoint's manifest says, under `about`, of the model that is trained.

    Attributes:
        model: How to build it.
        parts: Its graphs, as they will be exported.
        input: How samples become what it takes; `files` are those that the input needs, such as a tokenizer.
        history: Compression steps that it went through before this training.
        recipe: The run's, resolved, as JSON.
    """

    model: ModelSpec
    parts: dict[str, Signature]
    input: InputSpec
    files: dict[str, str] = Field(default_factory=dict)
    task: dict[str, Any] | None = None
    facts: dict[str, Any] | None = None
    data_fingerprint: str | None = None
    history: Many[Structure] = ()
    recipe: dict[str, Any] | None = None

    @property
    def given(self) -> Resolved:
        """How samples become what the model takes."""
        return Resolved(self.input, {name: text.encode() for name, text in self.files.items()})

    def to_json(self) -> dict[str, Any]:
        """For the `about` of a checkpoint's manifest."""
        return self.model_dump(mode="json")


def is_checkpoint(path: Path) -> bool:
    """Whether `path` is, or was before it was damaged, the directory of a checkpoint, or a link to one."""
    named = re.fullmatch(r"step-\d{8,}|latest", path.name) is not None
    return path.is_dir() and (named or (path / INDEX).is_file() or (path / STATE).is_file())


def read_about(found: Checkpoint) -> About:
    """What a checkpoint says of its model.

    Raises:
        PackageError: Nothing, or what cannot be.
    """
    if not found.manifest.about:
        raise PackageError(
            f"{found.path} does not say of which model it is", hint="finish the training: bmctl train --resume -o RUN"
        )
    try:
        return About.model_validate_json(json.dumps(found.manifest.about))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in ("about", *first["loc"]))
        raise PackageError(f"{found.path / 'manifest.json'}: {where}: {first['msg']}") from error


def read_recipe(about: About) -> Recipe | None:
    """The recipe of the training.

    Raises:
        PackageError: It is none.
    """
    try:
        return Recipe.model_validate_json(json.dumps(about.recipe)) if about.recipe is not None else None
    except ValidationError as error:
        raise PackageError(f"the checkpoint's recipe is none: {error.errors()[0]['msg']}") from error


def task_of(about: About) -> tuple[Any, Any]:
    """The Config of the task that was trained for, and its facts.

    Raises:
        PackageError: There is no such task, or they are not its own.
    """
    try:
        task = TASKS[(about.task or {})["kind"]]
        return task.Config.model_validate_json(json.dumps(about.task)), task.Facts.model_validate(about.facts)
    except (KeyError, ValidationError) as error:
        raise PackageError(f"the checkpoint does not say for which task it was trained: {error}") from error


def load_model(found: Checkpoint, about: About) -> tuple[nn.Module, str]:
    """The model, on the CPU, in eval mode; and which weights it has, in words.

    Raises:
        PackageError: The checkpoint's tensors are not those of the model that it names.
    """
    model = restored(about.model, about.history, where=found.path)
    kind = next(kind for kind in ("best", "ema", "model") if kind == "model" or found.names(kind))
    try:
        model.load_state_dict({name: found.read(kind, name) for name in found.names(kind)}, strict=True)
    except (RuntimeError, ValueError, TypeError) as error:
        raise PackageError(f"{found.path} does not fit the model that it names: {error}") from error
    return model.eval(), _words(found, kind)


def open_model(path: Path) -> tuple[About, nn.Module, str]:
    """Verify a checkpoint; what it says of its model, the model, and which weights it has.

    Raises:
        PackageError: It is damaged, or does not hold what a package needs.
    """
    found = open_checkpoint(path)
    about = read_about(found)
    return about, *load_model(found, about)


def _words(found: Checkpoint, kind: str) -> str:
    manifest = found.manifest
    step = f"step {manifest.step} of {manifest.num_steps}"
    if kind == "best":
        return f"{step}; its weights are the best so far, of step {manifest.best_step}"
    average = "the average of the weights" if kind == "ema" else "the weights"
    known = ", the best so far" if manifest.best_step == manifest.step else ""
    return f"{step}; its weights are {average} of that step{known}"
