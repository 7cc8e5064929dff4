"""What a foreign graph, of which no data are known, is compared and timed on: arrays of the user's, or noise."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx

from bmctl.core.noise import Feed, fitting, index_limits
from bmctl.core.runner import Runner, check_feed, shown
from bmctl.errors import DataError, UnsupportedError, first_line
from bmctl.schema import BATCH, Signature, Span

NUM_SAMPLES = 64
"""Samples compared at once where only the batch is free; with other free axes as many as the batch mostly has."""


def read_sample(path: Path, *, signature: Signature) -> Feed:
    """The arrays of an .npz by the names of the graph's inputs.

    Raises:
        DataError: It is no .npz, or its arrays do not fit the inputs.
    """
    named = " ".join(f"{spec.name}={spec.dtype}{shown(spec)}" for spec in signature.inputs)
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is no .npz of arrays: {first_line(error)}", hint=f"np.savez(FILE, ...) with {named}"
        ) from error
    try:
        return check_feed(arrays, inputs=signature.inputs)
    except DataError as error:
        raise DataError(f"{path}: {error.message}", hint=f"the graph takes {named}") from error


def foreign_feeds(
    graph: Path, runner: Runner, *, signature: Signature, axes: Mapping[str, Span], sample: Path | None = None
) -> list[Feed]:
    """What the artifacts of a foreign graph are compared on: most common sizes first, then the smallest.

    Args:
        graph: Read for what its integers index.
        runner: The reference; noise of a kind that it refuses is drawn otherwise.
        axes: Of every free axis.
        sample: An .npz of the user's, in place of noise.

    Raises:
        UnsupportedError: It refuses all noise that is tried.
    """
    if sample is not None:
        return [read_sample(sample, signature=signature)]
    limits = index_limits(onnx.load(graph, load_external_data=False))
    most = NUM_SAMPLES if set(signature.axes) <= {BATCH} else axes[BATCH].opt if BATCH in axes else 1
    usual = {axis: min(most, span.max) if axis == BATCH else span.opt for axis, span in axes.items()}
    small = {axis: span.min for axis, span in axes.items()}
    feeds = []
    for sizes in (usual, small) if signature.axes else (usual,):
        try:
            feeds.append(fitting(runner.run, signature, sizes=sizes, limits=limits)[1])
        except Exception as error:
            shown_sizes = ", ".join(f"{axis} {size}" for axis, size in sizes.items() if axis in signature.axes)
            raise UnsupportedError(
                f"{graph} takes no noise where its axes are {shown_sizes or 'as they are'}: {first_line(error)}",
                hint="say what it takes: --sample FILE.npz, or --axis NAME=MIN:OPT:MAX",
            ) from error
    return feeds


def of_batch(feed: Feed, *, signature: Signature, size: int) -> Feed:
    """The same samples over and over, or fewer, so that there are `size`; as it is where the graph's batch is fixed."""
    axes = {spec.name: spec.shape.index(BATCH) for spec in signature.inputs if BATCH in spec.shape}
    if not axes:
        return feed
    num = next(feed[name].shape[axis] for name, axis in axes.items())
    index = np.resize(np.arange(num), size)
    return {
        name: np.ascontiguousarray(np.take(array, index, axis=axes[name])) if name in axes else array
        for name, array in feed.items()
    }
