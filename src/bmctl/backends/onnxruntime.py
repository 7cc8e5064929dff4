"""ONNX Runtime: the graph as it is, on the CPU or an NVIDIA GPU."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bmctl.core.runner import Bounds, Closing, check_feed
from bmctl.errors import DependencyError, PackageError, UnsupportedError, first_line
from bmctl.schema import Count, Signature, Span, Strict

if TYPE_CHECKING:
    import numpy as np

SUFFIX = ".onnx"
PROFILED = False
FLAG = ""
ANYWHERE = ""
DEVICE = "cpu"

ERRORS = ("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NoModel", "NoSuchFile", "RuntimeException")


class Config(Strict):
    """Attributes:
    threads: Of one operator; None takes every core that this process may use.
    optimization: How far the graph is rewritten when it is opened.
    device: `auto` takes CUDA where this build of ONNX Runtime and the machine have it.
    """

    name: Literal["onnxruntime"] = "onnxruntime"
    threads: Count | None = None
    optimization: Literal["none", "basic", "extended", "all"] = "all"
    device: Literal["auto", "cpu", "cuda"] = "auto"


def unavailable(config: Config) -> str:
    """Why this machine cannot run artifacts of this backend, or the empty string."""
    try:
        import onnxruntime as ort
    except ImportError as error:
        return f"onnxruntime cannot be imported: {error}"
    if config.device == "cuda" and "CUDAExecutionProvider" not in ort.get_available_providers():
        return "this onnxruntime has no CUDA provider"
    return ""


def build(
    onnx_path: Path, *, config: Config, signature: Signature, axes: Mapping[str, Span], out: Path
) -> dict[str, Any]:
    """Write a checked copy of the graph in one file, and open it once to see that every operator is there.

    Args:
        onnx_path: The graph.
        axes: Not used: what is free in the graph stays free.
        out: The file to write.

    Raises:
        UnsupportedError: ONNX Runtime has no kernel for an operator of the graph.
    """
    from bmctl.core.onnxfile import copy_graph

    copy_graph(onnx_path, out=out)
    with open(out, config=config, signature=signature) as runner:
        return {"version": _ort().__version__, "providers": runner.providers}


def open(
    artifact: Path, *, config: Config, signature: Signature | None = None, meta: Mapping[str, Any] | None = None
) -> OrtRunner:
    """Load the graph; close it with `with`."""
    if reason := unavailable(config):
        raise DependencyError(reason, hint="pip install onnxruntime, or onnxruntime-gpu for CUDA")
    from bmctl.core.onnxgraph import read_signature

    return OrtRunner(artifact, config, signature=signature or read_signature(artifact))


class OrtRunner(Closing):
    """A session; see core.runner.Runner."""

    def __init__(self, artifact: Path, config: Config, *, signature: Signature) -> None:
        self._session: Any = _start(artifact, config)
        self.providers: list[str] = self._session.get_providers()
        self.signature = signature
        self.bounds: dict[str, Bounds] = {}

    def run(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One batch; blocks until the outputs are there."""
        if self._session is None:
            raise ValueError("the runner is closed")
        names = [spec.name for spec in self.signature.outputs]
        checked = check_feed(feed, inputs=self.signature.inputs, bounds=self.bounds)
        with _explained("ONNX Runtime failed on a batch"):
            arrays = self._session.run(names, checked)
        return dict(zip(names, arrays, strict=True))

    def close(self) -> None:
        self._session = None


def _start(artifact: Path, config: Config) -> Any:
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    from bmctl.core.onnxfile import taken_in

    ort = _ort()
    options = ort.SessionOptions()
    options.intra_op_num_threads = config.threads or len(os.sched_getaffinity(0))
    level = {"none": "DISABLE_ALL", "basic": "ENABLE_BASIC", "extended": "ENABLE_EXTENDED", "all": "ENABLE_ALL"}
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, f"ORT_{level[config.optimization]}")
    options.log_severity_level = 4  # errors are raised; nothing is to be printed besides
    cuda = config.device != "cpu" and "CUDAExecutionProvider" in ort.get_available_providers()
    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"] if cuda else ["CPUExecutionProvider"]
    with _explained(f"ONNX Runtime cannot open {artifact}"):
        try:
            return ort.InferenceSession(str(artifact), options, providers=providers)
        except state.Fail:
            whole = taken_in(artifact)
            if whole is None:
                raise
            return ort.InferenceSession(whole, options, providers=providers)


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn ONNX Runtime's exceptions, which share no class of their own, into ours."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    try:
        yield
    except state.NotImplemented as error:
        raise UnsupportedError(f"{what}: {first_line(error)}") from error
    except tuple(getattr(state, name) for name in ERRORS) as error:
        text = first_line(error)
        kind = UnsupportedError if "is not a registered function/op" in text else PackageError
        raise kind(f"{what}: {text}") from error


def _ort() -> Any:
    import onnxruntime as ort

    ort.disable_telemetry_events()
    ort.set_default_logger_severity(4)
    return ort
