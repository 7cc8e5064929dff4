"""The graphs of the table: who makes each, and what becomes of it on each backend."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import onnx
from tests.graphs import exported, handmade, quantized

BACKENDS = ("onnxruntime", "openvino", "tensorrt_rtx")
BUILT, MENDED = "built", "mended"
CLASSIC = (
    "bvlc_alexnet", "densenet121", "inception_v1", "inception_v2", "resnet50", "shufflenet", "squeezenet", "vgg19",
    "zfnet512",
)  # fmt: skip


@dataclass(frozen=True)
class Graph:
    """One file of the table.

    Attributes:
        make: Writes it, and what lies beside it.
        expected: By backend: built, mended, or a pattern that is found in the reason for a refusal.
        quick: Among those that the quick tests go through.
    """

    name: str
    make: Callable[[Path], None]
    expected: dict[str, str]
    quick: bool = False

    def verdict(self, backend: str) -> str:
        return self.expected.get(backend, BUILT)


def classic(name: str) -> Callable[[Path], None]:
    """One of the graphs that the onnx package brings along."""

    def make(path: Path) -> None:
        folder = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
        shutil.copyfile(folder / f"light_{name}.onnx", path)

    return make


def makers(module: ModuleType) -> dict[str, Callable[[Path], None]]:
    """Functions of one path, in the order in which they stand in the file."""
    found = (
        one for one in vars(module).values() if callable(one) and getattr(one, "__module__", "") == module.__name__
    )
    return {one.__name__: one for one in found if list(getattr(one, "__annotations__", {})) == ["path", "return"]}


def everywhere(reason: str) -> dict[str, str]:
    return dict.fromkeys(BACKENDS, reason)


RTX, OPENVINO = "tensorrt_rtx", "openvino"
EXPECTED: dict[str, dict[str, str]] = {
    "light_squeezenet": {OPENVINO: "computes something else"},
    "proposals": {RTX: "RoiAlign"},
    "bfloat16_in": everywhere("is bfloat16, which NumPy"),
    "strings_in": everywhere("input 'x' holds strings"),
    "strings_out": everywhere("output 'y' holds strings"),
    "sequence_in": everywhere("input 'x' is a sequence"),
    "map_out": everywhere("output 'y' is a sequence"),
    "random_numbers": everywhere("another one in every call"),
    "foreign_domain": everywhere("acme::Secret, which no runtime"),
    "nonzero": {RTX: "NonZero"},
    "suppression": {RTX: "no runners that implement it"},
    "local_function": {OPENVINO: MENDED},
    "spectrum": {OPENVINO: "STFT"},
    "new_attention": {RTX: MENDED},
    "contrib_gelu": {RTX: MENDED},
    "contrib_norm": {RTX: MENDED},
    "contrib_matmul": {RTX: MENDED},
    "contrib_attention": {RTX: MENDED},
    "contrib_unknown": {OPENVINO: "com.microsoft.Inverse", RTX: "Inverse"},
    "linear_regressor": {OPENVINO: "ai.onnx.ml.LinearRegressor", RTX: "LinearRegressor"},
    "tree_classifier": {OPENVINO: "TreeEnsembleClassifier", RTX: "TreeEnsembleClassifier"},
    "qdq_default": {RTX: MENDED},
    "qdq_unsigned": {RTX: MENDED},
    "qdq_per_channel": {RTX: MENDED},
    "qdq_unsigned_weights": {RTX: MENDED},
    "qoperator": {OPENVINO: MENDED, RTX: MENDED},
    "dynamic_matmul": {RTX: MENDED},
    "dynamic_conv": {RTX: MENDED},
    "dynamic_lstm": {RTX: MENDED},
    "four_bits": {RTX: MENDED},
}
QUICK = {
    "siamese", "three_inputs", "bert", "gpt2_with_past", "lstm_time_first", "bool_mask", "scalar_input", "kv_cache",
    "called_free", "shape_input", "contrib_attention", "qdq_default", "qoperator", "dynamic_matmul", "strings_in",
    "local_function",
}  # fmt: skip

GRAPHS = tuple(
    Graph(name, make, EXPECTED.get(name, {}), name in QUICK)
    for name, make in {
        **{f"light_{name}": classic(name) for name in CLASSIC},
        **makers(exported),
        **makers(handmade),
        **makers(quantized),
    }.items()
)
