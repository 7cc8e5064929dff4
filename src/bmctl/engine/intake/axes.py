"""What the free axes of a graph on trial are: free, tied to others, sums, fixed after all; and which holds samples."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from bmctl.core.noise import noise
from bmctl.engine.intake.attempt import Attempt, Sizes
from bmctl.schema import BATCH, Signature, TensorSpec

CLOSE = 1e-4
"""Outputs of one sample, alone and among others, as a fraction of the largest."""


def others(size: int) -> list[int]:
    return [
        other for other in dict.fromkeys((size + 1, size * 2, size + 2, size * 3, size // 2, size - 1)) if other > 0
    ]


def _is_free(graph: Attempt, sizes: Sizes, *together: str) -> bool:
    """Whether two other sizes of these axes work, all changed by as much."""
    tries = others(sizes[together[0]])
    works = 0
    for other in tries:
        moved = {axis: sizes[axis] + other - sizes[together[0]] for axis in together}
        works += min(moved.values()) > 0 and graph.runs({**sizes, **moved})
        if works == 2:
            return True
    return False


def vary(graph: Attempt, sizes: Sizes, axis: str) -> None:
    """Leave a free axis free, tie it to others, split it, or find it fixed."""
    if axis not in sizes or axis not in graph.signature.axes or _is_free(graph, sizes, axis):
        return
    places = [(spec.name, i) for spec in graph.signature.inputs for i, one in enumerate(spec.shape) if one == axis]
    if len(places) > 1 and _split(graph, sizes, axis, places):
        return
    partners = [other for other in graph.signature.axes if other in sizes and other != axis]
    tied = [other for other in partners if _is_free(graph, sizes, axis, other)]
    if tied and sizes[tied[0]] == sizes[axis]:
        kept, lost = (
            (axis, tied[0])
            if graph.signature.axes.index(axis) < graph.signature.axes.index(tied[0])
            else (tied[0], axis)
        )
        graph.notes.append(f"the axes {kept!r} and {lost!r} are always of one size: both are called {kept!r}")
        graph.rename(lost, kept)
        sizes.pop(lost)
    elif len(tied) > 1 and sizes[axis] == sum(sizes[other] for other in tied):
        name = " + ".join(tied)
        graph.notes.append(f"the axis {axis!r} is as long as {name}")
        graph.rename(axis, name)
        sizes.pop(axis)
    elif not any(axis in one.split(" + ") for one in graph.signature.axes if "+" in one) and not _is_part(
        graph, sizes, axis
    ):
        graph.notes.append(
            f"the axis {axis!r} is called free, and the graph takes it at {sizes[axis]} only: it is fixed"
        )
        graph.rename(axis, sizes.pop(axis))


def _is_part(graph: Attempt, sizes: Sizes, axis: str) -> bool:
    """Whether it moves together with some longer axis, which is then a sum of it and others."""
    return any(
        sizes[other] > sizes[axis] and _is_free(graph, sizes, other, axis)
        for other in graph.signature.axes
        if other in sizes and other != axis
    )


def _split(graph: Attempt, sizes: Sizes, axis: str, places: list[tuple[str, int]]) -> bool:
    """One name for several axes that need not be equal: those that are free alone get names of their own."""
    before, known = graph.signature, dict(sizes)
    for name, i in places:
        graph.rename(axis, own := f"{name}.{i}", only=(name, i))
        sizes[own] = known[axis]
    own_names = [f"{name}.{i}" for name, i in places]
    groups: list[list[str]] = []
    fixed: list[str] = []
    left = list(own_names)
    while left:
        first = left.pop(0)
        group = [first]
        if not _is_free(graph, sizes, first):
            partners = [other for other in left if _is_free(graph, sizes, first, other)]
            if not partners:
                fixed.append(first)
                continue
            group += partners[:1]
            left.remove(partners[0])
        groups.append(group)
    if not groups:
        graph.signature = before
        sizes.clear()
        sizes.update(known)
        return False
    sizes.pop(axis)
    for number, group in enumerate(groups):
        kept = axis if number == 0 else group[0]
        size = sizes[group[0]]
        for one in group:
            sizes.pop(one)
            graph.rename(one, kept)
        sizes[kept] = size
    for one in fixed:
        graph.rename(one, sizes.pop(one))
    graph.notes.append(
        f"the name {axis!r} stands for axes that are not of one size: "
        + ", ".join(f"{name} is {_shape(graph, name)}" for name in dict.fromkeys(name for name, _ in places))
    )
    return True


def _shape(graph: Attempt, name: str) -> str:
    return next(str(list(spec.shape)) for spec in graph.signature.inputs if spec.name == name)


# -- samples ----------------------------------------------------------------------------------------


def check_batch(graph: Attempt, sizes: Sizes) -> None:
    """Keep the name `batch` for an axis along which samples are computed each for itself."""
    if BATCH in sizes and (graph.is_quantized or _holds_samples(graph, sizes, BATCH) is not False):
        return  # dynamic quantizers take their range over all samples
    if BATCH in sizes:
        first = next(spec for spec in graph.signature.inputs if BATCH in spec.shape)
        own = f"{first.name}.{first.shape.index(BATCH)}"
        graph.notes.append(f"the axis {own!r} holds no samples: what is computed of one depends on the others")
        graph.rename(BATCH, own)
        sizes[own] = sizes.pop(BATCH)
    for axis in graph.signature.axes:
        if axis in sizes and _holds_samples(graph, sizes, axis):
            graph.notes.append(f"samples lie along the axis {axis!r}: it is called {BATCH!r}")
            graph.rename(axis, BATCH)
            sizes[BATCH] = sizes.pop(axis)
            return


def _holds_samples(graph: Attempt, sizes: Sizes, axis: str) -> bool | None:
    """Whether the last of several samples gives the same alone; None where the outputs do not show it."""
    num = max(sizes[axis], 2)
    sizes = {**sizes, axis: num}
    try:
        feed = noise(graph.signature, sizes=sizes, limits=graph.limits, style=graph.style)
        alone = {
            spec.name: np.take(feed[spec.name], [num - 1], axis=spec.shape.index(axis))
            if axis in spec.shape
            else feed[spec.name]
            for spec in graph.signature.inputs
        }
        many, one = graph.run(feed), graph.run(alone)
    except Exception:  # noqa: BLE001 (ONNX Runtime's exceptions share no class)
        return None
    shown = False
    for name, whole in many.items():
        moved = [i for i, pair in enumerate(zip(whole.shape, one[name].shape, strict=False)) if pair == (num, 1)]
        if whole.ndim != one[name].ndim or not moved:
            continue
        if not _is_close(np.take(whole, [num - 1], axis=moved[0]), one[name], slack=CLOSE):
            return False
        shown = True
    return shown or None


def _is_close(one: np.ndarray, other: np.ndarray, *, slack: float) -> bool:
    if one.shape != other.shape:
        return False
    if one.dtype.kind != "f":
        return bool(np.array_equal(one, other))
    slack = max(slack, 100 * CLOSE if one.dtype == np.float16 else 0)
    left, right = one.astype(np.float64), other.astype(np.float64)
    scale = float(np.nanmax(np.abs(left), initial=0.0)) or 1.0
    return bool(np.allclose(left, right, atol=slack * scale, rtol=0, equal_nan=True))


def name_outputs(graph: Attempt, sizes: Sizes) -> None:
    """Axes of outputs are called like the inputs' axis that they follow; other names of inputs there were wrong."""
    base, moved = _shapes(graph, sizes), dict[str, tuple[int, dict[str, tuple[int, ...]]]]()
    graph.agrees = False
    for axis in graph.signature.axes:
        for other in others(sizes[axis]) if axis in sizes else ():
            if graph.runs({**sizes, axis: other}):
                moved[axis] = other - sizes[axis], _shapes(graph, {**sizes, axis: other})
                break
    outputs = []
    for spec in graph.signature.outputs:
        shape = [_followed(graph, spec, i, base=base, moved=moved, sizes=sizes) for i in range(len(base[spec.name]))]
        outputs.append(spec.model_copy(update={"shape": tuple(shape)}))
    graph.signature = Signature(inputs=graph.signature.inputs, outputs=tuple(outputs))


def _shapes(graph: Attempt, sizes: Sizes) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in graph.outputs(sizes).items()}


def _followed(
    graph: Attempt,
    spec: TensorSpec,
    index: int,
    *,
    base: Mapping[str, tuple[int, ...]],
    moved: Mapping[str, tuple[int, Mapping[str, tuple[int, ...]]]],
    sizes: Sizes,
) -> int | str:
    """The name of one axis of an output, from how its size moves with those of the inputs."""
    own, size = f"{spec.name}.{index}", base[spec.name][index]
    said = spec.shape[index] if index < len(spec.shape) and len(spec.shape) == len(base[spec.name]) else own
    differences = {axis: shapes[spec.name][index] - size for axis, (_, shapes) in moved.items()}
    names = [axis for axis, difference in differences.items() if difference]
    if not names:
        return own if said in graph.signature.axes else said
    if all(differences[axis] == moved[axis][0] for axis in names) and size == sum(sizes[axis] for axis in names):
        known = (axis for axis in graph.signature.axes if "+" in axis and set(axis.split(" + ")) == set(names))
        return next(known, " + ".join(names))
    return own if isinstance(said, int) or said in graph.signature.axes else said
