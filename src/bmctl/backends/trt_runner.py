"""Running an engine of TensorRT or TensorRT-RTX on the current CUDA device; torch lends it memory and a stream."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from bmctl.backends.trt_engine import find_logger
from bmctl.core.runner import Bounds, Closing, check_feed
from bmctl.errors import PackageError, ResourceError, UnsupportedError
from bmctl.schema import BATCH, Signature, TensorSpec

if TYPE_CHECKING:
    import numpy as np
    import torch

DEVICE = "cuda"


class EngineRunner(Closing):
    """A deserialized engine with one execution context; see core.runner.Runner.

    Args:
        trt: The module `tensorrt` or `tensorrt_rtx`.
        data: A serialized engine that `check_engine` let pass.
        signature: Names the free axes; without it the first is `batch`, and others have their input's name.
    """

    def __init__(self, trt: Any, data: bytes, *, signature: Signature | None = None) -> None:
        import torch

        self._trt = trt
        self._log = find_logger(trt)
        self._log.drain()
        runtime = trt.Runtime(self._log)
        engine = runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise PackageError(f"{trt.__name__} cannot open the engine: {self._reason()}")
        context = engine.create_execution_context()
        if context is None:
            raise ResourceError(f"{trt.__name__} cannot make an execution context: {self._reason()}")
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        fed = {name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT}
        self.signature = signature or Signature(
            inputs=tuple(_spec(trt, engine, name) for name in names if name in fed),
            outputs=tuple(_spec(trt, engine, name) for name in names if name not in fed),
        )
        self.bounds = _bounds(engine, self.signature.inputs)
        self._specs = {name: _spec(trt, engine, name) for name in names}
        # What says a shape is read on the host, before anything runs.
        self._hosted = {name for name in fed if engine.is_shape_inference_io(name)}
        self._runtime, self._engine, self._context = runtime, engine, context
        self._stream = torch.cuda.Stream()

    def run(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One batch; blocks until the outputs are there."""
        import torch

        context = self._context
        if context is None:
            raise ValueError("the runner is closed")
        checked = check_feed(feed, inputs=self.signature.inputs, bounds=self.bounds)
        with torch.cuda.stream(self._stream):
            # Kept in `held` until the stream is done: TensorRT has only their addresses.
            held = {name: self._held(name, array) for name, array in checked.items()}
            for name, array in held.items():
                self._expect(context.set_input_shape(name, tuple(array.shape)), f"the shape of {name!r}")
                self._expect(context.set_tensor_address(name, array.data_ptr()), f"the address of {name!r}")
            given: dict[str, torch.Tensor] = {}
            for spec in self.signature.outputs:
                shape = tuple(context.get_tensor_shape(spec.name))
                if -1 in shape:
                    raise UnsupportedError(f"the size of output {spec.name!r} depends on the data: {shape}")
                kind = getattr(torch, self._specs[spec.name].dtype)
                given[spec.name] = array = torch.empty(shape, dtype=kind, device=DEVICE)
                self._expect(context.set_tensor_address(spec.name, array.data_ptr()), f"the address of {spec.name!r}")
            self._expect(context.execute_async_v3(self._stream.cuda_stream), "the batch")
        self._stream.synchronize()
        # TensorRT computes float64 in float32, and hands it over as such.
        return {
            spec.name: given[spec.name].cpu().numpy().astype(spec.dtype, copy=False) for spec in self.signature.outputs
        }

    def _held(self, name: str, array: np.ndarray) -> torch.Tensor:
        """An input where the engine reads it, in the type that it has there."""
        import numpy as np
        import torch

        kept = np.require(array.astype(self._specs[name].dtype, copy=False), requirements="W")
        return torch.from_numpy(kept).to("cpu" if name in self._hosted else DEVICE)

    def _expect(self, taken: bool, what: str, /) -> None:
        if not taken:
            raise ResourceError(f"{self._trt.__name__} refused {what}: {self._reason()}")

    def _reason(self) -> str:
        return "; ".join(self._log.drain(errors_only=True)[:3])[:600] or "no reason given"

    def close(self) -> None:
        # In this order: a context must not outlive its engine.
        self._context = None
        self._engine = None
        self._runtime = None


def _spec(trt: Any, engine: Any, name: str) -> TensorSpec:
    dtypes = {
        trt.DataType.FLOAT: "float32",
        trt.DataType.HALF: "float16",
        trt.DataType.INT8: "int8",
        trt.DataType.UINT8: "uint8",
        trt.DataType.INT32: "int32",
        trt.DataType.INT64: "int64",
        trt.DataType.BOOL: "bool",
    }
    dtype = engine.get_tensor_dtype(name)
    if dtype not in dtypes:
        raise UnsupportedError(f"{name!r} is {dtype}; NumPy arrays cannot carry that")
    sizes = [int(size) for size in engine.get_tensor_shape(name)]
    shape = tuple((f"{name}.{i}" if i else BATCH) if size == -1 else size for i, size in enumerate(sizes))
    return TensorSpec(name=name, shape=shape, dtype=dtypes[dtype])


def _bounds(engine: Any, inputs: tuple[TensorSpec, ...]) -> dict[str, Bounds]:
    """Smallest and largest size of each free axis in profile 0, the narrowest over all inputs that have it."""
    found: dict[str, Bounds] = {}
    for spec in inputs:
        if not any(isinstance(axis, str) for axis in spec.shape):
            continue
        lows, _, highs = engine.get_tensor_profile_shape(spec.name, 0)
        for axis, low, high in zip(spec.shape, lows, highs, strict=True):
            if isinstance(axis, str):
                least, most = found.get(axis, (0, None))
                found[axis] = max(least, int(low)), int(high) if most is None else min(most, int(high))
    return found
