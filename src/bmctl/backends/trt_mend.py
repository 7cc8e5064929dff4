"""A graph as TensorRT takes it, and the proof on ONNX Runtime that it still computes the same."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bmctl.errors import UnsupportedError, first_line
from bmctl.schema import BATCH, Signature, Span

if TYPE_CHECKING:
    import numpy as np

    from bmctl.core.noise import Feed

CLOSE, CLOSE_INT8 = 1e-2, 0.25
"""Largest error of a mended graph on noise, as a fraction of the largest output. Integers have half the steps where
both signs share them, and ranges were not made for noise; a graph that is mended wrongly is off by the scale itself.
"""


def mend(onnx_path: Path, *, signature: Signature, axes: Mapping[str, Span]) -> tuple[bytes, list[str]]:
    """The graph to parse, and what was changed in it, in words, with the error that was measured.

    Raises:
        UnsupportedError: What would have to be mended cannot be, or computes something else once it is.
    """
    import onnx

    from bmctl.backends import quantized_operators, trt_contrib
    from bmctl.backends.rewriting import rewrite
    from bmctl.backends.trt_graph import mend_quantizers

    model = onnx.load(onnx_path)
    done = [*rewrite(model, quantized_operators.RULES), *rewrite(model, trt_contrib.RULES)]
    is_quantized = bool(done) and any(
        said.startswith((quantized_operators.DYNAMIC, quantized_operators.STATIC)) for said in done
    )
    quantizers = mend_quantizers(model)
    done += quantizers
    if not done:
        return onnx_path.read_bytes(), []
    error = prove(onnx_path, model.SerializeToString(), signature=signature, axes=axes)
    limit = CLOSE_INT8 if quantizers or is_quantized else CLOSE
    if error > limit:
        raise UnsupportedError(
            f"{onnx_path.name}, mended for TensorRT ({'; '.join(done)}), gives other outputs on ONNX Runtime: error "
            f"{error:.1e} of their scale, at most {limit:.0e}",
            hint="keep this graph on onnxruntime or openvino",
        )
    proof = f"on ONNX Runtime the mended graph is off by {error:.1e} of the outputs' scale"
    return model.SerializeToString(), [*done, proof]


def prove(onnx_path: Path, mended: bytes, *, signature: Signature, axes: Mapping[str, Span]) -> float:
    """max |mended - original| / max |original| over all outputs, on noise at the axes' most common sizes."""
    from bmctl.core.onnxfile import taken_in

    original = open_quietly(taken_in(onnx_path) or str(onnx_path))
    feed = usual_feed(onnx_path, original, signature=signature, axes=axes)
    names = [spec.name for spec in signature.outputs]
    right = original.run(names, feed)
    try:
        judged = open_quietly(mended).run(names, feed)
    except Exception as error:
        raise UnsupportedError(
            f"{onnx_path.name}, mended for TensorRT, does not run: {first_line(error)}",
            hint="keep this graph on onnxruntime or openvino",
        ) from error
    return max(_error(one, other) for one, other in zip(right, judged, strict=True))


def usual_feed(
    onnx_path: Path, session: Any, *, signature: Signature, axes: Mapping[str, Span], which: str = "opt"
) -> Feed:
    """Noise that the graph takes where its free axes have their smallest, most common or largest sizes.

    Raises:
        UnsupportedError: It takes none.
    """
    import onnx

    from bmctl.core.noise import fitting, index_limits

    sizes = {axis: getattr(span, which) for axis, span in axes.items()}
    if BATCH in sizes and which == "max":
        sizes[BATCH] = axes[BATCH].opt
    limits = index_limits(onnx.load(onnx_path, load_external_data=False))
    names = [spec.name for spec in signature.outputs]
    try:
        return fitting(lambda feed: session.run(names, feed), signature, sizes=sizes, limits=limits)[1]
    except Exception as error:
        raise UnsupportedError(
            f"{onnx_path.name} takes none of the noise that was tried, on which TensorRT's engine would be made: "
            f"{first_line(error)}",
            hint="keep this graph on onnxruntime or openvino, or make a constant of the input that says a shape",
        ) from error


def open_quietly(source: str | bytes) -> Any:
    import onnxruntime as ort

    ort.disable_telemetry_events()
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise UnsupportedError(
            f"ONNX Runtime, on which graphs are proven for TensorRT, does not take it: {first_line(error)}",
            hint="export the model again with standard operators",
        ) from error


def _error(right: np.ndarray, judged: np.ndarray) -> float:
    import numpy as np

    if right.shape != judged.shape:
        return float("inf")
    if right.dtype.kind != "f":
        return float((right != judged).mean()) if right.size else 0.0
    one, other = right.astype(np.float64), judged.astype(np.float64)
    finite = np.isfinite(one)
    if not np.array_equal(one[~finite], other[~finite], equal_nan=True):
        return float("inf")
    scale = max(float(np.abs(one[finite]).max(initial=0.0)), 1e-12)
    return float(np.abs(one[finite] - other[finite]).max(initial=0.0)) / scale
