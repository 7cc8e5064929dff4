"""The task's metric on anything that runs its graphs: eager modules, ONNX files or engines.

What is worth an artifact is read once: the result, with every sample's counts, is kept in RUN/evaluations.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from bmctl import store
from bmctl.core import scores
from bmctl.core.evaluation import Evaluation
from bmctl.core.runner import Batched, Bounds, Closing, Runner
from bmctl.engine.artifacts.deployed import Deployed
from bmctl.engine.artifacts.finding import find_source
from bmctl.engine.artifacts.opening import backend_of, open_parts
from bmctl.engine.context import StageContext
from bmctl.engine.loading.arrays import array_batches
from bmctl.engine.loading.data import Data, open_split
from bmctl.engine.loading.split import Split
from bmctl.errors import DivergedError, GateError, UsageError
from bmctl.inputs import Resolved
from bmctl.package import ModelPackage
from bmctl.recipe import Recipe
from bmctl.tasks import TASKS

BATCH_SIZE = 64


def evaluate_parts(
    source: StageContext | Recipe,
    runners: Mapping[str, Runner],
    *,
    split: str,
    given: Resolved,
    facts: Mapping[str, Any] | None,
    artifact: str | None = None,
    backend: str = "eager",
) -> Evaluation:
    """Run the recipe's task metric on every sample of a split.

    Args:
        source: A stage's context, or a recipe alone, which keeps nothing and reports no progress.
        runners: The task's graphs by name; they may take batches of any size or of one only.
        split: ``val`` or ``test``.
        given: How samples become what the graphs take: the package's own, never the recipe's.
        facts: Of the task, as the package's manifest has them; None takes those of the recipe's data.
        artifact: SHA-256 that identifies what is evaluated; with it and a context the result is kept in
            RUN/evaluations, and the next call reads it there.
        backend: What runs them, such as ``eager`` or ``onnxruntime``.

    Raises:
        UsageError: The recipe has no task or no data.
        DivergedError: A module's outputs are not finite.
        GateError: A built artifact's outputs are not finite.
        InterruptedRunError: A signal came.
    """
    recipe = source if isinstance(source, Recipe) else source.recipe
    context = None if isinstance(source, Recipe) else source
    samples = _open(source, split, given, facts=facts)
    key = None
    if context is not None and artifact is not None:
        key = _key(recipe, samples, artifact, backend, split)
        known = _find(context, key)
        if known is not None:
            return known
    assert recipe.task is not None  # _open has checked
    checked = {part: _Finite(Batched(runner), backend) for part, runner in runners.items()}
    batches = _batches(samples, split=split, context=context)
    evaluation: Evaluation = TASKS[recipe.task.kind].evaluate(checked, batches, config=recipe.task, facts=samples.facts)
    if context is not None and key is not None:
        _keep(context, evaluation, key)
    return evaluation


def evaluate_artifact(context: StageContext, path: Path, *, split: str) -> Evaluation:
    """The task's metric on a package, a run's newest package, or a deployed artifact; read, not run, where known.

    Args:
        context: Its recipe says what data and which task.
        path: Directory of a run, of a package, or of an artifact below RUN/deploy.
        split: ``val`` or ``test``.

    Raises:
        PackageError: Missing, corrupt, or not one of these.
        UsageError: No input is recorded, as of a foreign graph, or the recipe has no task or no data.
        DependencyError: This machine cannot run it.
    """
    source: ModelPackage | Deployed = find_source(path)
    given = _input(source)
    backend = backend_of(source)
    known = find_evaluation(context, artifact=source.hash, backend=backend, split=split, given=given)
    if known is not None:
        return known
    with ExitStack() as stack:
        runners = open_parts(source, stack, device=context.group.device)
        return evaluate_parts(
            context,
            runners,
            split=split,
            given=given,
            facts=source.manifest.facts,
            artifact=source.hash,
            backend=backend,
        )


def find_evaluation(
    context: StageContext, *, artifact: str, backend: str, split: str, given: Resolved
) -> Evaluation | None:
    """What RUN/evaluations already knows about an artifact, so that it need not even be opened; None where nothing."""
    return _find(context, _key(context.recipe, _open(context, split, given), artifact, backend, split))


def keep_evaluation(
    context: StageContext, evaluation: Evaluation, *, artifact: str, backend: str, split: str, given: Resolved
) -> Path:
    """Write an evaluation into RUN/evaluations, such as one that was made before its package had a hash."""
    key = _key(context.recipe, _open(context, split, given), artifact, backend, split)
    return _keep(context, evaluation, key)


def _find(context: StageContext, key: scores.Key) -> Evaluation | None:
    path = scores.path_of(context.run, artifact=key.artifact, split=key.split)
    try:
        filed = scores.read(path, tasks=TASKS)
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        _note(context, f"{path} is not readable as an evaluation ({error}): evaluating again")
        return None
    if filed.key != key:
        names = [name for name in type(key).model_fields if getattr(key, name) != getattr(filed.key, name)]
        _note(context, f"{path} is of another {', '.join(names)}: evaluating again")
        return None
    return filed.evaluation


def _keep(context: StageContext, evaluation: Evaluation, key: scores.Key) -> Path:
    path = scores.path_of(context.run, artifact=key.artifact, split=key.split)
    path.parent.mkdir(parents=True, exist_ok=True)
    store.write_atomic(path, scores.pack(evaluation, key=key).model_dump_json().encode())
    return path


def _open(
    source: StageContext | Recipe, split: str, given: Resolved, *, facts: Mapping[str, Any] | None = None
) -> Split:
    data = Data(source) if isinstance(source, Recipe) else source.data
    recipe = data.recipe
    if recipe.task is None or recipe.data is None:
        raise UsageError(
            f"there is nothing to evaluate on: recipe {recipe.name!r} has no {'task' if recipe.data else 'data'}",
            hint="give a recipe with both: --recipe RECIPE",
        )
    known = TASKS[recipe.task.kind].Facts.model_validate(facts) if facts is not None else None
    return open_split(data, name=split, given=given, facts=known)


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
        input=samples.given.spec.model_dump(mode="json"),
    )


def _input(source: ModelPackage | Deployed) -> Resolved:
    given = source.given
    if given is None:
        raise UsageError(
            f"{source.path} does not record how samples become its input, as a foreign graph's does not: "
            "it has no metric",
            hint="measure its parity, latency and size: bmctl export",
        )
    return given


def _batches(samples: Split, *, split: str, context: StageContext | None) -> Iterator[dict[str, np.ndarray]]:
    done = 0
    for batch in array_batches(samples, batch_size=BATCH_SIZE):
        if context is not None:
            context.stop.check("evaluation")
        yield batch
        done = min(done + BATCH_SIZE, len(samples))
        if context is not None:
            text = f"evaluating on {split}"
            context.emit({"event": "progress", "text": text, "done": done, "total": len(samples)})


class _Finite(Closing):
    """A runner that refuses outputs with nan or inf: their metric would mean nothing. `state` is not looked at."""

    def __init__(self, runner: Runner, backend: str) -> None:
        self.signature, self.bounds = runner.signature, dict[str, Bounds](runner.bounds)
        self._runner, self._backend = runner, backend

    def run(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        outputs = self._runner.run(feed)
        for spec in self.signature.outputs:
            array = outputs[spec.name]
            if spec.role == "state" or array.dtype.kind != "f" or np.isfinite(array).all():
                continue
            bad = np.size(array) - int(np.count_nonzero(np.isfinite(array)))
            message = f"{bad} of {np.size(array)} outputs of one batch are not finite on {self._backend}"
            if self._backend == "eager":
                raise DivergedError(message, hint="train with a lower learning rate: --set train.optimizer.lr=...")
            raise GateError(message, hint="fp16 overflows past 65504: cast to bf16 instead, or keep fp32")
        return outputs


def _note(context: StageContext, text: str) -> None:
    context.emit({"event": "note", "stage": "evaluate", "text": text})
