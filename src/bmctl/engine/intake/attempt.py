"""A graph on trial: run on noise of any sizes, with what is thought of its axes meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from bmctl.core import onnxfile, onnxgraph
from bmctl.core.halftypes import widen
from bmctl.core.noise import Feed, Style, axis_size, index_limits, noise
from bmctl.errors import DataError, UnsupportedError, first_line
from bmctl.schema import Signature, Span, TensorSpec

Sizes = dict[str, int]


@dataclass
class Attempt:
    """A checked file that ONNX Runtime runs.

    Attributes:
        signature: What is thought of its axes; it changes as the graph runs.
        sample: Arrays that it is known to take, by input.
        asked: Sizes that the user names.
        style: Of noise that it takes.
        check: Called before each run: raises where the user asks to stop.
        agrees: Whether its outputs were of the sizes that its own names say at first; then they must stay so.
    """

    path: Path
    signature: Signature
    sample: Feed
    asked: dict[str, Span]
    style: Style = "small"
    agrees: bool = False
    check: Callable[[], None] = lambda: None
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.limits = index_limits(onnx.load(self.path, load_external_data=False))
        self.is_quantized = onnxgraph.is_quantized(self.path)
        self._session = _session(self.path)

    def run(self, feed: Feed) -> dict[str, np.ndarray]:
        """Its outputs; the sample's arrays stand in for those of their sizes."""
        known = {name: array for name, array in self.sample.items() if array.shape == feed[name].shape}
        feed = {**feed, **known}
        names = [spec.name for spec in self.signature.outputs]
        return dict(zip(names, self._session.run(names, feed), strict=True))

    def runs(self, sizes: Mapping[str, int]) -> bool:
        """Whether it takes noise of these sizes."""
        self.check()
        try:
            found = self.outputs(sizes)
        except Exception:  # noqa: BLE001 (ONNX Runtime's exceptions share no class)
            return False
        return not self.agrees or self.is_as_said(found, sizes)

    def is_as_said(self, found: Mapping[str, np.ndarray], sizes: Mapping[str, int]) -> bool:
        """Whether outputs have the sizes that their axes' names say."""
        for spec in self.signature.outputs:
            if len(spec.shape) != found[spec.name].ndim:
                return False
            for axis, got in zip(spec.shape, found[spec.name].shape, strict=True):
                if (isinstance(axis, int) or axis in sizes or "+" in axis) and _size(axis, sizes, got) != got:
                    return False
        return True

    def outputs(self, sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
        return self.run(noise(self.signature, sizes=sizes, limits=self.limits, style=self.style))

    def rename(self, old: str, new: int | str, *, only: tuple[str, int] | None = None) -> None:
        """Another name, or a size, for an axis: everywhere, or in one place of one input."""

        def changed(spec: TensorSpec) -> TensorSpec:
            shape = tuple(
                new if axis == old and only in (None, (spec.name, i)) else axis for i, axis in enumerate(spec.shape)
            )
            return spec.model_copy(update={"shape": shape})

        self.signature = Signature(
            inputs=tuple(map(changed, self.signature.inputs)), outputs=tuple(map(changed, self.signature.outputs))
        )


def _size(axis: int | str, sizes: Mapping[str, int], unknown: int) -> int:
    try:
        return axis_size(axis, sizes)
    except DataError:
        return unknown


def _session(path: Path) -> Any:
    import onnxruntime as ort

    ort.disable_telemetry_events()
    ort.set_default_logger_severity(4)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.enable_mem_pattern = False  # memory is planned by the names of axes, and these may lie
    source: Any = onnxfile.taken_in(path) or str(path)
    if onnxgraph.precision_of(path) == "bf16":  # it has no bf16 kernels
        source = widen(onnx.load(path)).SerializeToString()
    try:
        return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise UnsupportedError(
            f"ONNX Runtime, which tells what {path} should compute, does not take it: {first_line(error)}",
            hint="export the model again, without the operator or with another version of it",
        ) from error
