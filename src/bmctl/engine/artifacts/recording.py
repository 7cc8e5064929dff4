"""What a task's graphs are really fed: examples, calibration, parity samples and timings come from recorded calls.

A decoder's cache, the mask of a padded batch, ids within the vocabulary: nobody has to invent them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bmctl.core.runner import Bounds, Closing, Runner, rows
from bmctl.schema import BATCH, Signature


@dataclass(frozen=True)
class Call:
    """One call of one graph.

    Attributes:
        part: Name of the graph.
        signature: Of the graph.
        feed: What it was given.
        outputs: What it gave.
    """

    part: str
    signature: Signature
    feed: Mapping[str, np.ndarray]
    outputs: Mapping[str, np.ndarray]


class Recorder(Closing):
    """A runner that keeps what passes through it; see core.runner.Runner.

    Args:
        runner: Stays its owner's to close.
        part: Its name.
        calls: Takes every call, in order; recorders of several parts may share one list.
    """

    def __init__(self, runner: Runner, *, part: str, calls: list[Call]) -> None:
        self.signature = runner.signature
        self.bounds: Mapping[str, Bounds] = runner.bounds
        self._runner, self._part, self._calls = runner, part, calls

    def run(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One batch, passed on as it is."""
        outputs = self._runner.run(feed)
        self._calls.append(Call(self._part, self.signature, dict(feed), outputs))
        return outputs


def of_part(calls: Sequence[Call], part: str) -> Iterator[Call]:
    """The calls of one graph."""
    return (call for call in calls if call.part == part)


def example_of(calls: Sequence[Call], part: str) -> Call:
    """A call of one graph whose free axes, but the samples', are all longer than 1, as far as there is one.

    Tracing takes an axis of size 0 or 1 for a fixed one.
    """

    def is_long(call: Call) -> bool:
        sizes = (zip(spec.shape, call.feed[spec.name].shape, strict=True) for spec in call.signature.inputs)
        return all(size > 1 for each in sizes for axis, size in each if isinstance(axis, str) and axis != BATCH)

    own = list(of_part(calls, part))
    return next(filter(is_long, own), own[0])


def cut(call: Call, num_samples: int) -> Call:
    """The first samples of a call; all of it where its graph has a fixed batch."""
    specs = (*call.signature.inputs, *call.signature.outputs)
    axes = {spec.name: spec.shape.index(BATCH) for spec in specs if BATCH in spec.shape}

    def first(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: rows(array, axes.get(name), 0, num_samples) for name, array in arrays.items()}

    return Call(call.part, call.signature, first(call.feed), first(call.outputs))


def stretched(call: Call, num_samples: int) -> Call:
    """The call with so many samples, those that it has over and over; without outputs, which are not known."""
    axes = {spec.name: spec.shape.index(BATCH) for spec in call.signature.inputs if BATCH in spec.shape}

    def filled(name: str, array: np.ndarray) -> np.ndarray:
        axis = axes.get(name)
        return array if axis is None else np.take(array, np.arange(num_samples) % array.shape[axis], axis=axis)

    return Call(call.part, call.signature, {name: filled(name, array) for name, array in call.feed.items()}, {})


def replay(runners: Mapping[str, Runner], calls: Sequence[Call]) -> None:
    """The same calls once more, in their order: what a batch costs on other runners, without the task's own work."""
    for call in calls:
        runners[call.part].run(call.feed)
