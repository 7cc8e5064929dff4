"""What must hold between the sections of a recipe; each section alone is checked by its own model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from bmctl.backends import BACKENDS
from bmctl.core.evaluation import SHARE, Metric, main_metric
from bmctl.fit import Fit
from bmctl.inputs import INPUTS
from bmctl.methods import METHODS
from bmctl.models import own
from bmctl.recipe.diagnosis import did_you_mean, own_models, shown
from bmctl.recipe.sections import ExportConfig, LaunchConfig, MeasureConfig, input_kind
from bmctl.recipe.yamlio import KeyPath
from bmctl.schema import BATCH, Span
from bmctl.tasks import TASKS

T = TypeVar("T")
Found = Iterator[tuple[KeyPath, str, str]]


def check_sections(data: Mapping[str, Any]) -> Found:
    """Contradictions in plain data whose sections may be wrong in themselves: what is not understood is passed over.

    Yields:
        Key path, message and hint.
    """
    yield from check_needs(data)
    yield from check_gates(data)
    yield from check_launch(data)
    yield from check_loops(data)
    yield from check_axes(data)
    yield from check_steps(data)
    yield from check_input(data)
    yield from check_infer(data)


def get(data: Mapping[str, Any], path: KeyPath, kind: type[T], default: T) -> T:
    """The value at `path` if there is one of that type, else `default`."""
    value: Any = data
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value if isinstance(value, kind) and not (kind is int and isinstance(value, bool)) else default


def has(data: Mapping[str, Any], key: str) -> bool:
    return data.get(key) is not None


def check_needs(data: Mapping[str, Any]) -> Found:
    """Sections that stand on others."""
    if has(data, "train") and not has(data, "data"):
        yield ("train",), "training needs a `data` section", "add `data: {source: bundled}`"
    if has(data, "train") and not has(data, "model"):
        yield ("train",), "training needs a `model` section", "add `model: bmctl:rescnn`"
    if has(data, "task") and not has(data, "data"):
        yield ("task",), "a task needs a `data` section", "add `data: {source: bundled}`, or remove the task"
    name = get(data, ("model", "name"), str, "")
    if name.startswith("bmctl:") and name not in own_models():
        message = f"must be one of {', '.join(own_models())}, got {shown(name)}"
        yield ("model", "name"), message, did_you_mean(name, own_models())
    elif name.startswith("bmctl:") and get(data, ("model", "pretrained"), bool, False):
        yield ("model", "pretrained"), f"{name} has no published weights", "set it to false, or name a timm: model"
    if name in own_models():
        for key, message, hint in own.problems(name, get(data, ("model", "args"), dict, {})):
            yield ("model", "args", key), message, hint


def check_gates(data: Mapping[str, Any]) -> Found:
    """Gates on what is not measured, or that nothing could pass."""
    gates = get(data, ("gates",), dict, {})
    if gates.get("min_speedup") is not None and not get(data, ("export", "baseline"), bool, True):
        message = "a speedup is against the uncompressed model, and `export.baseline` is false"
        yield ("gates", "min_speedup"), message, "remove the gate, or set export.baseline to true"
    by_name = get(data, ("gates", "metrics"), dict, {})
    if not has(data, "data"):
        for key in [key for key in ("max_drop", "metrics") if gates.get(key)]:
            message = "without a `data` section there is no metric" + (" that could drop" if key == "max_drop" else "")
            yield ("gates", key), message, "remove the gate, or add `data`"
    kind = get(data, ("task", "kind"), str, "classify")
    if kind not in TASKS:
        return
    metrics = TASKS[kind].METRICS
    limits: list[tuple[KeyPath, Metric, Mapping[str, Any]]] = [
        (("gates",), main_metric(TASKS[kind]), {"max_drop": gates.get("max_drop")})
    ]
    for name, limit in by_name.items():
        if limit == {}:
            yield ("gates", "metrics", name), "has no limit", f"give one: {name}: {{max_drop: 0.01}}"
        elif name in metrics:
            limits.append((("gates", "metrics", name), metrics[name], limit if isinstance(limit, Mapping) else {}))
        else:
            message = f"{kind} has no such metric; it has {', '.join(metrics)}"
            yield ("gates", "metrics", name), message, did_you_mean(str(name), metrics)
    for path, metric, limit in limits:
        yield from check_limits(path, metric, limit)


def check_limits(path: KeyPath, metric: Metric, limits: Mapping[str, Any]) -> Found:
    """The gates of one metric: those of a share lie in [0, 1], and there is something between them."""
    given = {
        key: float(limit)
        for key in ("min", "max", "max_drop")
        if isinstance(limit := limits.get(key), int | float) and not isinstance(limit, bool)
    }
    for key, limit in given.items():
        if metric.unit == SHARE and limit > 1:
            hint = f"{metric.name} is a fraction: write {limit / 100:g}" if limit <= 100 else ""
            yield (*path, key), f"must be at most 1, got {limits[key]!r}", hint
    if given.get("min", -math.inf) > given.get("max", math.inf):
        message = f"must be min <= max, got {limits['min']}, {limits['max']}"
        yield path, message, f"{metric.name}: {{min: {limits['max']}, max: {limits['min']}}}"


def check_launch(data: Mapping[str, Any]) -> Found:
    """Machines and processes that contradict each other."""
    low, high = (get(data, ("launch", "nodes", key), int, 1) for key in ("min", "max"))
    if low > high:
        yield ("launch", "nodes"), f"must be min <= max, got {low}, {high}", f"nodes: {{min: {low}, max: {low}}}"
    if high > 1 and not get(data, ("launch", "rendezvous"), str, ""):
        message = f"{high} machines must know where to meet"
        yield ("launch", "nodes"), message, "add launch.rendezvous: HOST:PORT, the same on all of them"
    if get(data, ("launch", "cpu_offload"), bool, False) and get(data, ("launch", "strategy"), str, "") == "ddp":
        message = "ddp keeps the whole model on each device; only fsdp can offload it"
        yield ("launch", "cpu_offload"), message, "set launch.strategy to fsdp"


def check_loops(data: Mapping[str, Any]) -> Found:
    """The training loop of `train`, and those that recover a compression step."""
    loops: list[tuple[KeyPath, Mapping[str, Any]]] = []
    if isinstance(data.get("train"), Mapping):
        loops.append((("train",), data["train"]))
    for i, step in enumerate(get(data, ("compress",), list, [])):
        if isinstance(step, Mapping) and isinstance(step.get("recover"), Mapping):
            loops.append((("compress", i, "recover", "fit"), get(step, ("recover", "fit"), dict, {})))
    for path, fit in loops:
        yield from check_loop(path, fit, data)


def check_loop(path: KeyPath, fit: Mapping[str, Any], data: Mapping[str, Any]) -> Found:
    """One loop: every number of processes must share its batch evenly, in as many parts as it accumulates."""
    nproc = get(data, ("launch", "nproc"), int, LaunchConfig().nproc)
    low, high = (get(data, ("launch", "nodes", key), int, 1) for key in ("min", "max"))
    batch_size = 0 if fit.get("batch_size") == "auto" else get(fit, ("batch_size",), int, 64)
    parts = get(fit, ("accumulate",), int, Fit().accumulate)
    worlds = range(low * nproc, high * nproc + 1, nproc) if 1 <= low <= high <= 1024 and 1 <= nproc <= 1024 else ()
    unequal = [world for world in worlds if parts >= 1 and batch_size >= 1 and batch_size % (world * parts)]
    if unequal:
        shares = math.lcm(*worlds) * parts
        by = (
            f"launch.nproc = {unequal[0]} processes"
            if high == 1
            else f"{unequal[0]} processes, which launch.nodes allows"
        )
        message = f"{batch_size} samples per step do not divide by {by}" + (
            f" of {parts} parts each" if parts > 1 else ""
        )
        yield (*path, "batch_size"), message, f"take {max(1, batch_size // shares) * shares}"
    if get(fit, ("precision",), str, "") == "fp16" and get(data, ("launch", "device"), str, "") == "cpu":
        message = "fp16 needs a GPU: a CPU emulates it, slower than fp32"
        yield (*path, "precision"), message, "set it to auto"
    if get(fit, ("precision",), str, "") == "tf32" and get(data, ("launch", "device"), str, "") == "cpu":
        yield (*path, "precision"), "tf32 is a format of NVIDIA GPUs, and launch.device is cpu", "set it to auto"


def check_axes(data: Mapping[str, Any]) -> Found:
    """Sizes that an engine is built for."""
    axes = {BATCH: {}} | get(data, ("export", "axes"), dict, {})
    for axis, span in axes.items():
        low, best, high = (get(axes, (axis, key), int, getattr(Span(), key)) for key in ("min", "opt", "max"))
        if isinstance(span, Mapping) and not low <= best <= high:
            message = f"must be min <= opt <= max, got {low}, {best}, {high}"
            yield ("export", "axes", axis), message, f"{axis}: {{min: 1, opt: {max(low, 1)}, max: {max(low, high)}}}"
    low, high = (get(axes, (BATCH, key), int, getattr(Span(), key)) for key in ("min", "max"))
    measured = get(data, ("export", "measure", "batch_size"), int, MeasureConfig().batch_size)
    backends = get(data, ("export", "backends"), list, list(ExportConfig().backends))
    names = [str(backend.get("name")) for backend in backends if isinstance(backend, dict)]
    engines = [name for name in names if name in BACKENDS and BACKENDS[name].PROFILED]
    if engines and low <= high and not low <= measured <= high:
        message = f"{measured} is outside the batch profile {low} to {high} that {engines[0]} builds for"
        yield ("export", "measure", "batch_size"), message, "set export.axes.batch.max or export.measure.batch_size"


def check_steps(data: Mapping[str, Any]) -> Found:
    """The chain of compression steps."""
    steps = get(data, ("compress",), list, [])
    seen: dict[str, int] = {}
    graph_step = ""
    for i, step in enumerate(steps):
        method = step.get("method") if isinstance(step, dict) else None
        if not isinstance(method, str) or method not in METHODS:
            continue
        name = get(step, ("name",), str, method)
        if name in seen:
            message = f"a second step named {name!r}, the first is compress.{seen[name]}"
            yield ("compress", i), message, f"give it a name of its own: {{method: {method}, name: {name}-2}}"
        elif name in ("train", "import"):
            yield ("compress", i, "name"), f"{name!r} is the name of a stage", "take another"
        seen.setdefault(name, i)
        if METHODS[method].LEVEL == "graph":
            graph_step = graph_step or method
        elif graph_step:
            message = f"{method} works on the model's weights and cannot follow {graph_step}, which works on its graph"
            yield ("compress", i), message, f"move it before {graph_step}"
        if METHODS[method].CALIBRATES and not has(data, "data"):
            yield ("compress", i), f"{method} needs a `data` section to calibrate with", "add `data: {source: bundled}`"
        if step.get("recover") is not None and not has(data, "data"):
            yield ("compress", i, "recover"), "recovery is training and needs a `data` section", "add one"


def check_input(data: Mapping[str, Any]) -> Found:
    """Numbers of the input that do not fit together."""
    path: KeyPath = ("data", "input")
    given = get(data, path, dict, {})
    module = INPUTS.get(str(given.get("kind") or input_kind(get(data, ("data", "source"), dict, {}))))
    for key, message, hint in module.check(given) if module is not None else ():
        yield (*path, key), message, hint


def check_infer(data: Mapping[str, Any]) -> Found:
    """An unknown backend to infer with."""
    backend = get(data, ("infer", "backend"), str, "auto")
    choices = ["auto", "eager", *BACKENDS]
    if backend not in choices:
        message = f"must be one of {', '.join(choices)}, got {shown(backend)}"
        yield ("infer", "backend"), message, did_you_mean(backend, choices)
