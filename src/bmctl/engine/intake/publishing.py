"""The end of every import: held against the recipe's data, saved, its evaluation filed, its notes told."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from bmctl.core.evaluation import Evaluation
from bmctl.engine.context import StageContext
from bmctl.engine.evaluation import appraise
from bmctl.engine.loading.data import data_fingerprint, open_split
from bmctl.errors import DataError
from bmctl.inputs import Resolved
from bmctl.package import GraphFile, Manifest, ModelPackage, save_package
from bmctl.recipe import recipe_yaml
from bmctl.tasks import TASKS

STAGE = "import"


def publish(
    context: StageContext,
    manifest: Manifest,
    evaluation: Evaluation | None,
    *,
    target: Any,
    model: nn.Module | None = None,
    graphs: Mapping[str, GraphFile] | None = None,
    files: Mapping[str, bytes] | None = None,
) -> ModelPackage:
    """Save the package, file its evaluation, and say what was noted and done."""
    for text in manifest.notes:
        context.emit({"event": "note", "stage": STAGE, "text": text})
    package = save_package(
        target,
        manifest=manifest,
        recipe_yaml=recipe_yaml(context.recipe),
        model=model,
        graphs=graphs,
        files=files,
        overwrite=context.overwrite,
    )
    appraise.file_score(context, package, evaluation, backend="eager" if graphs is None else "onnxruntime")
    context.emit({"event": "stage_done", "stage": STAGE, "package": str(target), **package.manifest.metrics})
    return package


def check_told(context: StageContext, told: Mapping[str, Any], *, given: Resolved, source: str) -> Any:
    """Hold what a model was told against what the recipe's data say; returns the data's facts.

    Raises:
        DataError: They differ, as in the number of classes.
    """
    split = open_split(context.data, name="val", given=given)
    task: Any = TASKS[split.task.kind]
    of_data = task.told(split.facts)
    for name, found in of_data.items():
        if name in told and told[name] != found:
            what = name.removeprefix("num_").replace("_", " ")
            raise DataError(
                f"{source} tells {told[name]} {what} apart; the recipe's data has {found}",
                hint="to train a new head on it, set model.pretrained: true in the recipe and run: bmctl train",
            )
    return split.facts


def recorded(context: StageContext) -> dict[str, Any]:
    """What a manifest says of the recipe's task and data."""
    task = context.recipe.task
    assert task is not None
    return {"task": task.model_dump(mode="json"), "data_fingerprint": data_fingerprint(context.data)}
