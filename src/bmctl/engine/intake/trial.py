"""What a foreign graph's axes really are, found by running it on noise with ONNX Runtime.

A file's own word is a start: names may lie, may be missing, and an axis that is called free may work at one size only.
Here a graph is first made to run at some sizes; then every free axis is given other ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bmctl.core import onnxgraph
from bmctl.core.noise import Feed, Style, fitting
from bmctl.engine.intake.attempt import Attempt, Sizes
from bmctl.engine.intake.axes import check_batch, name_outputs, vary
from bmctl.errors import UnsupportedError, UsageError, first_line
from bmctl.schema import BATCH, Signature, Span, TensorSpec

SPANS: Mapping[str, Span] = {
    "image": Span(min=32, opt=224, max=512),
    "tokens": Span(min=1, opt=32, max=128),
    "past": Span(min=0, opt=32, max=128),
}
"""What an axis is taken to serve where nobody says it, as far as the graph lets it."""


@dataclass(frozen=True)
class Settled:
    """What was found.

    Attributes:
        signature: With axes as they turned out to be.
        axes: Sizes that its free axes but the batch take, tried at the smallest and largest.
        style: Of noise that the graph takes; see core.noise.
        notes: What differs from what the file says, a sentence each.
    """

    signature: Signature
    axes: dict[str, Span]
    style: Style
    notes: tuple[str, ...] = ()


def settle(
    path: Path,
    *,
    axes: Mapping[str, Span] | None = None,
    sample: Feed | None = None,
    check: Callable[[], None] = lambda: None,
) -> Settled:
    """Try a checked file's axes.

    Args:
        axes: Sizes that the user names; they are taken as they are.
        sample: Arrays that the graph is known to take, by input.
        check: Called before each run: raises where the user asks to stop.

    Raises:
        UnsupportedError: Its inputs or outputs are nothing that we can feed or read, ONNX Runtime lacks an operator, or
            it runs on none of the noise that was tried.
    """
    graph = Attempt(path, onnxgraph.read_signature(path), sample or {}, dict(axes or {}), check=check)
    sizes = _start(graph)
    _check_repeats(graph, sizes)
    for axis in graph.signature.axes:
        vary(graph, sizes, axis)
    check_batch(graph, sizes)
    name_outputs(graph, sizes)
    _check_asked(graph, sizes)
    free = [axis for axis in graph.signature.axes if axis != BATCH and "+" not in axis]
    found = _together(graph, sizes, {axis: _span(graph, sizes, axis) for axis in free})
    graph.notes += [
        f"nobody says which sizes {axis!r} will have: {span.min} to {span.max}, most often {span.opt}, is taken; "
        f"--axis {axis}=MIN:OPT:MAX says others"
        for axis, span in found.items()
        if axis not in graph.asked
    ]
    return Settled(graph.signature, found, graph.style, tuple(graph.notes))


# -- where it runs ----------------------------------------------------------------------------------


def _start(graph: Attempt) -> Sizes:
    """Sizes at which the graph runs, best those at which its outputs are what it says, and the noise that it takes."""
    first: Exception | None = None
    found: tuple[Sizes, Style] | None = None
    for sizes in _guesses(graph):
        graph.check()
        try:
            style, feed = _fitting(graph, sizes)
        except Exception as error:  # noqa: BLE001 (ONNX Runtime's exceptions share no class)
            first = first or error
            continue
        found = found or (sizes, style)
        if graph.is_as_said(graph.run(feed), sizes):
            graph.style, graph.agrees = style, True
            return sizes
    if found is None:
        assert first is not None
        raise UnsupportedError(
            f"{graph.path} runs on no noise that was tried: {first_line(first)}",
            hint="say what it takes: --sample FILE.npz with an array for each input, or --axis NAME=MIN:OPT:MAX",
        )
    sizes, graph.style = found
    return sizes


def _fitting(graph: Attempt, sizes: Sizes) -> tuple[Style, Feed]:
    return fitting(graph.run, graph.signature, sizes=sizes, limits=graph.limits)


def _check_repeats(graph: Attempt, sizes: Sizes) -> None:
    one, other = graph.outputs(sizes), graph.outputs(sizes)
    for name, array in one.items():
        if array.shape != other[name].shape or not np.array_equal(
            array, other[name], equal_nan=array.dtype.kind == "f"
        ):
            raise UnsupportedError(
                f"{graph.path}: the output {name!r} is another one in every call; no artifact can be proven against it",
                hint="export the model in eval mode, with its random numbers as an input",
            )


def kind_of(spec: TensorSpec, index: int) -> str:
    """What an axis of an input probably is: image, past or tokens."""
    axis = str(spec.shape[index]).lower()
    if any(word in axis for word in ("past", "cache", "history")):
        return "past"
    is_picture = len(spec.shape) == 4 and spec.dtype in ("float32", "float16", "float64", "uint8")
    named = any(word in axis for word in ("height", "width", "rows", "cols", "image"))
    if named or (is_picture and index >= 1 and any(spec.shape[i] in (1, 3) for i in (1, 3))):
        return "image"
    return "tokens"


def _kinds(signature: Signature) -> dict[str, str]:
    found: dict[str, str] = {}
    for spec in signature.inputs:
        for i, axis in enumerate(spec.shape):
            if isinstance(axis, str):
                found.setdefault(axis, "batch" if axis == BATCH else kind_of(spec, i))
    return found


def _guesses(graph: Attempt) -> Iterator[Sizes]:
    """Sizes to start from, the likeliest first: the user's, then distinct ones, equal ones, sums."""
    kinds = _kinds(graph.signature)
    told = {axis: span.opt for axis, span in graph.asked.items() if axis in kinds and axis != BATCH}
    for spec in graph.signature.inputs:
        if spec.name in graph.sample:
            sizes = zip(spec.shape, graph.sample[spec.name].shape, strict=True)
            told |= {axis: size for axis, size in sizes if isinstance(axis, str)}
    free = [axis for axis in kinds if axis not in told]
    distinct = {"batch": itertools.repeat(2), "image": itertools.count(64, 32), "tokens": itertools.count(5, 2),
                "past": itertools.count(3, 1)}  # fmt: skip
    pasts: dict[str, int] = {}
    for axis in free:  # caches of one model are of one length
        if kinds[axis] == "past" and "+" not in axis:
            pasts[axis] = 3
    base = {axis: pasts.get(axis, 0) or next(distinct[kinds[axis]]) for axis in free if "+" not in axis}
    yield base | told
    equal = {"batch": 2, "image": 64, "tokens": 8, "past": 3}
    yield {axis: equal[kinds[axis]] for axis in base} | told
    others = [axis for axis in base if axis != BATCH]
    for axis in others:
        rest = [base[other] for other in others if other != axis]
        if rest:
            yield {**base, axis: sum(rest)} | told
    for size in (224, 4, 16, 32, 128, 3, 6, 10, 12, 64):
        yield {axis: 2 if axis == BATCH else size for axis in base} | told
    for size in (20, 40, 80, 100, 160, 256, 300, 512, 1000, 1500, 3000, 2):
        yield {axis: 2 if axis == BATCH else size for axis in base} | told
    for size in (8, 32, 224, 3, 4, 5, 6, 7, 1):  # a first axis that is called batch may be none
        yield dict.fromkeys(base, size) | told


# -- which sizes ------------------------------------------------------------------------------------


def _check_asked(graph: Attempt, sizes: Sizes) -> None:
    """Hold what the user says of axes against what the graph takes.

    Raises:
        UsageError: There is no such free axis.
        UnsupportedError: The graph does not take such a size.
    """
    alone = {**sizes, **({BATCH: 1} if BATCH in sizes else {})}
    for axis, span in graph.asked.items():
        if axis == BATCH:  # recipes always say something of it
            continue
        if axis not in sizes:
            free = ", ".join(one for one in sizes if one != BATCH) or "none but the batch"
            raise UsageError(f"{graph.path} has no free axis {axis!r}", hint=f"its free axes: {free}")
        for size in dict.fromkeys((span.min, span.opt, span.max)):
            if not graph.runs({**alone, axis: size}):
                raise UnsupportedError(
                    f"{graph.path} does not run where {axis!r} is {size}",
                    hint=f"it runs where {axis!r} is {sizes[axis]}",
                )


def _span(graph: Attempt, sizes: Sizes, axis: str) -> Span:
    """Sizes of one axis: the user's, else as far as the usual ones go."""
    if axis in graph.asked:
        return graph.asked[axis]
    usual = SPANS[_kinds(graph.signature)[axis]]
    low, high = (_reach(graph, sizes, axis, size) for size in (usual.min, usual.max))
    low, high = min(low, sizes[axis]), max(high, sizes[axis], 1)
    opt = min(max(usual.opt, low), high)
    if not graph.runs({**sizes, axis: opt}):
        opt = sizes[axis]
    return Span(min=low, opt=opt, max=high)


def _together(graph: Attempt, sizes: Sizes, spans: dict[str, Span]) -> dict[str, Span]:
    """The same spans, with the largest sizes lowered until the graph takes all of them at once: sums may be limited."""
    alone = {**sizes, **({BATCH: 1} if BATCH in sizes else {})}
    for which in ("max", "opt"):
        movable = [axis for axis in spans if axis not in graph.asked]
        while movable and not graph.runs(alone | {axis: getattr(span, which) for axis, span in spans.items()}):
            axis = max(movable, key=lambda name: getattr(spans[name], which) / max(sizes[name], 1))
            span = spans[axis]
            size = max((getattr(span, which) + sizes[axis]) // 2, sizes[axis], span.min)
            spans[axis] = Span(min=span.min, opt=min(span.opt, size), max=span.max if which == "opt" else size)
            if size - sizes[axis] < 2:
                movable.remove(axis)
                spans[axis] = Span(min=span.min, opt=sizes[axis], max=max(spans[axis].max, sizes[axis]))
    return spans


def _reach(graph: Attempt, sizes: Sizes, axis: str, wanted: int) -> int:
    """The size that works and is next to `wanted`, by halving the way to it."""
    alone = {**sizes, **({BATCH: 1} if BATCH in sizes else {})}
    good, bad = sizes[axis], wanted
    if graph.runs({**alone, axis: wanted}):
        return wanted
    while abs(good - bad) > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if graph.runs({**alone, axis: middle}) else (good, middle)
    return good
