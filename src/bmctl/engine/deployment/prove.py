"""What a run's artifacts are worth: the task's metric on test data, read once each, and speeds in one session.

All artifacts that run here are timed in interleaved rounds, so that their ratios hold whatever else the machine does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import numpy as np

from bmctl import store
from bmctl.engine.artifacts.deployed import Deployed, open_runner
from bmctl.engine.context import StageContext
from bmctl.engine.evaluation import measure
from bmctl.engine.evaluation.appraise import has_metric
from bmctl.engine.evaluation.evaluate import evaluate_artifact
from bmctl.engine.loading.arrays import array_batches
from bmctl.engine.loading.data import open_split
from bmctl.inputs import Resolved
from bmctl.package import ModelPackage
from bmctl.report.rows import Measurements, Timing


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
    hashes = {str(one.path.relative_to(context.run / "deploy")): one.hash for one in runnable}
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
                artifact=hashes[name],
            )
            for name, latency in latencies.items()
        },
    )
    store.write_atomic(context.run / "measurements.json", found.model_dump_json(indent=1).encode())


def _batch(context: StageContext, one: Deployed, *, size: int) -> np.ndarray:
    """float32 [size, ...]: real validation samples where there are any, else noise of the graph's shape."""
    spec, preprocess = one.manifest.inputs[0], one.manifest.preprocess
    if context.recipe.data is not None and preprocess is not None:
        split = open_split(context.data, name="val", given=Resolved(preprocess))
        x = next(iter(array_batches(split, batch_size=size)))["input"]
        return np.resize(x, (size, *x.shape[1:]))
    shape = [size, *(dim if isinstance(dim, int) else 1 for dim in spec.shape[1:])]
    return np.random.default_rng(0).standard_normal(shape).astype(spec.dtype)
