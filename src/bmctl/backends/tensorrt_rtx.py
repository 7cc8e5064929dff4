"""TensorRT-RTX: an engine for a list of compute capabilities, built anywhere; the GPU that opens it finishes it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from bmctl.backends.trt_engine import build_engine, find_device, read_engine, require_device
from bmctl.errors import DependencyError, UnsupportedError
from bmctl.schema import Many, Signature, Span, Strict

if TYPE_CHECKING:
    from bmctl.backends.trt_runner import EngineRunner

SUFFIX = ".rtx.engine"
PROFILED = True
FLAG = "tensorrt"
ANYWHERE = "SM75 to SM121 without SM90 and SM100"
DEVICE = "cuda"

CAPABILITIES = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")
"""What TensorRT-RTX 1.7 serves: Turing to Blackwell without the data centre's sm90 and sm100."""


class Config(Strict):
    """Attributes:
    capabilities: Compute capabilities to build for. sm75 (Turing) is not among the defaults: it has no fp32 matrix
        products there, so that most graphs are refused for it.
    tf32: Let fp32 matrix products round their inputs to 10 bits: faster, and no longer fp32.
    """

    name: Literal["tensorrt_rtx"] = "tensorrt_rtx"
    capabilities: Many[str] = Field(default=CAPABILITIES[1:], min_length=1)
    tf32: bool = False

    @field_validator("capabilities")
    @classmethod
    def _served(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name not in CAPABILITIES:
                instead = "; TensorRT itself serves it: take the backend tensorrt" if name in ("sm90", "sm100") else ""
                raise ValueError(f"{name} is not served by TensorRT-RTX ({', '.join(CAPABILITIES)}){instead}")
        if len(set(value)) < len(value):
            raise ValueError("a capability is named twice")
        return value


def unavailable(config: Config) -> str:
    """Why this machine cannot run artifacts of this backend, or the empty string."""
    try:
        import tensorrt_rtx
    except ImportError as error:
        return f"tensorrt_rtx is not installed ({error})"
    device = find_device()
    if device is None:
        return f"TensorRT-RTX {tensorrt_rtx.__version__} is here, but no NVIDIA GPU"
    if device.capability not in config.capabilities:
        return f"{device.name} ({device.capability}) is not among the capabilities {', '.join(config.capabilities)}"
    return ""


def build(
    onnx_path: Path, *, config: Config, signature: Signature, axes: Mapping[str, Span], out: Path
) -> dict[str, Any]:
    """Build an engine for `config.capabilities`; no GPU is needed.

    Args:
        onnx_path: The graph.
        axes: Smallest, most common and largest size of each free axis.
        out: The file to write.

    Raises:
        DependencyError: tensorrt_rtx is missing.
        UnsupportedError: The graph is refused; operators are named.
    """
    trt = _load()

    def prepare(settings: Any) -> None:
        settings.num_compute_capabilities = len(config.capabilities)
        for i, name in enumerate(config.capabilities):
            if not settings.set_compute_capability(getattr(trt.ComputeCapability, name.upper()), i):
                raise UnsupportedError(f"TensorRT-RTX {trt.__version__} does not take the capability {name}")

    meta = build_engine(trt, onnx_path, signature=signature, axes=axes, out=out, tf32=config.tf32, prepare=prepare)
    return meta | {"capabilities": list(config.capabilities)}


def open(
    artifact: Path, *, config: Config, signature: Signature | None = None, meta: Mapping[str, Any] | None = None
) -> EngineRunner:
    """Run an engine that its manifest vouches for: its hash, the TensorRT-RTX version and the GPU.

    Raises:
        PackageError: No manifest, or it does not fit the file, the version or the GPU.
        DependencyError: tensorrt_rtx or a GPU is missing.
    """
    data, meta = read_engine(artifact, meta)
    trt = _load()
    require_device(meta, trt=trt)
    from bmctl.backends.trt_runner import EngineRunner

    return EngineRunner(trt, data, signature=signature)


def _load() -> Any:
    try:
        import tensorrt_rtx
    except ImportError as error:
        raise DependencyError(
            f"tensorrt_rtx is not installed: {error}", hint="pip install 'bmctl[tensorrt-rtx]'"
        ) from error
    return tensorrt_rtx
