"""What one package is worth on validation: metric, parameters, MACs, bytes, latency; for its manifest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bmctl.core.comparing import Sampled, interval
from bmctl.core.evaluation import Evaluation
from bmctl.engine.artifacts.reference import open_graph
from bmctl.engine.context import StageContext
from bmctl.engine.evaluation import measure
from bmctl.engine.evaluation.evaluate import eager_part, evaluate_part, keep_evaluation, runner_part
from bmctl.package import ModelPackage
from bmctl.schema import Preprocess
from bmctl.tasks import TASKS, Part

BATCH_SIZE = 16
ROUNDS = 7
"""For the log of a compression step; what ships is timed by the export, at the recipe's own batch and rounds."""


def has_metric(context: StageContext, preprocess: Preprocess | None) -> bool:
    """Whether there is something to evaluate on: a task, its data and the way from image to input."""
    return context.recipe.task is not None and context.recipe.data is not None and preprocess is not None


def metric_of(evaluation: Evaluation) -> dict[str, Any]:
    """An evaluation as a manifest records it: the task's main metric with its 95 % interval, and every metric."""
    task = TASKS[evaluation.task]
    metric = task.METRICS[evaluation.name]
    (low, high), by = interval(Sampled(evaluation, task), metric.name)
    return {
        "metric": metric.name,
        "better": metric.better,
        "unit": metric.unit,
        "value": float(evaluation.value),
        "low": low,
        "high": high,
        "interval": by,
        "baseline": float(evaluation.baseline),
        "num_samples": len(evaluation.counts),
        "values": {name: float(value) for name, value in evaluation.values.items()},
    }


def score_module(context: StageContext, model: nn.Module, *, preprocess: Preprocess) -> Evaluation:
    """The task's metric on validation, eagerly in fp32."""
    return evaluate_part(context, eager_part(model, context.group.device), split="val", preprocess=preprocess)


def score_graph(context: StageContext, graph: Path, *, preprocess: Preprocess) -> Evaluation:
    """The task's metric on validation, on ONNX Runtime."""
    with open_graph(graph) as runner:
        return evaluate_part(context, runner_part(runner), split="val", preprocess=preprocess, backend="onnxruntime")


def file_score(context: StageContext, package: ModelPackage, evaluation: Evaluation | None, *, backend: str) -> None:
    """Keep an evaluation that was made before its package had a hash, so that the report finds it."""
    preprocess = package.manifest.preprocess
    if evaluation is not None and preprocess is not None:
        keep_evaluation(context, evaluation, artifact=package.hash, backend=backend, split="val", preprocess=preprocess)


def module_numbers(
    context: StageContext, model: nn.Module, *, before: nn.Module | None, example: torch.Tensor
) -> dict[str, Any]:
    """Parameters, MACs and latency of a module, in rounds with the one it was made from.

    Args:
        model: On any device; it is moved to the stage's.
        before: The parent's module.
        example: float32 [1 or more, C, H, W].
    """
    device = context.group.device
    x = _batch(example).to(device)
    calls = {"model": _call(model.to(device).eval(), x)}
    if before is not None:
        calls["parent"] = _call(before.to(device).eval(), x)
    return {
        "num_params": measure.num_params(model),
        "num_nonzero": measure.num_nonzero(model),
        "macs": measure.macs(model, x),
        **_latencies(calls, runtime="eager"),
        "precision": "fp32",
    }


def graph_numbers(graph: Path, *, before: Path | None, example: torch.Tensor) -> dict[str, Any]:
    """The same of an ONNX file, on ONNX Runtime, in rounds with the graph it was made from."""
    x = _batch(example).numpy()
    paths = {"model": graph} | ({"parent": before} if before is not None else {})
    with _opened(paths) as parts:
        calls = {name: _feed(part, x) for name, part in parts.items()}
        found = _latencies(calls, runtime="onnxruntime")
    return {
        "num_params": measure.graph_num_params(graph),
        "macs": measure.graph_macs(graph),
        "size_bytes": measure.size_bytes(graph),
        **found,
    }


@contextmanager
def _opened(paths: Mapping[str, Path]) -> Iterator[dict[str, Part]]:
    with ExitStack() as stack:
        yield {name: runner_part(stack.enter_context(open_graph(path))) for name, path in paths.items()}


def _batch(example: torch.Tensor) -> torch.Tensor:
    """float32 [BATCH_SIZE, ...], the samples over and over."""
    return example.repeat(-(-BATCH_SIZE // len(example)), *(1 for _ in example.shape[1:]))[:BATCH_SIZE]


def _call(model: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    def call() -> None:
        with torch.inference_mode():
            model(x)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)

    return call


def _feed(part: Part, x: np.ndarray) -> Callable[[], object]:
    return lambda: part(x)


def _latencies(calls: Mapping[str, Callable[[], object]], *, runtime: str) -> dict[str, Any]:
    found = measure.latency(calls, rounds=ROUNDS)
    own = found["model"]
    detail: dict[str, Any] = {
        "runtime": runtime,
        "batch_size": BATCH_SIZE,
        "p50_ms": own.p50_ms,
        "p90_ms": own.p90_ms,
        "p99_ms": own.p99_ms,
    }
    if "parent" in found:
        detail["speedup_over_parent"] = found["parent"].p50_ms / own.p50_ms
    return {"latency_ms": own.p50_ms, "latency": detail}
