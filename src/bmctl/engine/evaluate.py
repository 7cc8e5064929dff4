"""The task's metric on anything that maps arrays to arrays: eager module, ONNX file or engine.

What is worth an artifact is read once: the result, with every sample's score, is kept in RUN/evaluations.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from bmctl import store
from bmctl.backends import Runner
from bmctl.engine import scores
from bmctl.engine.context import StageContext
from bmctl.engine.signals import Stop, interrupted
from bmctl.errors import DivergedError, GateError, UsageError
from bmctl.recipe import Recipe
from bmctl.schema import Emit, Preprocess
from bmctl.tasks import TASKS, Evaluation, Part

if TYPE_CHECKING:
    from bmctl.engine.data import Split

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


def runner_part(runner: Runner, *, min_batch: int = 1) -> Part:
    """An open artifact's first input and first output as a function of arrays.

    Args:
        min_batch: Smallest batch that the artifact takes: a shorter one repeats its last sample, and the surplus
            outputs are cut off.
    """
    source, target = runner.inputs[0].name, runner.outputs[0].name

    def part(x_BCHW: np.ndarray) -> np.ndarray:
        num = len(x_BCHW)
        if num < min_batch:
            x_BCHW = np.concatenate([x_BCHW, np.repeat(x_BCHW[-1:], min_batch - num, axis=0)])
        return runner.run({source: x_BCHW})[target][:num]

    return part


def evaluate_part(
    source: StageContext | Recipe,
    part: Part,
    *,
    split: str,
    preprocess: Preprocess,
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
    if context is not None and artifact is not None:
        known = find_evaluation(context, artifact=artifact, backend=backend, split=split, preprocess=preprocess)
        if known is not None:
            return known
    evaluation = _evaluate(recipe, part, split, preprocess, backend, batch_size, context)
    if context is not None and artifact is not None:
        keep_evaluation(context, evaluation, artifact=artifact, backend=backend, split=split, preprocess=preprocess)
    return evaluation


def find_evaluation(
    context: StageContext, *, artifact: str, backend: str, split: str, preprocess: Preprocess
) -> Evaluation | None:
    """What RUN/evaluations already knows about an artifact, so that it need not even be opened; None where nothing."""
    path = scores.path_of(context.run, artifact=artifact, split=split)
    key = _key(context.recipe, artifact, backend, split, preprocess)
    try:
        scored = scores.read(path)
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        _note(context.emit, f"{path}: not readable as an evaluation ({error}); evaluating again")
        return None
    if scored.key != key:
        names = [name for name in type(key).model_fields if getattr(key, name) != getattr(scored.key, name)]
        _note(context.emit, f"{path}: is of another {', '.join(names)}; evaluating again")
        return None
    return scores.unpack(scored)


def keep_evaluation(
    context: StageContext, evaluation: Evaluation, *, artifact: str, backend: str, split: str, preprocess: Preprocess
) -> Path:
    """Write an evaluation into RUN/evaluations, such as one that was made before its package had a hash."""
    key = _key(context.recipe, artifact, backend, split, preprocess)
    path = scores.path_of(context.run, artifact=artifact, split=split)
    path.parent.mkdir(exist_ok=True)
    store.write_atomic(path, scores.pack(evaluation, key=key).model_dump_json().encode())
    return path


def _evaluate(
    recipe: Recipe,
    part: Part,
    split: str,
    preprocess: Preprocess,
    backend: str,
    batch_size: int,
    context: StageContext | None,
) -> Evaluation:
    from bmctl.engine.data import open_split

    if recipe.task is None or recipe.data is None:
        raise UsageError(
            f"there is nothing to evaluate on: recipe {recipe.name!r} has no {'task' if recipe.data else 'data'}",
            hint="give a recipe with both: --recipe RECIPE",
        )
    samples = open_split(recipe, name=split, preprocess=preprocess)
    stop = context.stop if context else None
    emit = context.emit if context else None
    task = TASKS[recipe.task.kind]
    batches = _batches(samples, batch_size=batch_size, split=split, stop=stop, emit=emit)
    return task.evaluate({"model": _finite(part, backend)}, batches, config=recipe.task)


def _batches(
    samples: Split, *, batch_size: int, split: str, stop: Stop | None, emit: Emit | None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    from bmctl.engine.data import array_batches

    done = 0
    for x, y in array_batches(samples, batch_size=batch_size):
        if stop is not None and stop.requested is not None:
            raise interrupted(stop.requested, "stopped during evaluation; run the same command again")
        yield x, y
        done += len(y)
        if emit is not None:
            emit({"event": "progress", "text": f"evaluating on {split}", "done": done, "total": len(samples)})


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


def _key(recipe: Recipe, artifact: str, backend: str, split: str, preprocess: Preprocess) -> scores.Key:
    from bmctl.engine.data import data_fingerprint

    if recipe.task is None or recipe.data is None:
        raise UsageError(f"recipe {recipe.name!r} has no data or no task", hint="give one: --recipe RECIPE")
    return scores.Key(
        artifact=artifact,
        backend=backend,
        data=data_fingerprint(recipe),
        split=split,
        limit=getattr(recipe.data, split).limit,
        task=recipe.task.model_dump(mode="json"),
        preprocess=preprocess.model_dump(mode="json"),
    )


def _note(emit: Emit, text: str) -> None:
    emit({"event": "note", "stage": "evaluate", "text": text})
