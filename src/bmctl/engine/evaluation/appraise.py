"""What one package is worth on validation: metric, parameters, MACs, bytes, latency; for its manifest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bmctl.core.comparing import Sampled, interval
from bmctl.core.evaluation import Evaluation
from bmctl.core.runner import Batched, Runner
from bmctl.engine.artifacts.graphrunner import open_graph
from bmctl.engine.artifacts.opening import open_model
from bmctl.engine.artifacts.recording import Call, replay, stretched
from bmctl.engine.context import StageContext
from bmctl.engine.evaluation import measure
from bmctl.engine.evaluation.evaluate import evaluate_parts, keep_evaluation
from bmctl.inputs import Resolved
from bmctl.package import Manifest, ModelPackage
from bmctl.tasks import TASKS

BATCH_SIZE = 16
ROUNDS = 7
"""For the log of a compression step; what ships is timed by the export, at the recipe's own batch and rounds."""


def has_metric(context: StageContext, given: Resolved | None) -> bool:
    """Whether there is something to evaluate on: a task, its data and the way from a sample to the input."""
    return context.recipe.task is not None and context.recipe.data is not None and given is not None


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


def score_module(context: StageContext, model: nn.Module, manifest: Manifest, given: Resolved) -> Evaluation:
    """The task's metric on validation, eagerly in fp32, of a model that is to be what the manifest says."""
    runners = open_model(model, manifest, device=context.group.device)
    return evaluate_parts(context, runners, split="val", given=given, facts=manifest.facts)


def score_graphs(context: StageContext, graphs: Mapping[str, Path], manifest: Manifest, given: Resolved) -> Evaluation:
    """The task's metric on validation, of its graphs on ONNX Runtime."""
    with ExitStack() as stack:
        runners = _opened(graphs, manifest, stack)
        return evaluate_parts(context, runners, split="val", given=given, facts=manifest.facts, backend="onnxruntime")


def file_score(context: StageContext, package: ModelPackage, evaluation: Evaluation | None, *, backend: str) -> None:
    """Keep an evaluation that was made before its package had a hash, so that the report finds it."""
    if evaluation is not None and package.given is not None:
        options = {"artifact": package.hash, "backend": backend, "split": "val"}
        keep_evaluation(context, evaluation, given=package.given, **options)


def module_numbers(
    context: StageContext, model: nn.Module, *, before: nn.Module | None, example: Mapping[str, torch.Tensor]
) -> dict[str, Any]:
    """Parameters, MACs and latency of a module, in rounds with the one it was made from.

    Args:
        model: On any device; it is moved to the stage's.
        before: The parent's module.
        example: What the model takes, in its order, of one sample or more.
    """
    device = context.group.device
    fields = [_batch(tensor).to(device) for tensor in example.values()]
    calls = {"model": _call(model.to(device).eval(), fields)}
    if before is not None:
        calls["parent"] = _call(before.to(device).eval(), fields)
    return {
        "num_params": measure.num_params(model),
        "num_nonzero": measure.num_nonzero(model),
        "macs": measure.macs(model, fields),
        **_latencies(context, calls, runtime="eager"),
        "precision": "fp32",
    }


def graph_numbers(
    context: StageContext,
    graphs: Mapping[str, Path],
    *,
    before: Mapping[str, Path],
    calls: list[Call],
    manifest: Manifest,
) -> dict[str, Any]:
    """The same of ONNX files, on ONNX Runtime, in rounds with the graphs that they were made from.

    Args:
        graphs: By part.
        before: The parent's.
        calls: Recorded ones: replayed for BATCH_SIZE samples, they are what is timed.
        manifest: Names the parts.
    """
    macs = [measure.graph_macs(graph) for graph in graphs.values()]
    with ExitStack() as stack:
        sides = {"model": graphs, "parent": before}
        opened = {side: _opened(paths, manifest, stack) for side, paths in sides.items()}
        runs = {
            side: _replay(runners, [stretched(call, BATCH_SIZE) for call in calls]) for side, runners in opened.items()
        }
        found = _latencies(context, runs, runtime="onnxruntime")
    return {
        "num_params": sum(measure.graph_num_params(graph) for graph in graphs.values()),
        "macs": None if None in macs else sum(each for each in macs if each is not None),
        "size_bytes": sum(measure.size_bytes(graph) for graph in graphs.values()),
        **found,
    }


def _opened(graphs: Mapping[str, Path], manifest: Manifest, stack: ExitStack) -> dict[str, Runner]:
    return {
        part: stack.enter_context(open_graph(path, signature=manifest.parts[part])) for part, path in graphs.items()
    }


def _replay(runners: Mapping[str, Runner], calls: list[Call]) -> Callable[[], object]:
    batched = {part: Batched(runner) for part, runner in runners.items()}
    return lambda: replay(batched, calls)


def _batch(example: torch.Tensor) -> torch.Tensor:
    """[BATCH_SIZE, ...], the samples over and over."""
    return example.repeat(-(-BATCH_SIZE // len(example)), *(1 for _ in example.shape[1:]))[:BATCH_SIZE]


def _call(model: nn.Module, fields: Sequence[torch.Tensor]) -> Callable[[], object]:
    def call() -> None:
        with torch.inference_mode():
            model(*fields)
        if fields[0].is_cuda:
            torch.cuda.synchronize(fields[0].device)

    return call


def _latencies(context: StageContext, calls: Mapping[str, Callable[[], object]], *, runtime: str) -> dict[str, Any]:
    found = measure.latency(calls, rounds=ROUNDS, check=partial(context.stop.check, "timing"))
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
