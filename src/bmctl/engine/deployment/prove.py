"""What a run's artifacts are worth: the task's metric on test data, read once each, and speeds in one session.

All artifacts that run here are timed in interleaved rounds, so that their ratios hold whatever else the machine does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from statistics import median

import numpy as np

from bmctl import store
from bmctl.backends import BACKENDS
from bmctl.engine.artifacts.deployed import Deployed, open_runner
from bmctl.engine.context import StageContext
from bmctl.engine.evaluation import measure
from bmctl.engine.evaluation.appraise import has_metric
from bmctl.engine.evaluation.evaluate import evaluate_artifact
from bmctl.engine.loading.data import array_batches, open_split
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
    if has_metric(context, original.manifest.preprocess):
        for path in (original.path, *(one.path for one in runnable)):
            evaluate_artifact(context, path, split="test")
    else:
        context.emit({"event": "note", "text": "no task and data: only parity, latency and size are measured"})
    _time(context, runnable)


def _time(context: StageContext, runnable: Sequence[Deployed]) -> None:
    config = context.recipe.export.measure
    with contextlib.ExitStack() as stack:
        runs = {}
        for one in runnable:
            runner = stack.enter_context(open_runner(one))
            feed = {runner.signature.inputs[0].name: _batch(context, one, size=config.batch_size)}
            runs[str(one.path.relative_to(context.run / "deploy"))] = (runner.run, feed)
        if not runs:
            return
        calls = {name: (lambda run=run, feed=feed: run(feed)) for name, (run, feed) in runs.items()}
        latencies = measure.latency(calls, rounds=config.rounds)
    timed = {str(one.path.relative_to(context.run / "deploy")): one for one in runnable}
    peaks = {name: _peak_memory(one, runs[name][1]) for name, one in timed.items()}
    found = Measurements(
        batch_size=config.batch_size,
        machine=measure.machine(),
        artifacts={
            name: Timing(
                p50_ms=latency.p50_ms,
                p90_ms=latency.p90_ms,
                p99_ms=latency.p99_ms,
                samples_ms=tuple(latency.samples_ms),
                throughput=measure.throughput(latency, batch_size=config.batch_size),
                artifact=timed[name].hash,
                peak_memory_bytes=peaks[name],
            )
            for name, latency in latencies.items()
        },
    )
    store.write_atomic(context.run / "measurements.json", found.model_dump_json(indent=1).encode())


def _peak_memory(one: Deployed, feed: Mapping[str, np.ndarray]) -> int | None:
    """What opening an artifact and one batch take of the process; None for engines on a GPU, whose memory that is not.

    A call alone says nothing: from the second on it takes from what a runtime keeps. Its libraries are loaded by now.
    """
    if BACKENDS[one.manifest.backend].DEVICE != "cpu":
        return None

    def once() -> None:
        with open_runner(one) as runner:
            runner.run(feed)

    return round(median(measure.peak_memory_bytes(once) for _ in range(PEAKS))) or None


def _batch(context: StageContext, one: Deployed, *, size: int) -> np.ndarray:
    """float32 [size, ...]: real validation samples where there are any, else noise of the graph's shape."""
    spec, preprocess = one.manifest.inputs[0], one.manifest.preprocess
    if context.recipe.data is not None and preprocess is not None:
        x, _ = next(iter(array_batches(open_split(context.recipe, name="val", preprocess=preprocess), batch_size=size)))
        return np.resize(x, (size, *x.shape[1:]))
    shape = [size, *(dim if isinstance(dim, int) else 1 for dim in spec.shape[1:])]
    return np.random.default_rng(0).standard_normal(shape).astype(spec.dtype)
