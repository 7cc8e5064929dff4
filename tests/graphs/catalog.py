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
        expected: By backend: built, mended, or a pattern that is found in the reason for a refusal; what is not named is
            built.
        quick: Among those that the quick tests go through.
    """

    name: str
    make: Callable[[Path], None]
    expected: dict[str, str]
    quick: bool = False


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


EXPECTED: dict[str, dict[str, str]] = {}
QUICK: set[str] = set()

GRAPHS = tuple(
    Graph(name, make, EXPECTED.get(name, {}), name in QUICK)
    for name, make in {
        **{f"light_{name}": classic(name) for name in CLASSIC},
        **makers(exported),
        **makers(handmade),
        **makers(quantized),
    }.items()
)
