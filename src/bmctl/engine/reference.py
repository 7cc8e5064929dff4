"""What an ONNX graph says, computed as it stands: the reference that artifacts of frozen packages are held against."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx

from bmctl.backends import Runner, onnxruntime
from bmctl.engine import onnxfile
from bmctl.engine.halfgraph import widen


@contextmanager
def open_reference(path: Path) -> Iterator[tuple[Runner, str]]:
    """ONNX Runtime without rewriting the graph, and the words for it.

    A bf16 graph, for which ONNX Runtime has no kernels on CPUs, is computed in fp32 with the same weights.
    """
    config = onnxruntime.Config(optimization="none", device="cpu")
    if onnxfile.precision_of(path) != "bf16":
        with onnxruntime.open(path, config=config) as runner:
            yield runner, "the graph on ONNX Runtime, as it stands"
        return
    with tempfile.TemporaryDirectory(prefix="bmctl-") as folder:
        wide = Path(folder) / "model.onnx"
        wide.write_bytes(widen(onnx.load(path)).SerializeToString())
        with onnxruntime.open(wide, config=config) as runner:
            yield runner, "the same bf16 weights computed in fp32 on ONNX Runtime"
