"""One file = one runtime. A new backend is a file here and a line in BACKENDS."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, ModuleType, TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

from bmctl.backends import onnxruntime, openvino, tensorrt, tensorrt_rtx
from bmctl.schema import Strict, TensorSpec

if TYPE_CHECKING:
    import numpy as np


class Runner(Protocol):
    """An open artifact. Names, shapes and dtypes are checked by `check_feed`, in one place."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def run(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Backend(Protocol):
    """A module of this folder. `name` in Config names it."""

    Config: type[Strict]
    SUFFIX: str

    def unavailable(self, config: Strict) -> str:
        """Why this machine cannot run artifacts of this backend, or the empty string."""
        ...
    def build(self, onnx_path: Path, *, config: Strict, batch: Any, out: Path) -> dict[str, Any]:
        """Write the artifact to the file `out`; returns what the deploy manifest records about it."""
        ...
    def open(self, artifact: Path, *, config: Strict) -> Runner: ...


BACKENDS: Mapping[str, ModuleType] = MappingProxyType(
    {"onnxruntime": onnxruntime, "openvino": openvino, "tensorrt_rtx": tensorrt_rtx, "tensorrt": tensorrt}
)
