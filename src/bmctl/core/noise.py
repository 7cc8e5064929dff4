"""Random inputs for a graph of which no data are known, made from its signature.

Floats are standard normal. Integers stay in range: what indexes a table in the graph is drawn below the table's size,
masks hold ones and then zeros, and other integers are small. Where that is not enough, `STYLES` are tried in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Literal

import numpy as np
import onnx

from bmctl.errors import DataError
from bmctl.schema import Signature, Span, TensorSpec

Feed = dict[str, np.ndarray]
Style = Literal["small", "shape", "unit", "ones", "twos", "zeros"]
STYLES: tuple[Style, ...] = ("small", "shape", "unit", "ones", "twos", "zeros")
"""How integers that index nothing are drawn: 0 or 1; vectors as the shape of another input; all of one value. With
`unit` floats lie in [0, 1), as coordinates may have to.
"""

MASKS = ("mask", "valid", "present")


def noise(
    signature: Signature,
    *,
    sizes: Mapping[str, int],
    seed: int = 0,
    limits: Mapping[str, int] | None = None,
    style: Style = "small",
) -> Feed:
    """An array for every input.

    Args:
        sizes: Of its free axes, by name; an axis called ``a + b`` is as long as both.
        seed: The same one gives the same arrays.
        limits: Integers of these inputs are drawn below these numbers; see `index_limits`.
        style: For integers without a limit.

    Raises:
        DataError: A free axis has no size.
    """
    rng = np.random.default_rng(seed)
    shapes = {spec.name: tuple(axis_size(axis, sizes) for axis in spec.shape) for spec in signature.inputs}
    return {
        spec.name: _drawn(rng, spec, shapes=shapes, limit=(limits or {}).get(spec.name), style=style)
        for spec in signature.inputs
    }


def axis_size(axis: int | str, sizes: Mapping[str, int]) -> int:
    """The size of an axis: itself where it is fixed, the sum of its parts where it is called ``past + tokens``.

    Raises:
        DataError: Nobody says how large it is.
    """
    if isinstance(axis, int):
        return axis
    if axis in sizes:
        return sizes[axis]
    parts = [part.strip() for part in axis.split("+")]
    if len(parts) < 2 or any(not part.isdigit() and part not in sizes for part in parts):
        raise DataError(f"nobody says how large the axis {axis!r} is", hint=f"--axis {axis}=1:8:64")
    return sum(int(part) if part.isdigit() else sizes[part] for part in parts)


def complete_axes(signature: Signature, axes: Mapping[str, Span]) -> dict[str, Span]:
    """`axes` with those that are sums of others, such as ``past + tokens``."""
    found = dict(axes)
    for axis in signature.axes:
        if axis not in found and "+" in axis:
            sizes = [{name: getattr(span, which) for name, span in axes.items()} for which in ("min", "opt", "max")]
            low, usual, high = (axis_size(axis, one) for one in sizes)
            found[axis] = Span(min=low, opt=usual, max=high)
    return found


def fitting(
    run: Callable[[Feed], object],
    signature: Signature,
    *,
    sizes: Mapping[str, int],
    limits: Mapping[str, int],
    seed: int = 0,
) -> tuple[Style, Feed]:
    """The first style of noise that a graph takes.

    Args:
        run: Runs the graph, and raises where it does not take the arrays.

    Raises:
        Exception: What `run` raised at the first style, where it takes none.
    """
    first: Exception | None = None
    seen: list[Feed] = []
    for style in STYLES:
        feed = noise(signature, sizes=sizes, seed=seed, limits=limits, style=style)
        if any(all(np.array_equal(feed[name], other[name]) for name in feed) for other in seen):
            continue
        try:
            run(feed)
        except Exception as error:  # noqa: BLE001 (runtimes share no class of errors; the first one is raised below)
            first = first or error
            seen.append(feed)
        else:
            return style, feed
    assert first is not None
    raise first


def _drawn(
    rng: np.random.Generator,
    spec: TensorSpec,
    *,
    shapes: Mapping[str, tuple[int, ...]],
    limit: int | None,
    style: Style,
) -> np.ndarray:
    shape, dtype = shapes[spec.name], np.dtype(spec.dtype)
    if dtype.kind == "f" and style == "unit":
        return np.asarray(rng.random(shape)).astype(dtype)
    if dtype.kind == "f":
        return np.asarray(rng.standard_normal(shape)).astype(dtype)
    if limit is not None:
        return np.asarray(rng.integers(0, max(limit, 1), shape)).astype(dtype)
    if any(word in spec.name.lower() for word in MASKS):
        return _mask(spec, shape).astype(dtype)
    if dtype.kind == "b":
        return np.asarray(rng.integers(0, 2, shape)).astype(dtype)
    if style == "shape" and len(shape) == 1:
        same = [other for name, other in shapes.items() if name != spec.name and len(other) == shape[0]]
        if same:
            return np.array(same[0], dtype)
    if style in ("ones", "twos", "zeros"):
        return np.full(shape, ("zeros", "ones", "twos").index(style), dtype)
    if int(np.prod(shape)) == 1 and len(shape) < 2:
        return np.full(shape, 2, dtype)  # how often, how many
    high = 256 if dtype == np.uint8 else 128 if dtype == np.int8 else 2
    return np.asarray(rng.integers(1 if "len" in spec.name.lower() else 0, high, shape)).astype(dtype)


def _mask(spec: TensorSpec, shape: tuple[int, ...]) -> np.ndarray:
    """Ones; along the last axis each sample but the first ends in some zeros, as padding does."""
    found = np.ones(shape)
    if len(shape) < 2 or shape[-1] < 2:
        return found
    for row in range(shape[0]):
        found[row, ..., shape[-1] - row % (shape[-1] // 2 + 1) :] = 0
    return found


# -- what the graph says of its integers ------------------------------------------------------------

PASSING = {"Cast", "Identity", "Reshape", "Unsqueeze", "Squeeze", "Flatten", "Transpose", "Expand", "Slice", "Concat"}
"""Operators that hand integers on as they are."""
TABLES = {"Gather": (0, 1), "GatherElements": (0, 1)}
"""Of these operators: which input is the table, and which one indexes it."""
EMBEDDING = {0: 2, 1: 4}
"""com.microsoft's EmbedLayerNormalization: ids index the third input, segments the fifth."""


def index_limits(model: onnx.ModelProto) -> dict[str, int]:
    """How many rows the smallest table has that each input indexes; inputs that index none are left out.

    Args:
        model: With or without its external data: only sizes are read.
    """
    sizes = _table_sizes(model)
    origins: dict[str, set[str]] = {value.name: {value.name} for value in model.graph.input}
    found: dict[str, int] = {}
    for node in model.graph.node:
        if node.op_type in PASSING:
            sources = node.input if node.op_type == "Concat" else node.input[:1]
            origins[node.output[0]] = set().union(*(origins.get(name, set()) for name in sources))
        for table, index in _lookups(node):
            rows = _rows(sizes.get(node.input[table]), node)
            for name in origins.get(node.input[index], set()) if rows else ():
                found[name] = min(rows, found.get(name, rows))
    return found


def _lookups(node: onnx.NodeProto) -> Iterable[tuple[int, int]]:
    if node.op_type in TABLES:
        yield TABLES[node.op_type]
    if node.op_type == "EmbedLayerNormalization":
        yield from (
            (table, index) for index, table in EMBEDDING.items() if len(node.input) > table and node.input[index]
        )


def _rows(size: tuple[int, ...] | None, node: onnx.NodeProto) -> int:
    axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
    return size[axis] if size and -len(size) <= axis < len(size) else 0


def _table_sizes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Shapes of constants, also behind casts and dequantizers."""
    sizes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant":
            values = [attribute.t for attribute in node.attribute if attribute.name == "value"]
            sizes |= {name: tuple(value.dims) for name, value in zip(node.output, values, strict=False)}
        elif node.op_type in ("Cast", "Identity", "DequantizeLinear") and node.input[0] in sizes:
            sizes[node.output[0]] = sizes[node.input[0]]
    return sizes
