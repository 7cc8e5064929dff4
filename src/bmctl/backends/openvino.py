"""OpenVINO on the CPU.

The artifact is the ONNX graph itself: read directly it opens as fast as OpenVINO's own IR (7 against 6 ms for a 315k
parameter network; compiling takes ten times that), it is one file, and of an int8 graph it is the smaller one
(351 against 440 kB, for IR spells out every Q/DQ pair in XML).
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bmctl.core.runner import Bounds, Closing, check_feed, rows
from bmctl.errors import DependencyError, PackageError, UnsupportedError
from bmctl.schema import BATCH, Count, Signature, Span, Strict

if TYPE_CHECKING:
    import numpy as np

SUFFIX = ".onnx"
PROFILED = False
FLAG = ""
ANYWHERE = ""
DEVICE = "cpu"

EMPTY = ("Exception from ", "Check '", "Caught exception", "FrontEnd API failed", "Model wasn't fully")
UNCONVERTED = ("conversion rule", "No translator", "Conversion is failed")
"""Lines of OpenVINO's messages that say nothing, and words of those that name operators which it has not."""


class Config(Strict):
    """Attributes:
    threads: None takes every core that this process may use.
    precision: Of floating point operators. OpenVINO's own default computes an fp32 graph in bf16 where the CPU has
        AMX; here that is asked for by name, with bf16, or auto: bf16 where the CPU has it, else f32.
    hint: `latency` gives all threads to one batch; `throughput` splits a batch over parallel streams.
    """

    name: Literal["openvino"] = "openvino"
    threads: Count | None = None
    precision: Literal["f32", "bf16", "auto"] = "f32"
    hint: Literal["latency", "throughput"] = "latency"


def unavailable(config: Config) -> str:
    """Why this machine cannot run artifacts of this backend, or the empty string."""
    try:
        core = _openvino().Core()
    except ImportError as error:
        return f"openvino cannot be imported: {error}"
    if "CPU" not in core.available_devices:
        return "OpenVINO has no plugin for this CPU"
    if config.precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        return "this CPU has no bf16"
    return ""


def build(
    onnx_path: Path, *, config: Config, signature: Signature, axes: Mapping[str, Span], out: Path
) -> dict[str, Any]:
    """Write a checked copy of the graph in one file, and compile it once to see that every operator is there.

    Args:
        onnx_path: The graph.
        axes: Not used: what is free in the graph stays free.
        out: The file to write.

    Raises:
        UnsupportedError: OpenVINO has no implementation of an operator of the graph.
    """
    from bmctl.core.onnxfile import copy_graph

    copy_graph(onnx_path, out=out)
    mended = _mend(out)
    with open(out, config=config, signature=signature):
        return {"version": _openvino().get_version(), "precision": _precision(config), "mended": mended}


def open(
    artifact: Path, *, config: Config, signature: Signature | None = None, meta: Mapping[str, Any] | None = None
) -> OpenVinoRunner:
    """Read and compile the graph; close it with `with`."""
    if reason := unavailable(config):
        raise DependencyError(reason, hint="pip install openvino, and `precision: f32` where the CPU has no bf16")
    from bmctl.core.onnxgraph import read_signature

    return OpenVinoRunner(artifact, config, signature=signature or read_signature(artifact))


class OpenVinoRunner(Closing):
    """A compiled model with one request per stream; see core.runner.Runner."""

    def __init__(self, artifact: Path, config: Config, *, signature: Signature) -> None:
        self._model: Any = _compile(artifact, config)
        self.precision: str = self._model.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        streams = self._model.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS") if config.hint == "throughput" else 1
        self._requests: list[Any] = [self._model.create_infer_request() for _ in range(streams)]
        self.signature = signature
        self._fed = {name for port in self._model.inputs for name in port.get_names()}
        self._places = [_place(self._model, spec.name, i) for i, spec in enumerate(signature.outputs)]
        self.bounds: dict[str, Bounds] = {}

    def run(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One batch, in as many parts as there are streams; blocks until the outputs are there."""
        import numpy as np

        if self._model is None:
            raise ValueError("the runner is closed")
        outputs = self.signature.outputs
        checked = check_feed(feed, inputs=self.signature.inputs, bounds=self.bounds)
        parts = self._split(checked)
        results = []
        try:
            for request, part in zip(self._requests, parts, strict=False):
                request.start_async(self._tensors(part), share_inputs=True)
            for request, _ in zip(self._requests, parts, strict=False):
                request.wait()
                results.append([request.get_output_tensor(i).data.copy() for i in self._places])
        except RuntimeError as error:
            raise PackageError(f"OpenVINO failed on a batch: {_reason(error)}") from error
        if len(results) == 1:
            return {spec.name: array for spec, array in zip(outputs, results[0], strict=True)}
        columns = zip(outputs, zip(*results, strict=True), strict=True)
        return {spec.name: np.concatenate(arrays, axis=spec.shape.index(BATCH)) for spec, arrays in columns}

    def _tensors(self, feed: dict[str, np.ndarray]) -> dict[str, Any]:
        """What is fed: OpenVINO drops inputs that nothing reads, and takes a bare array of rank 0 for one of rank 1."""
        tensor = _openvino().Tensor
        return {n: a if a.ndim else tensor(a, shared_memory=True) for n, a in feed.items() if n in self._fed}

    def _split(self, feed: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
        """Equal parts of the batch, one per stream at most; nothing is split where an array has no free batch."""
        specs = self.signature.inputs
        if len(self._requests) == 1 or not all(BATCH in spec.shape for spec in (*specs, *self.signature.outputs)):
            return [feed]
        axes = {spec.name: spec.shape.index(BATCH) for spec in specs}
        num_samples = feed[specs[0].name].shape[axes[specs[0].name]]
        num_parts = min(len(self._requests), num_samples)
        borders = [num_samples * i // num_parts for i in range(num_parts + 1)]
        return [
            {name: rows(array, axes[name], low, high) for name, array in feed.items()}
            for low, high in itertools.pairwise(borders)
        ]

    def close(self) -> None:
        self._requests = []
        self._model = None


def _mend(graph: Path) -> list[str]:
    """Write the file anew without what OpenVINO has not and can be said otherwise; returns what was done."""
    import onnx

    from bmctl.backends.quantized_operators import CONTRIB
    from bmctl.backends.rewriting import rewrite
    from bmctl.core.onnxfile import inline_functions

    done = ["functions of the file's own are written out"] if inline_functions(graph) else []
    model = onnx.load(graph)
    rewritten = rewrite(model, CONTRIB)
    if rewritten:
        onnx.save(model, graph)
    return [*done, *rewritten]


def _place(model: Any, name: str, index: int) -> int:
    """Where OpenVINO has an output: it goes by names, for it may order or merge them otherwise."""
    named = [i for i, port in enumerate(model.outputs) if name in port.get_names()]
    if not named and index >= len(model.outputs):
        raise UnsupportedError(f"OpenVINO has lost the output {name!r}", hint="keep this graph on onnxruntime")
    return named[0] if named else index


def _compile(artifact: Path, config: Config) -> Any:
    core = _openvino().Core()
    options = {
        "INFERENCE_PRECISION_HINT": _precision(config),
        "PERFORMANCE_HINT": config.hint.upper(),
        "INFERENCE_NUM_THREADS": config.threads or len(os.sched_getaffinity(0)),
        "CACHE_DIR": "",  # nothing is kept on disk outside the run
    }
    try:
        return core.compile_model(core.read_model(artifact), "CPU", options)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        named = [line for line in lines if any(word in line for word in UNCONVERTED)]
        if named:
            why = [line for line in lines if line.endswith(".") and not line.startswith("Model wasn't")]
            text = " ".join([named[0].lstrip("- "), *why[:1]])[:300]
            raise UnsupportedError(
                f"OpenVINO does not take the graph: {text}", hint="keep this graph on onnxruntime"
            ) from error
        raise PackageError(f"OpenVINO cannot open {artifact}: {_reason(error)}") from error


def _precision(config: Config) -> str:
    """What floating point operators compute in on this machine."""
    if config.precision != "auto":
        return config.precision
    return "bf16" if "BF16" in _openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES") else "f32"


def _reason(error: RuntimeError) -> str:
    """The line that says something: OpenVINO's messages begin with where in its sources they were raised."""
    lines = [line.strip() for line in str(error).splitlines()]
    told = [line for line in lines if line and not line.startswith(EMPTY)]
    return (told or lines or ["no reason given"])[0][:300]


def _openvino() -> Any:
    from bmctl.core import quiet

    quiet.switch_off_telemetry()
    import openvino

    return openvino
