"""One file = one runtime. A new backend is a file here and a line in BACKENDS."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, Protocol

from bmctl.backends import onnxruntime, openvino, tensorrt, tensorrt_rtx
from bmctl.core.runner import Runner
from bmctl.schema import Signature, Span, Strict


class Backend(Protocol):
    """A module of this folder. `name` in Config names it."""

    Config: type[Strict]
    SUFFIX: str
    DEVICE: str
    """Where its artifacts compute: ``cpu`` or ``cuda``."""

    def unavailable(self, config: Strict) -> str:
        """Why this machine cannot run artifacts of this backend, or the empty string."""
        ...

    def build(
        self, onnx_path: Path, *, config: Strict, signature: Signature, axes: Mapping[str, Span], out: Path
    ) -> dict[str, Any]:
        """Write the artifact to the file `out`; returns what the deploy manifest records as its `meta`.

        Args:
            signature: Of the graph.
            axes: Sizes of its free axes that will be asked for, by name.
        """
        ...

    def open(
        self,
        artifact: Path,
        *,
        config: Strict,
        signature: Signature | None = None,
        meta: Mapping[str, Any] | None = None,
    ) -> Runner:
        """Load the artifact.

        Args:
            signature: As a verified manifest has it; None reads it from the file, where free axes may have no names.
            meta: What `build` returned, as a verified manifest has it. Engines are executable code and need it; without
                it they look for a `manifest.json` beside the file.
        """
        ...


BACKENDS: Mapping[str, ModuleType] = MappingProxyType(
    {"onnxruntime": onnxruntime, "openvino": openvino, "tensorrt_rtx": tensorrt_rtx, "tensorrt": tensorrt}
)
