"""The task's metric on anything that maps arrays to arrays: eager module, ONNX file or engine.

What is worth an artifact is read once: the result, with every sample's score, is kept in RUN/evaluations.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bmctl import store
from bmctl.core import scores
from bmctl.core.evaluation import Evaluation
from bmctl.core.runner import Batched, Runner
from bmctl.engine.artifacts.deployed import open_deployed, open_runner
from bmctl.engine.artifacts.reference import open_graph
from bmctl.engine.context import StageContext
from bmctl.engine.loading.arrays import array_batches
from bmctl.engine.loading.data import Data, open_split
from bmctl.engine.loading.split import Split
from bmctl.errors import DivergedError, GateError, UsageError
from bmctl.inputs import InputSpec, Resolved
from bmctl.package import find_package, load_model
from bmctl.processes.signals import interrupted
from bmctl.recipe import Recipe
from bmctl.tasks import TASKS, Part

BATCH_SIZE = 64


def eager_part(model: nn.Module, device: torch.device | str = "cpu") -> Part:
    """A module as a function of arrays, in fp32 and without gradients; it is moved to `device` and put in eval mode."""
    model.to(device).eval()

    def part(x_BCHW: np.ndarray) -> np.ndarray:
        model.eval()
        with torch.inference_mode():
            outputs = model(torch.from_numpy(x_BCHW).to(device))
        return outputs.float().cpu().numpy()

    return part


def runner_part(runner: Runner) -> Part:
    """An open artifact's first input and first output as a function of arrays, of any number of samples."""
    source, target = runner.signature.inputs[0].name, runner.signature.outputs[0].name
    batched = Batched(runner)

    def part(x_BCHW: np.ndarray) -> np.ndarray:
        return batched.run({source: x_BCHW})[target]

    return part


def evaluate_part(
    source: StageContext | Recipe,
    part: Part,
    *,
    split: str,
    preprocess: InputSpec,
    artifact: str | None = None,
    backend: str = "eager",
    batch_size: int = BATCH_SIZE,
) -> Evaluation:
    """Run the recipe's task metric on every sample of a split.

    Args:
        source: A stage's context, or a recipe alone, which keeps nothing and reports no progress.
        part: float32 [n, C, H, W] to the model's outputs [n, ...].
        split: ``val`` or ``test``.
        preprocess: The package's own, never the recipe's.
        artifact: SHA-256 that identifies what is evaluated; with it and a context the result is kept in
            RUN/evaluations, and the next call reads it there.
        backend: What runs the part, such as ``eager`` or ``onnxruntime``.

    Raises:
        UsageError: The recipe has no task or no data.
        DivergedError: A module's outputs are not finite.
        GateError: A built artifact's outputs are not finite.
        InterruptedRunError: A signal came.
    """
    recipe = source if isinstance(source, Recipe) else source.recipe
    context = None if isinstance(source, Recipe) else source
    samples = _open(source, split, preprocess)
    key = None
    if context is not None and artifact is not None:
        key = _key(recipe, samples, artifact, backend, split)
        known = _find(context, key)
        if known is not None:
            return known
    assert recipe.task is not None  # _open has checked
    part = _finite(part, backend)
    batches = _batches(samples, batch_size=batch_size, split=split, context=context)
    evaluation: Evaluation = TASKS[recipe.task.kind].evaluate({"model": part}, batches, config=recipe.task)
    if context is not None and key is not None:
        _keep(context, evaluation, key)
    return evaluation


def evaluate_artifact(context: StageContext, source: Path, *, split: str) -> Evaluation:
    """The task's metric on a package, a run's newest package, or a deployed artifact; read, not run, where known.

    Args:
        context: Its recipe says what data and which task.
        source: Directory of a run, of a package, or of an artifact below RUN/deploy.
        split: ``val`` or ``test``.

    Raises:
        PackageError: Missing, corrupt, or not one of these.
        UsageError: No preprocessing is recorded, as of a foreign graph, or the recipe has no task or no data.
        DependencyError: This machine cannot run it.
    """
    if _is_deployed(source):
        deployed = open_deployed(source)
        about = deployed.manifest
        options: dict[str, Any] = {"artifact": deployed.hash, "backend": about.backend, "split": split}
        preprocess = _preprocess(source, about.preprocess)
        known = find_evaluation(context, preprocess=preprocess, **options)
        if known is not None:
            return known
        with open_runner(deployed) as runner:
            return evaluate_part(context, runner_part(runner), preprocess=preprocess, **options)
    package = find_package(source)
    preprocess = _preprocess(package.path, package.manifest.preprocess)
    backend = "onnxruntime" if package.manifest.frozen else "eager"
    options = {"artifact": package.hash, "backend": backend, "split": split}
    known = find_evaluation(context, preprocess=preprocess, **options)
    if known is not None:
        return known
    if not package.manifest.frozen:
        part = eager_part(load_model(package), context.group.device)
        return evaluate_part(context, part, preprocess=preprocess, **options)
    with open_graph(package.graph) as runner:
        return evaluate_part(context, runner_part(runner), preprocess=preprocess, **options)


def find_evaluation(
    context: StageContext, *, artifact: str, backend: str, split: str, preprocess: InputSpec
) -> Evaluation | None:
    """What RUN/evaluations already knows about an artifact, so that it need not even be opened; None where nothing."""
    return _find(context, _key(context.recipe, _open(context, split, preprocess), artifact, backend, split))


def keep_evaluation(
    context: StageContext, evaluation: Evaluation, *, artifact: str, backend: str, split: str, preprocess: InputSpec
) -> Path:
    """Write an evaluation into RUN/evaluations, such as one that was made before its package had a hash."""
    key = _key(context.recipe, _open(context, split, preprocess), artifact, backend, split)
    return _keep(context, evaluation, key)


def _find(context: StageContext, key: scores.Key) -> Evaluation | None:
    path = scores.path_of(context.run, artifact=key.artifact, split=key.split)
    try:
        scored = scores.read(path)
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        _note(context, f"{path} is not readable as an evaluation ({error}): evaluating again")
        return None
    if scored.key != key:
        names = [name for name in type(key).model_fields if getattr(key, name) != getattr(scored.key, name)]
        _note(context, f"{path} is of another {', '.join(names)}: evaluating again")
        return None
    return scores.unpack(scored)


def _keep(context: StageContext, evaluation: Evaluation, key: scores.Key) -> Path:
    path = scores.path_of(context.run, artifact=key.artifact, split=key.split)
    path.parent.mkdir(parents=True, exist_ok=True)
    store.write_atomic(path, scores.pack(evaluation, key=key).model_dump_json().encode())
    return path


def _open(source: StageContext | Recipe, split: str, preprocess: InputSpec) -> Split:
    data = Data(source) if isinstance(source, Recipe) else source.data
    recipe = data.recipe
    if recipe.task is None or recipe.data is None:
        raise UsageError(
            f"there is nothing to evaluate on: recipe {recipe.name!r} has no {'task' if recipe.data else 'data'}",
            hint="give a recipe with both: --recipe RECIPE",
        )
    return open_split(data, name=split, given=Resolved(preprocess))


def _key(recipe: Recipe, samples: Split, artifact: str, backend: str, split: str) -> scores.Key:
    assert recipe.task is not None
    assert recipe.data is not None  # _open has checked
    return scores.Key(
        artifact=artifact,
        backend=backend,
        data=samples.fingerprint,
        split=split,
        limit=getattr(recipe.data, split).limit,
        task=recipe.task.model_dump(mode="json"),
        preprocess=samples.given.spec.model_dump(mode="json"),
    )


def _is_deployed(source: Path) -> bool:
    """Whether a directory holds an artifact: its manifest says for which backend, a package's does not."""
    try:
        manifest = json.loads((source / store.MANIFEST).read_bytes())
    except (OSError, ValueError):
        return False  # find_package says what is wrong
    return isinstance(manifest, dict) and "backend" in manifest


def _preprocess(source: Path, preprocess: InputSpec | None) -> InputSpec:
    if preprocess is None:
        raise UsageError(
            f"{source} does not record how images become its input, as a foreign graph's does not: it has no metric",
            hint="measure its parity, latency and size: bmctl export",
        )
    return preprocess


def _batches(
    samples: Split, *, batch_size: int, split: str, context: StageContext | None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    done = 0
    for batch in array_batches(samples, batch_size=batch_size):
        if context is not None and context.stop.requested is not None:
            raise interrupted(context.stop.requested, "stopped during evaluation; run the same command again")
        yield batch["input"], batch["label"]
        done += len(batch["label"])
        if context is not None:
            text = f"evaluating on {split}"
            context.emit({"event": "progress", "text": text, "done": done, "total": len(samples)})


def _finite(part: Part, backend: str) -> Part:
    """The same part, refusing outputs with nan or inf: their metric would mean nothing."""

    def checked(x_BCHW: np.ndarray) -> np.ndarray:
        outputs = part(x_BCHW)
        bad = int(np.size(outputs) - np.count_nonzero(np.isfinite(outputs)))
        if not bad:
            return outputs
        message = f"{bad} of {np.size(outputs)} outputs of one batch are not finite on {backend}"
        if backend == "eager":
            raise DivergedError(message, hint="train with a lower learning rate: --set train.optimizer.lr=...")
        raise GateError(message, hint="fp16 overflows past 65504: cast to bf16 instead, or keep fp32")

    return checked


def _note(context: StageContext, text: str) -> None:
    context.emit({"event": "note", "stage": "evaluate", "text": text})
