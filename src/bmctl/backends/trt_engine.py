"""Engines of TensorRT and TensorRT-RTX: two libraries, one Python API, given here as the argument `trt`.

Only names that both have are used (a test reads them out of this file and looks them up in both); what one alone has
stays in its own backend. Networks are strongly typed: precision is in the graph, as casts and Q/DQ.

Source: https://docs.nvidia.com/deeplearning/tensorrt/ and https://docs.nvidia.com/deeplearning/tensorrt-rtx/
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bmctl.backends.trt_mend import mend, open_quietly, usual_feed
from bmctl.core.runner import shown
from bmctl.errors import DependencyError, PackageError, UnsupportedError
from bmctl.schema import Signature, Span

MAX_MANIFEST_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Device:
    """The GPU of this process: its marketing name, and its compute capability as `sm89`."""

    name: str
    capability: str


def find_device() -> Device | None:
    """The current CUDA device, or None."""
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return Device(name=torch.cuda.get_device_name(), capability=f"sm{major}{minor}")


def build_engine(
    trt: Any,
    onnx_path: Path,
    *,
    signature: Signature,
    axes: Mapping[str, Span],
    out: Path,
    tf32: bool,
    prepare: Callable[[Any], None],
) -> dict[str, Any]:
    """Parse the graph and write its engine to `out`.

    Args:
        trt: The module `tensorrt` or `tensorrt_rtx`.
        signature: Of the graph; it names the free axes.
        axes: Smallest, most common and largest size of each free axis.
        tf32: Let fp32 matrix products round their inputs to 10 bits.
        prepare: Told the builder's settings before the build, for what one of the libraries alone has.

    Returns:
        For the manifest: version, profile per input as (min, opt, max) shapes or values, what was mended in the graph
        (see trt_mend), hash, messages.

    Raises:
        UnsupportedError: The parser or the builder refuses the graph; operators are named.
    """
    graph, mended = mend(onnx_path, signature=signature, axes=axes)
    if any(spec.dtype == "float64" for spec in (*signature.inputs, *signature.outputs)):
        mended.append("float64 is computed in float32")
    logger = find_logger(trt)
    logger.drain()
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(graph, str(onnx_path)):
        problems = [_describe(parser.get_error(i)) for i in range(parser.num_errors)]
        raise UnsupportedError(
            f"{trt.__name__} {trt.__version__} cannot parse {onnx_path.name}: " + "; ".join(problems[:5]),
            hint="keep this graph on onnxruntime or openvino, or replace the operators named",
        )
    settings = builder.create_builder_config()
    if not tf32:
        settings.clear_flag(trt.BuilderFlag.TF32)
    profiles = _add_profile(builder, network, settings, signature, axes, onnx_path=onnx_path)
    prepare(settings)
    memory = builder.build_serialized_network(network, settings)
    if memory is None:
        errors = logger.drain(errors_only=True) or ["no reason given"]
        raise UnsupportedError(
            f"{trt.__name__} {trt.__version__} cannot build {onnx_path.name}: " + "; ".join(errors[:3])[:600],
            hint="leave out the compute capability, or replace the operator, that the message names",
        )
    data = bytes(memory)
    out.write_bytes(data)
    return {
        "runtime": trt.__name__,
        "version": trt.__version__,
        "profile": profiles,
        "tf32": tf32,
        "mended": mended,
        "sha256": hashlib.sha256(data).hexdigest(),
        "messages": list(dict.fromkeys(logger.drain()))[:20],
    }


def _describe(problem: Any) -> str:
    """One parser error, with the operator and the node's name."""
    return f"{problem.node_operator() or 'graph'} {problem.node_name()!r}: {' '.join(problem.desc().split())[:200]}"


def _add_profile(
    builder: Any, network: Any, settings: Any, signature: Signature, axes: Mapping[str, Span], *, onnx_path: Path
) -> dict[str, list[list[int]]]:
    """One optimization profile over all inputs with a free axis, by name their (min, opt, max) shapes; or the values of
    those that say a shape, which are found with ONNX Runtime.
    """
    profile = builder.create_optimization_profile()
    specs = {spec.name: spec for spec in signature.inputs}
    shapes: dict[str, list[list[int]]] = {}
    is_free = False
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        spec = specs[tensor.name]
        missing = [axis for axis in spec.shape if isinstance(axis, str) and axis not in axes]
        if missing:
            raise UnsupportedError(
                f"input {tensor.name!r} is {shown(spec)}, and nobody says which sizes {missing[0]!r} will have",
                hint=f"--axis {missing[0]}=1:32:128",
            )
        wanted = [[_size(axes, axis, which) for axis in spec.shape] for which in ("min", "opt", "max")]
        shapes[tensor.name] = wanted
        if tensor.is_shape_tensor:
            is_free = True
            shapes[tensor.name] = values = _values(onnx_path, tensor.name, signature, axes)
            profile.set_shape_input(tensor.name, *values)
        elif wanted[0] != list(tensor.shape):  # a free axis is -1 there
            is_free = True
            profile.set_shape(tensor.name, *(tuple(shape) for shape in wanted))
    if is_free and settings.add_optimization_profile(profile) < 0:
        raise UnsupportedError(f"the sizes {shapes} were not taken")
    return shapes


def _values(onnx_path: Path, name: str, signature: Signature, axes: Mapping[str, Span]) -> list[list[int]]:
    """Smallest, most common and largest numbers of an input that says a shape."""
    from bmctl.core.onnxfile import taken_in

    session = open_quietly(taken_in(onnx_path) or str(onnx_path))
    found = []
    for which in ("min", "opt", "max"):
        feed = usual_feed(onnx_path, session, signature=signature, axes=axes, which=which)
        found.append([int(value) for value in feed[name].reshape(-1)])
    columns = [sorted(column) for column in zip(*found, strict=True)]
    return [[column[i] for column in columns] for i in range(3)]


def _size(axes: Mapping[str, Span], axis: int | str, which: str) -> int:
    return axis if isinstance(axis, int) else int(getattr(axes[axis], which))


def check_engine(meta: Mapping[str, Any], *, trt: Any, device: Device) -> None:
    """An engine is executable code made for one version and certain GPUs: refuse any other pairing.

    Args:
        meta: What `build_engine` returned and the backend added: `capabilities`, or the `gpu` it was built on.
        trt: The module that would open it.
        device: The GPU that would run it.

    Raises:
        PackageError: It was built by the other library or another version, or for other GPUs.
    """
    hint = "build it again on this machine: bmctl export RUN --tensorrt --overwrite"
    if meta.get("runtime") != trt.__name__:
        raise PackageError(f"the engine was built by {meta.get('runtime')}, this is {trt.__name__}", hint=hint)
    if meta.get("version") != trt.__version__:
        raise PackageError(
            f"the engine was built by {trt.__name__} {meta.get('version')}, here is {trt.__version__}", hint=hint
        )
    gpu, capabilities = meta.get("gpu"), meta.get("capabilities")
    if gpu is not None and gpu != {"name": device.name, "capability": device.capability}:
        raise PackageError(f"the engine was built for {gpu}, this GPU is {device}", hint=hint)
    if gpu is None and device.capability not in (capabilities or ()):
        raise PackageError(f"the engine was built for {capabilities}, this GPU is {device}", hint=hint)


def read_engine(artifact: Path, meta: Mapping[str, Any] | None) -> tuple[bytes, Mapping[str, Any]]:
    """The engine's bytes, with their hash checked, and its manifest's `meta`.

    Args:
        artifact: The engine file.
        meta: Of a verified manifest; None reads `manifest.json` beside the file.

    Raises:
        PackageError: No manifest, a broken one, or other bytes than it was written for.
    """
    if meta is None:
        meta = _read_meta(artifact)
    try:
        data = artifact.read_bytes()
    except OSError as error:
        raise PackageError(f"cannot read {artifact}: {error.strerror}") from error
    if hashlib.sha256(data).hexdigest() != meta.get("sha256"):
        raise PackageError(
            f"{artifact} is not the engine that its manifest was written for: the hash differs",
            hint="build it again: bmctl export RUN --tensorrt --overwrite",
        )
    return data, meta


def _read_meta(artifact: Path) -> Mapping[str, Any]:
    path = artifact.parent / "manifest.json"
    hint = "an engine is executable code: only one that bmctl built is opened; bmctl export RUN --tensorrt"
    if path.is_symlink() or not path.is_file() or path.stat().st_size > MAX_MANIFEST_BYTES:
        raise PackageError(f"{artifact} has no manifest.json beside it", hint=hint)
    try:
        manifest = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise PackageError(f"{path} is not JSON: {error}", hint=hint) from error
    meta = manifest.get("meta") if isinstance(manifest, dict) and manifest.get("artifact") == artifact.name else None
    if not isinstance(meta, dict):
        raise PackageError(f"{path} does not speak of {artifact.name}", hint=hint)
    return meta


def require_device(meta: Mapping[str, Any], *, trt: Any) -> Device:
    """The GPU, once it and the library are known to fit the engine.

    Raises:
        DependencyError: There is none.
        PackageError: They do not fit.
    """
    device = find_device()
    if device is None:
        raise DependencyError(
            "built, not run: no NVIDIA GPU here", hint="copy the deploy directory to a machine with the GPU"
        )
    check_engine(meta, trt=trt, device=device)
    return device


@functools.cache
def find_logger(trt: Any) -> Any:
    """Collects what the library says: one per library, for TensorRT keeps the first one that a process gave it."""

    class Collector(trt.ILogger):
        """Keeps warnings and errors in place of printing them."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[tuple[Any, str]] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity <= trt.ILogger.Severity.WARNING:
                self.lines.append((severity, " ".join(msg.split())))

        def drain(self, *, errors_only: bool = False) -> list[str]:
            lines, self.lines = self.lines, []
            return [text for severity, text in lines if not errors_only or severity <= trt.ILogger.Severity.ERROR]

    return Collector()
