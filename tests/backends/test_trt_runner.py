"""The path that runs engines, on a stand-in that computes on the CPU; a real engine has its test in tests/gpu.

The stand-in knows an engine only by the addresses that it is given, as the library does. That the names it has are the
library's own is what test_trt_names checks.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bmctl.backends import trt_runner
from bmctl.backends.trt_runner import EngineRunner
from bmctl.errors import DataError, PackageError, ResourceError
from bmctl.schema import Signature, TensorSpec


class Severity(enum.IntEnum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3


class ILogger:
    Severity = Severity


class Context:
    """y = 2 x over float32 [n, 3], through raw addresses."""

    def __init__(self, library: FakeLibrary) -> None:
        self.library = library
        self.shape: tuple[int, ...] | None = None
        self.addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shape = shape
        return name == "x"

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shape or (-1, 3)

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self.addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        if self.library.fails:
            self.library.logger.log(Severity.ERROR, "out of  luck")
            return False
        assert self.shape is not None
        size = int(np.prod(self.shape))
        x, y = ((ctypes.c_float * size).from_address(self.addresses[name]) for name in ("x", "y"))
        y[:] = [2 * value for value in x]
        self.library.executed.append(stream_handle)
        return True


class Engine:
    num_io_tensors = 2

    def __init__(self, library: FakeLibrary) -> None:
        self.library = library

    def get_tensor_name(self, index: int) -> str:
        return ("x", "y")[index]

    def get_tensor_mode(self, name: str) -> str:
        return {"x": "input", "y": "output"}[name]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (-1, 3)

    def get_tensor_dtype(self, name: str) -> str:
        return "float"

    def is_shape_inference_io(self, name: str) -> bool:
        return False

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        return [(1, 3), (2, 3), (4, 3)]

    def create_execution_context(self) -> Context:
        return Context(self.library)


class FakeLibrary:
    """Stands in for the module `tensorrt`."""

    __name__ = "tensorrt"
    __version__ = "11.4"
    ILogger = ILogger
    TensorIOMode = SimpleNamespace(INPUT="input", OUTPUT="output")
    DataType = SimpleNamespace(
        FLOAT="float", HALF="half", INT8="int8", UINT8="uint8", INT32="int32", INT64="int64", BOOL="bool"
    )

    def __init__(self) -> None:
        self.fails = False
        self.executed: list[int] = []
        self.logger: Any = None

    def Runtime(self, logger: Any) -> Any:
        self.logger = logger
        return SimpleNamespace(deserialize_cuda_engine=lambda data: Engine(self) if data == b"engine" else None)


class Stream:
    cuda_stream = 7

    def synchronize(self) -> None:
        pass


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> FakeLibrary:
    monkeypatch.setattr(trt_runner, "DEVICE", "cpu")
    monkeypatch.setattr("torch.cuda.Stream", Stream)
    monkeypatch.setattr("torch.cuda.stream", lambda stream: contextlib.nullcontext())
    return FakeLibrary()


def test_an_engine_is_fed_and_read(library: FakeLibrary) -> None:
    with EngineRunner(library, b"engine") as runner:
        assert [spec.name for spec in runner.signature.inputs] == ["x"]
        assert runner.signature.inputs[0].shape == ("batch", 3)
        assert [spec.name for spec in runner.signature.outputs] == ["y"]
        assert runner.bounds == {"batch": (1, 4)}
        for size in (4, 1):
            x = np.arange(3 * size, dtype=np.float32).reshape(size, 3)
            x.flags.writeable = False
            np.testing.assert_array_equal(runner.run({"x": x})["y"], 2 * x)
    assert library.executed == [Stream.cuda_stream] * 2


class ShapeContext(Context):
    """y of the shape that `shape` says, x over again; as the library, it reads `shape` from the host's memory."""

    def __init__(self, library: FakeLibrary) -> None:
        super().__init__(library)
        self.shapes: dict[str, tuple[int, ...]] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple((ctypes.c_int64 * 2).from_address(self.addresses["shape"]))

    def execute_async_v3(self, stream_handle: int) -> bool:
        size = int(np.prod(self.shapes["x"]))
        x, y = ((ctypes.c_float * size).from_address(self.addresses[name]) for name in ("x", "y"))
        y[:] = list(x)
        return True


class ShapeEngine(Engine):
    num_io_tensors = 3

    def get_tensor_name(self, index: int) -> str:
        return ("x", "shape", "y")[index]

    def get_tensor_mode(self, name: str) -> str:
        return "output" if name == "y" else "input"

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return {"x": (-1, 6), "shape": (2,), "y": (-1, -1)}[name]

    def get_tensor_dtype(self, name: str) -> str:
        return "int64" if name == "shape" else "float"

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        return [(1, 6), (2, 6), (4, 6)]

    def is_shape_inference_io(self, name: str) -> bool:
        return name == "shape"

    def create_execution_context(self) -> Context:
        return ShapeContext(self.library)


def test_what_says_a_shape_is_known_before_outputs_are_made(
    library: FakeLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = SimpleNamespace(deserialize_cuda_engine=lambda data: ShapeEngine(library))
    monkeypatch.setattr(library, "Runtime", lambda logger: runtime)
    x = np.arange(12, dtype=np.float32).reshape(2, 6)
    with EngineRunner(library, b"engine") as runner:
        assert runner._hosted == {"shape"}
        y = runner.run({"x": x, "shape": np.array([4, 3])})["y"]
        monkeypatch.setattr(trt_runner, "DEVICE", "meta")
        assert runner._held("shape", np.array([4, 3])).device.type == "cpu"
        assert runner._held("x", x).device.type == "meta"
    np.testing.assert_array_equal(y, x.reshape(4, 3))


def test_float64_is_handed_over_in_float32(library: FakeLibrary) -> None:
    """TensorRT's parser makes float32 of float64 inputs and outputs."""
    spec = {"dtype": "float64", "shape": ("batch", 3)}
    signature = Signature(inputs=(TensorSpec(name="x", **spec),), outputs=(TensorSpec(name="y", **spec),))  # type: ignore[arg-type]
    x = np.arange(6, dtype=np.float64).reshape(2, 3)
    with EngineRunner(library, b"engine", signature=signature) as runner:
        y = runner.run({"x": x})["y"]
    assert y.dtype == np.float64
    np.testing.assert_array_equal(y, 2 * x)


def test_a_batch_outside_the_profile_never_reaches_the_library(library: FakeLibrary) -> None:
    with EngineRunner(library, b"engine") as runner, pytest.raises(DataError, match="outside the profile"):
        runner.run({"x": np.zeros((5, 3), np.float32)})
    assert library.executed == []


def test_what_the_library_says_is_in_the_error(library: FakeLibrary) -> None:
    library.fails = True
    with (
        EngineRunner(library, b"engine") as runner,
        pytest.raises(ResourceError, match="refused the batch: out of luck"),
    ):
        runner.run({"x": np.zeros((1, 3), np.float32)})


def test_bytes_that_are_no_engine(library: FakeLibrary) -> None:
    with pytest.raises(PackageError, match="cannot open the engine"):
        EngineRunner(library, b"something else")


def test_closing_lets_go(library: FakeLibrary) -> None:
    with EngineRunner(library, b"engine") as runner:
        pass
    assert (runner._context, runner._engine, runner._runtime) == (None, None, None)
    with pytest.raises(ValueError, match="closed"):
        runner.run({"x": np.zeros((1, 3), np.float32)})
