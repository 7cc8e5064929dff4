"""What a run's artifacts are worth: the task's metric on test data, read once each, and speeds in one session.

All artifacts that run here are timed in interleaved rounds, so that their ratios hold whatever else the machine does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import numpy as np
from safetensors.numpy import load_file

from bmctl import store
from bmctl.core.noise import Feed
from bmctl.core.runner import Runner, batch_axes
from bmctl.engine.artifacts.deployed import SAMPLE, Deployed, open_runner
from bmctl.engine.artifacts.samples import batch_of, of_batch
from bmctl.engine.context import StageContext
from bmctl.engine.evaluation import measure
from bmctl.engine.evaluation.appraise import has_metric
from bmctl.engine.evaluation.evaluate import evaluate_artifact
from bmctl.engine.loading.data import array_batches, open_split
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
        runs, batch_size = {}, config.batch_size
        for one in runnable:
            runner = stack.enter_context(open_runner(one))
            feed = _feed(context, one, runner, size=config.batch_size)
            batch_size = batch_of(feed, signature=runner.signature)
            runs[str(one.path.relative_to(context.run / "deploy"))] = (runner.run, feed)
        if not runs:
            return
        calls = {name: (lambda run=run, feed=feed: run(feed)) for name, (run, feed) in runs.items()}
        latencies = measure.latency(calls, rounds=config.rounds)
    hashes = {str(one.path.relative_to(context.run / "deploy")): one.hash for one in runnable}
    found = Measurements(
        batch_size=batch_size,
        machine=measure.machine(),
        artifacts={
            name: Timing(
                p50_ms=latency.p50_ms,
                p90_ms=latency.p90_ms,
                p99_ms=latency.p99_ms,
                samples_ms=tuple(latency.samples_ms),
                throughput=measure.throughput(latency, batch_size=batch_size),
                artifact=hashes[name],
            )
            for name, latency in latencies.items()
        },
    )
    store.write_atomic(context.run / "measurements.json", found.model_dump_json(indent=1).encode())


def _feed(context: StageContext, one: Deployed, runner: Runner, *, size: int) -> Feed:
    """A batch of `size` samples, or of as many as the artifact takes: of validation, the user's own, or noise."""
    about, signature = one.manifest, runner.signature
    _, (_, high) = batch_axes(runner)
    size = min(size, high or size)
    if context.recipe.data is not None and about.preprocess is not None:
        split = open_split(context.recipe, name="val", preprocess=about.preprocess)
        x, _ = next(iter(array_batches(split, batch_size=size)))
        return {signature.inputs[0].name: np.resize(x, (size, *x.shape[1:]))}
    arrays = load_file(one.path / SAMPLE)
    feed = {spec.name: arrays[spec.name] for spec in signature.inputs}
    return of_batch(feed, signature=signature, size=size)
