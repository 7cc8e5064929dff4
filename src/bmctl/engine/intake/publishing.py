"""The end of every import: held against the recipe's data, saved, its evaluation filed, its notes told."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from bmctl.core.evaluation import Evaluation
from bmctl.engine.context import StageContext
from bmctl.engine.evaluation import appraise
from bmctl.errors import DataError
from bmctl.package import Manifest, ModelPackage, save_package
from bmctl.recipe import recipe_yaml
from bmctl.schema import Preprocess

STAGE = "import"


def numbered(num_classes: int) -> tuple[str, ...]:
    """Stand-ins for unknown class names."""
    return tuple(f"class_{index}" for index in range(num_classes))


def publish(
    context: StageContext,
    manifest: Manifest,
    evaluation: Evaluation | None,
    *,
    target: Path,
    model: nn.Module | None = None,
    graph: Path | None = None,
    graph_data: Sequence[str] = (),
) -> ModelPackage:
    """Save the package, file its evaluation, and say what was noted and done."""
    for text in manifest.notes:
        context.emit({"event": "note", "stage": STAGE, "text": text})
    package = save_package(
        target,
        manifest=manifest,
        recipe_yaml=recipe_yaml(context.recipe),
        model=model,
        graph=graph,
        graph_data=graph_data,
        overwrite=context.overwrite,
    )
    appraise.file_score(context, package, evaluation, backend="eager" if graph is None else "onnxruntime")
    context.emit({"event": "stage_done", "stage": STAGE, "package": str(target), **package.manifest.metrics})
    return package


def check_data(
    context: StageContext, class_names: tuple[str, ...], *, preprocess: Preprocess | None, source: str
) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Hold the head against the recipe's data; returns the class names that count, and what the manifest records.

    Raises:
        DataError: The data has another number of classes.
    """
    recipe = context.recipe
    if recipe.data is None or preprocess is None:
        return class_names, {}
    from bmctl.engine.loading.data import data_fingerprint, open_split

    of_data = open_split(recipe, name="val", preprocess=preprocess).class_names
    if len(of_data) != len(class_names):
        raise DataError(
            f"{source} tells {len(class_names)} classes apart; the recipe's data has {len(of_data)} "
            f"({', '.join(of_data[:3])}{', ...' if len(of_data) > 3 else ''})",
            hint="to train a new head on it, set model.pretrained: true in the recipe and run: bmctl train",
        )
    task = recipe.task.model_dump(mode="json") if recipe.task is not None else None
    return of_data, {"task": task, "data_fingerprint": data_fingerprint(recipe)}
