"""TensorRT: an engine for the GPU of the machine that builds it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bmctl.backends.trt_engine import build_engine, find_device, read_engine, require_device
from bmctl.errors import DependencyError
from bmctl.schema import Signature, Span, Strict

if TYPE_CHECKING:
    from bmctl.backends.trt_runner import EngineRunner

SUFFIX = ".engine"
PROFILED = True
FLAG = "tensorrt"
ANYWHERE = ""
DEVICE = "cuda"


class Config(Strict):
    """Attributes:
    tf32: Let fp32 matrix products round their inputs to 10 bits: faster, and no longer fp32.
    """

    name: Literal["tensorrt"] = "tensorrt"
    tf32: bool = False


def unavailable(config: Config) -> str:
    """Why this machine cannot run artifacts of this backend, or the empty string."""
    try:
        import tensorrt
    except ImportError as error:
        return f"tensorrt is not installed ({error})"
    return "" if find_device() else f"TensorRT {tensorrt.__version__} is here, but no NVIDIA GPU"


def build(
    onnx_path: Path, *, config: Config, signature: Signature, axes: Mapping[str, Span], out: Path
) -> dict[str, Any]:
    """Build an engine for the GPU of this machine.

    Args:
        onnx_path: The graph.
        axes: Smallest, most common and largest size of each free axis.
        out: The file to write.

    Raises:
        DependencyError: tensorrt or a GPU is missing: TensorRT times its kernels on the target.
        UnsupportedError: The graph is refused; operators are named.
    """
    trt = _load()
    device = find_device()
    if device is None:
        raise DependencyError(
            "TensorRT builds engines on the GPU that runs them, and there is none here",
            hint="build where the GPU is, or take the backend tensorrt_rtx: it builds anywhere",
        )
    meta = build_engine(
        trt, onnx_path, signature=signature, axes=axes, out=out, tf32=config.tf32, prepare=lambda settings: None
    )
    return meta | {"gpu": dataclasses.asdict(device)}


def open(
    artifact: Path, *, config: Config, signature: Signature | None = None, meta: Mapping[str, Any] | None = None
) -> EngineRunner:
    """Run an engine that its manifest vouches for: its hash, the TensorRT version and the GPU.

    Raises:
        PackageError: No manifest, or it does not fit the file, the version or the GPU.
        DependencyError: tensorrt or a GPU is missing.
    """
    data, meta = read_engine(artifact, meta)
    trt = _load()
    require_device(meta, trt=trt)
    from bmctl.backends.trt_runner import EngineRunner

    return EngineRunner(trt, data, signature=signature)


def _load() -> Any:
    try:
        import tensorrt
    except ImportError as error:
        raise DependencyError(f"tensorrt is not installed: {error}", hint="pip install 'bmctl[tensorrt]'") from error
    return tensorrt
