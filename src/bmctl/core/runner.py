"""What runs a graph, whatever it runs on: named arrays in, named arrays out.

n: samples of a call, along the axis `batch`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from bmctl.errors import DataError, UnsupportedError
from bmctl.schema import BATCH, Signature, TensorSpec

if TYPE_CHECKING:
    import numpy as np

Bounds = tuple[int, int | None]
"""Smallest and largest size of an axis; None is no limit."""


class Runner(Protocol):
    """An open graph: an eager module, an ONNX file or an engine. `check_feed` says what all of them refuse.

    Attributes:
        signature: What `run` must be fed, and what it returns.
        bounds: Of free axes, where they have any, such as those that an engine was built for.
    """

    @property
    def signature(self) -> Signature: ...
    @property
    def bounds(self) -> Mapping[str, Bounds]: ...
    def run(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def check_feed(
    feed: Mapping[str, np.ndarray], *, inputs: Sequence[TensorSpec], bounds: Mapping[str, Bounds] | None = None
) -> dict[str, np.ndarray]:
    """What every runner takes and refuses, so that all backends refuse alike.

    Args:
        feed: An array per input name.
        inputs: Names, dtypes and shapes; axes of one name must be of one size.
        bounds: Smallest and largest size of free axes. A batch has one sample at least; other free axes may be empty
            where nothing is said of them.

    Returns:
        The same arrays, C-contiguous, in the order of `inputs`.

    Raises:
        DataError: Names, ranks, sizes or dtypes that do not fit; sizes out of bounds; nan or inf, but in `state`.
    """
    import numpy as np

    names = [spec.name for spec in inputs]
    if set(feed) != set(names):
        raise DataError(f"the inputs are named {sorted(feed)}, expected {sorted(names)}")
    sizes: dict[str, tuple[int, str]] = {}
    checked: dict[str, np.ndarray] = {}
    for spec in inputs:
        array = feed[spec.name]
        if not isinstance(array, np.ndarray):
            raise DataError(f"input {spec.name!r} is a {type(array).__name__}, expected a NumPy array")
        if array.dtype != np.dtype(spec.dtype):
            raise DataError(f"input {spec.name!r} is {array.dtype}, expected {spec.dtype}")
        fixed = [(size, got) for size, got in zip(spec.shape, array.shape, strict=False) if isinstance(size, int)]
        if array.ndim != len(spec.shape) or any(size != got for size, got in fixed):
            raise DataError(f"input {spec.name!r} has the shape {list(array.shape)}, expected {shown(spec)}")
        for axis, got in zip(spec.shape, array.shape, strict=True):
            if isinstance(axis, str) and sizes.setdefault(axis, (got, spec.name))[0] != got:
                known, where = sizes[axis]
                raise DataError(f"the axis {axis!r} is {known} in {where!r} and {got} in {spec.name!r}")
        # Not ascontiguousarray, which gives a number one dimension.
        checked[spec.name] = np.asarray(array, order="C")
    for axis, (got, _) in sizes.items():
        _check_size(axis, got, (bounds or {}).get(axis))
    for spec in inputs:
        if spec.role != "state" and not _is_finite(checked[spec.name]):
            raise DataError(f"input {spec.name!r} holds nan or inf")
    return checked


def shown(spec: TensorSpec) -> str:
    """``[batch, 3, 224, 224]``."""
    return "[" + ", ".join(map(str, spec.shape)) + "]"


class Closing:
    """The `with` of a runner. One that holds something lets go of it in `close`; one round another leaves it open."""

    def close(self) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Batched(Closing):
    """A runner that takes any number of samples, in calls of the sizes that the other one takes.

    A last call with too few samples repeats the last one, and the surplus is cut off.

    Args:
        runner: Stays its owner's to close.
    """

    def __init__(self, runner: Runner) -> None:
        self.signature, self.bounds = runner.signature, dict[str, Bounds]()
        self._runner = runner

    def run(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All outputs; n, at least 1, is the size along `batch`, or else of the first axis.

        Raises:
            UnsupportedError: It takes several calls, and an output has no axis along which they could be joined.
        """
        import numpy as np

        axes, (low, high) = batch_axes(self._runner)
        if not axes:
            return self._runner.run(feed)
        num_samples = next(feed[name].shape[axis] for name, axis in axes.items() if name in feed)
        size = num_samples if high is None else min(num_samples, high)
        parts: list[dict[str, np.ndarray]] = []
        for start in range(0, num_samples, max(size, 1)):
            part = {name: rows(array, axes.get(name), start, start + size) for name, array in feed.items()}
            num = min(size, num_samples - start)
            if num < low:
                part = {name: _repeated(array, axes.get(name), low) for name, array in part.items()}
            outputs = self._runner.run(part)
            parts.append({name: rows(array, axes.get(name), 0, num) for name, array in outputs.items()})
        if len(parts) == 1:
            return parts[0]
        fixed = [spec.name for spec in self.signature.outputs if spec.name not in axes]
        if fixed:
            raise UnsupportedError(
                f"{num_samples} samples take {len(parts)} calls, and the output {fixed[0]!r} has no axis of samples",
                hint="send batches that it takes in one call",
            )
        return {name: np.concatenate([part[name] for part in parts], axis=axes[name]) for name in parts[0]}


def feed_of(runner: Runner, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What a graph takes of a batch: by its own names, or where it has others, as a foreign one, by position."""
    inputs = runner.signature.inputs
    if all(spec.name in batch for spec in inputs):
        return {spec.name: batch[spec.name] for spec in inputs}
    return {spec.name: array for spec, array in zip(inputs, batch.values(), strict=False)}


def batch_axes(runner: Runner) -> tuple[dict[str, int], Bounds]:
    """Along which axis of each input and output samples lie, and how many of them one call takes.

    A graph with no free `batch` has a fixed one where the first axes of all inputs are of one size.
    """
    inputs, outputs = runner.signature.inputs, runner.signature.outputs
    free = {spec.name: spec.shape.index(BATCH) for spec in (*inputs, *outputs) if BATCH in spec.shape}
    if any(spec.name in free for spec in inputs):
        return free, runner.bounds.get(BATCH, (1, None))
    first = {spec.shape[0] if spec.shape else None for spec in inputs}
    size = first.pop() if len(first) == 1 else None
    if not isinstance(size, int):
        return {}, (1, None)
    return {spec.name: 0 for spec in (*inputs, *outputs) if spec.shape and spec.shape[0] == size}, (size, size)


def rows(array: np.ndarray, axis: int | None, start: int, stop: int) -> np.ndarray:
    """A part of an array along the axis of samples; all of it where it has none."""
    if axis is None:
        return array
    return array[(slice(None),) * axis + (slice(start, stop),)]


def _repeated(array: np.ndarray, axis: int | None, num: int) -> np.ndarray:
    import numpy as np

    if axis is None:
        return array
    last = rows(array, axis, array.shape[axis] - 1, array.shape[axis])
    return np.concatenate([array, np.repeat(last, num - array.shape[axis], axis=axis)], axis=axis)


def _check_size(axis: str, got: int, bounds: Bounds | None) -> None:
    low, high = bounds or (1 if axis == BATCH else 0, None)
    if axis == BATCH and got == 0:
        raise DataError("the batch is empty")
    if got < low or (high is not None and got > high):
        what = f"a batch of {got}" if axis == BATCH else f"{got} along the axis {axis!r}"
        raise DataError(
            f"{what} is outside the profile that the engine was built for: {low} to {high}",
            hint=f"send other sizes, or build for others: bmctl export ... --axis {axis}=MIN:OPT:MAX",
        )


def _is_finite(array: np.ndarray) -> bool:
    """Whether no element is nan or inf: a sum shows it in one fast pass; only a sum that overflowed needs a second."""
    import numpy as np

    if array.dtype.kind != "f":
        return True
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(array.sum())) or bool(np.isfinite(array).all())
