"""One file = one runtime. A new backend is a file here and a line in BACKENDS."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, ModuleType, TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

from bmctl.backends import onnxruntime, openvino, tensorrt, tensorrt_rtx
from bmctl.errors import DataError, PackageError, UnsupportedError
from bmctl.schema import Strict, TensorSpec

if TYPE_CHECKING:
    import numpy as np


class Runner(Protocol):
    """An open artifact. Names, shapes and dtypes are checked by `check_feed`, in one place.

    Attributes:
        inputs: What `run` must be fed; a size of None takes anything.
        outputs: What it returns.
        batch: Smallest and largest number of samples per call; None is no limit.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batch: tuple[int, int | None]

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
        """Write the artifact to the file `out`; returns what the deploy manifest records as its `meta`."""
        ...

    def open(self, artifact: Path, *, config: Strict, meta: Mapping[str, Any] | None = None) -> Runner:
        """Load the artifact; `meta` is what `build` returned, as a verified manifest has it.

        Engines are executable code and need it; without it they look for a `manifest.json` beside the file.
        """
        ...


def check_feed(
    feed: Mapping[str, np.ndarray], *, inputs: Sequence[TensorSpec], batch: tuple[int, int | None] = (1, None)
) -> dict[str, np.ndarray]:
    """What every runner takes and refuses, so that all backends refuse alike.

    Args:
        feed: Array [n, ...] per input name.
        inputs: Names, sizes (None takes anything) and NumPy dtypes, the batch dimension first.
        batch: Smallest and largest n; None is no limit.

    Returns:
        The same arrays, C-contiguous, in the order of `inputs`.

    Raises:
        DataError: Names, ranks, sizes, dtypes, an n of 0, outside `batch` or not the same everywhere, nan or inf.
    """
    import numpy as np

    names = [spec.name for spec in inputs]
    if set(feed) != set(names):
        raise DataError(f"the inputs are named {sorted(feed)}, expected {sorted(names)}")
    checked: dict[str, np.ndarray] = {}
    for spec in inputs:
        array = feed[spec.name]
        if not isinstance(array, np.ndarray):
            raise DataError(f"input {spec.name!r} is a {type(array).__name__}, expected a NumPy array")
        if array.dtype != np.dtype(spec.dtype):
            raise DataError(f"input {spec.name!r} is {array.dtype}, expected {spec.dtype}")
        fits = len(array.shape) == len(spec.shape)
        fits = fits and all(want in (None, got) for got, want in zip(array.shape, spec.shape, strict=True))
        if not fits or 0 in array.shape[1:]:
            want = "[" + ", ".join("n" if size is None else str(size) for size in spec.shape) + "]"
            raise DataError(f"input {spec.name!r} has the shape {list(array.shape)}, expected {want}")
        checked[spec.name] = np.ascontiguousarray(array)
    _check_batch({name: array.shape[0] for name, array in checked.items() if array.ndim}, batch)
    for name, array in checked.items():
        if not _is_finite(array):
            raise DataError(f"input {name!r} holds nan or inf")
    return checked


def _check_batch(sizes: Mapping[str, int], batch: tuple[int, int | None]) -> None:
    if len(set(sizes.values())) > 1:
        raise DataError(f"the inputs differ in their number of samples: {dict(sizes)}")
    low, high = batch
    for num_samples in set(sizes.values()):
        if num_samples == 0:
            raise DataError("the batch is empty")
        if num_samples < low or (high is not None and num_samples > high):
            raise DataError(
                f"a batch of {num_samples} is outside the profile that the engine was built for: {low} to {high}",
                hint="send batches of that size, or build with other `export.batch` sizes",
            )


def _is_finite(array: np.ndarray) -> bool:
    """Whether no element is nan or inf: a sum shows it in one fast pass; only a sum that overflowed needs a second."""
    import numpy as np

    if array.dtype.kind != "f":
        return True
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(array.sum())) or bool(np.isfinite(array).all())


def copy_graph(onnx_path: Path, *, out: Path) -> None:
    """Copy a checked ONNX graph to one file: byte for byte, or with external data taken in.

    Raises:
        PackageError: It is not a valid ONNX file.
        UnsupportedError: With its external data it is over protobuf's 2 GiB.
    """
    import shutil

    import onnx

    try:
        onnx.checker.check_model(onnx_path)
        model = onnx.load(onnx_path, load_external_data=False)
    except (onnx.checker.ValidationError, ValueError, OSError, RuntimeError) as error:
        raise PackageError(f"{onnx_path} is not a valid ONNX graph: {first_line(error)}") from error
    external = [tensor for tensor in model.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]
    if not external:
        shutil.copyfile(onnx_path, out)
        return
    model = onnx.load(onnx_path)
    if model.ByteSize() > 2**31 - 1:
        raise UnsupportedError(
            f"{onnx_path} holds {model.ByteSize() / 2**30:.1f} GiB; one file takes 2 GiB",
            hint="make it smaller first, with `bmctl quantize` or `bmctl compress`",
        )
    onnx.save(model, out)


def first_line(error: BaseException) -> str:
    """What a runtime's exception says, on one line of at most 300 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


BACKENDS: Mapping[str, ModuleType] = MappingProxyType(
    {"onnxruntime": onnxruntime, "openvino": openvino, "tensorrt_rtx": tensorrt_rtx, "tensorrt": tensorrt}
)
