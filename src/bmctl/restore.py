"""From a manifest back to a module: built by its spec, brought to its structure step by step, without pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from bmctl import models
from bmctl.errors import BmctlError, PackageError, RecipeError, UnsupportedError
from bmctl.methods import METHODS
from bmctl.models import ModelSpec
from bmctl.package import ModelPackage, Structure
from bmctl.weights import load_weights

if TYPE_CHECKING:
    from torch import nn

_TOLD = ("torch", "torchvision", "timm", "transformers")
_WRONG = (TypeError, ValueError, RuntimeError, KeyError, IndexError, AttributeError, AssertionError)
"""What constructors and methods raise on arguments that are not theirs."""


def load_model(package: ModelPackage) -> nn.Module:
    """Build the package's module, replay its structure, load its weights strictly; on the CPU, in eval mode.

    Raises:
        UnsupportedError: The package is frozen.
        PackageError: Weights and model do not fit, or are not finite, or the file is not safetensors.
    """
    manifest = package.manifest
    if manifest.frozen or manifest.model is None:
        parent = f"its parent {manifest.parent[:12]}" if manifest.parent else "the model that it was exported from"
        raise UnsupportedError(
            f"{package.path} is frozen: it holds a graph (made by {manifest.stage}), which has no weights to train on",
            hint=f"start from {parent}",
        )
    model = restored(manifest.model, manifest.history, where=package.path, versions=manifest.versions)
    load_weights(model, package.weights, aliases=manifest.aliases)
    return model.eval()


def restored(
    spec: ModelSpec, history: Sequence[Structure], *, where: Path, versions: Mapping[str, str] | None = None
) -> nn.Module:
    """A module with the structure that some compression steps left; its weights are to be loaded.

    Args:
        spec: How to build it.
        history: The steps, oldest first.
        where: What is restored, for messages.
        versions: Of the libraries that it was made with.

    Raises:
        PackageError: It cannot be built here, or a step is not what a module can go through.
    """
    try:
        model = models.build(spec)
    except (RecipeError, *_WRONG) as error:
        made = ", ".join(f"{name} {version}" for name, version in (versions or {}).items() if name in _TOLD)
        raise PackageError(
            f"{where}: its model {spec.name} cannot be built here: {error}",
            hint=f"it was made with {made}" if made else "",
        ) from error
    for structure in history:
        _replay(model, structure, where=where)
    return model


def _replay(model: nn.Module, structure: Structure, *, where: Path) -> None:
    name = structure.step.get("method")
    method = METHODS.get(name) if isinstance(name, str) else None
    if method is None or method.LEVEL != "module":
        raise PackageError(f"{where}: its history names the step {name!r}, which no module can go through")
    try:
        config = method.Config.model_validate_json(json.dumps(structure.step))
        method.restore(model, config, structure.meta)
    except BmctlError:
        raise
    except (ValidationError, *_WRONG) as error:
        raise PackageError(f"{where}: the step {name} of its history cannot be replayed: {error}") from error
