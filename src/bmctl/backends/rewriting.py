"""Writing nodes in place of others: what graphs are mended with for runtimes that lack an operator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import onnx

Rule = Callable[["Writer", "onnx.NodeProto"], str]
"""Writes what stands for a node, and says what it did; the empty string leaves the node as it is."""


class Writer:
    """The nodes of a graph while some of them are written anew.

    Args:
        model: Edited in place; its initializers are at hand.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        from onnx import numpy_helper

        self.graph = model.graph
        self.opset = next((one.version for one in model.opset_import if one.domain in ("", "ai.onnx")), 1)
        self.nodes: list[onnx.NodeProto] = []
        self.sizes = _sizes(model)
        self.ranks = {name: len(size) for name, size in self.sizes.items()}
        self._tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        self._constants: dict[str, np.ndarray] = {}
        for node in model.graph.node:
            if node.op_type == "Constant" and node.output:
                value = [attribute.t for attribute in node.attribute if attribute.name == "value"]
                self._constants |= dict(zip(node.output, map(numpy_helper.to_array, value), strict=False))
        self._used = {name for node in model.graph.node for name in (node.name, *node.input, *node.output)}
        self._used |= set(self._tensors)

    def value(self, name: str) -> np.ndarray | None:
        """A constant's array, or None where `name` is computed."""
        from onnx import numpy_helper

        if name in self._tensors and name not in self._constants:
            self._constants[name] = numpy_helper.to_array(self._tensors[name])
        return self._constants.get(name)

    def name(self, stem: str) -> str:
        """A name that nothing in the graph has."""
        number, found = 0, stem
        while found in self._used:
            number += 1
            found = f"{stem}.{number}"
        self._used.add(found)
        return found

    def constant(self, value: np.ndarray, *, stem: str = "constant") -> str:
        from onnx import numpy_helper

        name = self.name(f"{stem}.mended")
        self.graph.initializer.append(numpy_helper.from_array(value, name))
        self._constants[name] = value
        return name

    def op(self, kind: str, *given: str, out: str = "", attributes: Mapping[str, Any] | None = None) -> str:
        """Write a node of the standard's; returns its output, called `out` where that is said."""
        from onnx import helper

        out = out or self.name(f"{kind}.out")
        self.nodes.append(
            helper.make_node(kind, list(given), [out], name=self.name(f"{kind}.mended"), **(attributes or {}))
        )
        return out

    def axes(self, kind: str, x: str, axes: list[int], *, out: str = "", keepdims: bool | None = None) -> str:
        """Unsqueeze, Squeeze or a reduction: their axes became an input at operator set 13, or 18."""
        import numpy as np

        extra = {} if keepdims is None else {"keepdims": int(keepdims)}
        if self.opset >= (13 if kind in ("Unsqueeze", "Squeeze", "ReduceSum") else 18):
            return self.op(kind, x, self.constant(np.array(axes, np.int64)), out=out, attributes=extra)
        return self.op(kind, x, out=out, attributes={"axes": axes, **extra})


def rewrite(model: onnx.ModelProto, rules: Mapping[str, Rule]) -> list[str]:
    """Go through the main graph's nodes once, in order; returns what was done, each thing once."""
    from onnx import shape_inference

    if not any(node.op_type in rules for node in model.graph.node):
        return []
    writer, done = Writer(model), dict[str, int]()
    for node in list(model.graph.node):
        said = rules[node.op_type](writer, node) if node.op_type in rules else ""
        if said:
            done[said] = done.get(said, 0) + 1
        else:
            writer.nodes.append(node)
    nodes = list(writer.nodes)  # their messages are the graph's own: keep copies before they are cleared
    copies = [type(node).FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(copies)
    if done:
        del model.graph.value_info[:]
        model.CopyFrom(shape_inference.infer_shapes(model))
    return [f"{said} ({count} times)" if count > 1 else said for said, count in done.items()]


def attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    """One attribute's value, or `default`."""
    from onnx import helper

    return next((helper.get_attribute_value(one) for one in node.attribute if one.name == name), default)


def given(node: onnx.NodeProto, index: int) -> str:
    """The name of an input, or the empty string where it is left out."""
    return node.input[index] if len(node.input) > index else ""


def wanted(node: onnx.NodeProto, index: int) -> str:
    """The name of an output, or the empty string where nobody wants it."""
    return node.output[index] if len(node.output) > index else ""


def _sizes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Shapes of tensors as far as the file says them, with 0 for what is free."""
    values = (*model.graph.input, *model.graph.value_info, *model.graph.output)
    found = {
        value.name: tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
        for value in values
        if value.type.tensor_type.HasField("shape")
    }
    return found | {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
