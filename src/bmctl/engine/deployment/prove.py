"""What a run's artifacts are worth: the task's metric on test data, read once each, and speeds in one session.

All artifacts that run here are timed in interleaved rounds, so that their ratios hold whatever else the machine does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median

from bmctl import store
from bmctl.backends import BACKENDS
from bmctl.core.runner import Batched, Runner, batch_axes
from bmctl.engine.artifacts.deployed import Deployed, open_runners
from bmctl.engine.artifacts.recording import Call, replay
from bmctl.engine.context import StageContext
from bmctl.engine.evaluation import feeds, measure
from bmctl.engine.evaluation.appraise import has_metric
from bmctl.engine.evaluation.evaluate import evaluate_artifact
from bmctl.package import ModelPackage
from bmctl.report.rows import Measurements, Timing

PEAKS = 3
"""Times that memory is measured: peaks differ by a tenth, as freed memory is not always given back."""


def prove(context: StageContext, *, original: ModelPackage, deployed: Sequence[Deployed]) -> None:
    """Evaluate the run's first package and every artifact that runs here on test data, and time the artifacts.

    Args:
        original: What drops are against; evaluated eagerly.
        deployed: The shipped artifacts and the original's.

    Raises:
        GateError: An artifact's outputs are not finite.
    """
    runnable = [one for one in deployed if one.manifest.status == "ran"]
    if has_metric(context, original.given):
        for path in (original.path, *(one.path for one in runnable)):
            evaluate_artifact(context, path, split="test")
    else:
        context.emit({"event": "note", "text": "no task and data: only parity, latency and size are measured"})
    _time(context, original, runnable)


def _time(context: StageContext, original: ModelPackage, runnable: Sequence[Deployed]) -> None:
    """The same recorded calls on every artifact: of one batch, by the first of them that takes it."""
    config = context.recipe.export.measure
    with contextlib.ExitStack() as stack:
        opened = {str(one.path.relative_to(context.run / "deploy")): open_runners(one, stack) for one in runnable}
        if not opened:
            return
        size = _batch_size(next(iter(opened.values())), asked=config.batch_size)
        calls = feeds.timing_calls(context, original, next(iter(opened.values())), num_samples=size)
        runs = {name: _replay(runners, calls) for name, runners in opened.items()}
        latencies = measure.latency(runs, rounds=config.rounds, check=partial(context.stop.check, "timing"))
    timed = {str(one.path.relative_to(context.run / "deploy")): one for one in runnable}
    peaks = {}
    for name, one in timed.items():
        context.stop.check("timing")
        peaks[name] = _peak_memory(one, calls)
    found = Measurements(
        batch_size=size,
        machine=measure.machine(),
        artifacts={
            name: Timing(
                p50_ms=latency.p50_ms,
                p90_ms=latency.p90_ms,
                p99_ms=latency.p99_ms,
                samples_ms=tuple(latency.samples_ms),
                throughput=measure.throughput(latency, batch_size=size),
                artifact=timed[name].hash,
                peak_memory_bytes=peaks[name],
            )
            for name, latency in latencies.items()
        },
    )
    store.write_atomic(context.run / "measurements.json", found.model_dump_json(indent=1).encode())


def _batch_size(runners: Mapping[str, Runner], *, asked: int) -> int:
    """What the recipe asks for, but where a graph has a batch of its own."""
    sizes = [bounds for axes, bounds in map(batch_axes, runners.values()) if axes]
    fixed = [low for low, high in sizes if low == high]
    return fixed[0] if fixed else asked


def _replay(runners: Mapping[str, Runner], calls: Sequence[Call]) -> Callable[[], object]:
    batched = {part: Batched(runner) for part, runner in runners.items()}
    return lambda: replay(batched, calls)


def _peak_memory(one: Deployed, calls: Sequence[Call]) -> int | None:
    """What opening an artifact and one batch take of the process; None for engines on a GPU, whose memory that is not.

    A call alone says nothing: from the second on it takes from what a runtime keeps. Its libraries are loaded by now.
    """
    if BACKENDS[one.manifest.backend].DEVICE != "cpu":
        return None

    def once() -> None:
        with contextlib.ExitStack() as stack:
            _replay(open_runners(one, stack), calls)()

    return round(median(measure.peak_memory_bytes(once) for _ in range(PEAKS))) or None
