"""What decides what the steps of a training do: whose checkpoints it may go on from, and its package's key."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from bmctl.engine.checkpoints.state import Identity
from bmctl.engine.training.training import Training
from bmctl.errors import RecipeError
from bmctl.fit import Distill, Fit
from bmctl.recipe import Recipe

_FREE = {"keep_checkpoints", "checkpoint_every_steps", "async_checkpoints", "max_time_s", "compile", "grace_s"}
"""Settings of Fit that do not change what the steps do, and may differ when a run is resumed."""


def training_key(recipe: Recipe, *, data_fingerprint: str, start: str | None = None) -> str:
    """SHA-256 of everything that a training depends on, with the hash of the package it starts from: its key."""
    fit = recipe.train
    if fit is None:
        raise RecipeError(f"recipe {recipe.name!r} has no train section", hint="add one: train: {epochs: 10}")
    return _digest(_settings(recipe, fit, "train", recipe.seed, None, start or "") | {"data": data_fingerprint})


def identity_of(training: Training) -> Identity:
    """What a checkpoint of this training belongs to."""
    return Identity(
        optimizer=training.fit.optimizer.name,
        data_fingerprint=_digest([training.train.fingerprint, training.val.fingerprint]),
        settings=_settings(
            training.context.recipe,
            training.fit,
            training.stage,
            training.seed,
            training.distill,
            training.inputs_hash,
        ),
    )


def _settings(
    recipe: Recipe, fit: Fit, stage: str, seed: int, distill: Distill | None, inputs_hash: str
) -> dict[str, Any]:
    """What decides, with the data, what the steps do."""
    data = recipe.data.model_dump(mode="json", include={"input"}) if recipe.data else None
    return {
        "stage": stage,
        "seed": seed,
        "model": recipe.model.model_dump(mode="json") if recipe.model else None,
        "data": data,
        "task": recipe.task.model_dump(mode="json") if recipe.task else None,
        "fit": fit.model_dump(mode="json", exclude=_FREE),
        "distill": distill.model_dump(mode="json") if distill else None,
        "inputs": inputs_hash,
    }


def _digest(value: object) -> str:
    """SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
