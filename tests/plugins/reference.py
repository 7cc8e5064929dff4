"""A backend: ONNX's own reference in NumPy, with files of its own suffix."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bmctl.core.runner import Bounds, Closing, check_feed
from bmctl.schema import Signature, Span, Strict

if TYPE_CHECKING:
    import numpy as np

SUFFIX = ".plain"
PROFILED = False
FLAG = ""
ANYWHERE = ""
DEVICE = "cpu"


class Config(Strict):
    name: Literal["reference"] = "reference"


def unavailable(config: Config) -> str:
    return ""


def build(
    onnx_path: Path, *, config: Config, signature: Signature, axes: Mapping[str, Span], out: Path
) -> dict[str, Any]:
    import onnx

    from bmctl.core.onnxfile import copy_graph

    copy_graph(onnx_path, out=out)
    return {"version": onnx.__version__}


def open(
    artifact: Path, *, config: Config, signature: Signature | None = None, meta: Mapping[str, Any] | None = None
) -> PlainRunner:
    from bmctl.core.onnxgraph import read_signature

    return PlainRunner(artifact, signature or read_signature(artifact))


class PlainRunner(Closing):
    def __init__(self, artifact: Path, signature: Signature) -> None:
        from onnx.reference import ReferenceEvaluator

        self._evaluator = ReferenceEvaluator(str(artifact))
        self.signature = signature
        self.bounds: dict[str, Bounds] = {}

    def run(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        names = [spec.name for spec in self.signature.outputs]
        checked = check_feed(feed, inputs=self.signature.inputs, bounds=self.bounds)
        return dict(zip(names, self._evaluator.run(names, checked), strict=True))
