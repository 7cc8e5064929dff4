"""Numbers: parameters, multiply-accumulates, bytes, latency, memory, and the machine they were taken on."""

from __future__ import annotations

import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bmctl.core import memory
from bmctl.core.graphsize import graph_macs, graph_num_params

__all__ = [
    "Latency",
    "graph_macs",
    "graph_num_params",
    "latency",
    "machine",
    "macs",
    "num_nonzero",
    "num_params",
    "peak_memory_bytes",
    "size_bytes",
    "throughput",
]

SETTLE_S = 0.05
"""Between two callables: ONNX Runtime's and OpenMP's threads spin on after a call, on the next one's cores."""

SHORTEST_S = 0.005
"""A round repeats a call until the clock has something to measure."""

_RECORDED = ("torch", "numpy", "onnx", "onnxruntime", "openvino", "tensorrt", "tensorrt-rtx-cu13", "nncf", "timm")


@dataclass(frozen=True)
class Latency:
    """Of one call; percentiles are over the rounds.

    Attributes:
        samples_ms: One per round, in the order of the rounds: rounds of one `latency` call can be paired.
    """

    p50_ms: float
    p90_ms: float
    p99_ms: float
    samples_ms: tuple[float, ...]


# -- modules ----------------------------------------------------------------------------------------


def num_params(model: nn.Module) -> int:
    """Elements of all parameters, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def num_nonzero(model: nn.Module) -> int:
    """Elements of all parameters that are not exactly zero."""
    return sum(int(torch.count_nonzero(parameter)) for parameter in model.parameters())


def macs(model: nn.Module, fields: Sequence[torch.Tensor]) -> int:
    """Multiply-accumulates of one sample's forward pass: convolutions, matrix products, attention.

    Args:
        model: Left in its mode.
        fields: What the model takes, by position, of one sample or more; the first sample is taken.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from bmctl.core.layers import evaluating

    counter = FlopCounterMode(display=False)
    # The fused attention kernel for CPUs has no formula in the counter; spelled out, its two products are counted.
    # nn.MultiheadAttention's fast path is closed for the same reason.
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with evaluating(model), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            model(*(field[:1] for field in fields))
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
    return counter.get_total_flops() // 2


# -- files ------------------------------------------------------------------------------------------


def size_bytes(path: Path) -> int:
    """Size of a file, or of all files below a directory."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


# -- time and memory --------------------------------------------------------------------------------


def _never() -> None:
    """Nobody asks to stop."""


def latency(
    runs: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int = 3, check: Callable[[], None] = _never
) -> dict[str, Latency]:
    """Time several callables in interleaved rounds, so that their ratios hold whatever else the machine does.

    Args:
        runs: Each runs once and returns when its result is there (a GPU's callable synchronises).
        rounds: The order of the callables is turned round from one to the next.
        warmup: Calls before anything is counted; in each round, after a pause of SETTLE_S, one more.
        check: Called before each measurement: raises where the user asks to stop.
    """
    repeats = {name: _warm_up(run, warmup=warmup) for name, run in runs.items()}
    samples: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for _ in range(rounds):
        for name in names:
            check()
            time.sleep(SETTLE_S)
            runs[name]()
            samples[name].append(1000 * _time(runs[name], repeats[name]))
        names.reverse()
    return {name: _percentiles(values) for name, values in samples.items()}


def throughput(latency: Latency, *, batch_size: int) -> float:
    """Samples per second at the median."""
    return 1000 * batch_size / latency.p50_ms


def peak_memory_bytes(run: Callable[[], object], *, device: torch.device | str = "cpu") -> int:
    """Most memory that one call held over what was held before: of the process, or of PyTorch on the GPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    memory.give_back()
    memory.reset_peak()
    before = _peak_bytes()
    run()
    return max(0, _peak_bytes() - before)


def _warm_up(run: Callable[[], object], *, warmup: int) -> int:
    """Calls per round, enough for SHORTEST_S."""
    for _ in range(max(1, warmup) - 1):
        run()
    return max(1, round(SHORTEST_S / max(_time(run, 1), 1e-7) + 0.5))


def _time(run: Callable[[], object], repeats: int) -> float:
    """Seconds per call."""
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats


def _percentiles(samples_ms: list[float]) -> Latency:
    p50, p90, p99 = (float(value) for value in np.percentile(samples_ms, [50, 90, 99]))
    return Latency(p50_ms=p50, p90_ms=p90, p99_ms=p99, samples_ms=tuple(samples_ms))


def _peak_bytes() -> int:
    # Without /proc, as on macOS, the highest size ever stands for the newest peak.
    unit = 1 if sys.platform == "darwin" else 1024
    return memory.peak_bytes() or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# -- the machine ------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """What numbers were taken on: cpu, cores, threads, gpus, system and versions."""
    versions = {"python": platform.python_version()}
    for name in _RECORDED:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": _cpu_name(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions,
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # no /proc: not Linux
    return platform.processor() or platform.machine()
