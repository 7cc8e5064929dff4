"""What an ONNX graph says, on ONNX Runtime: for scores and timings of packages, and as the reference of artifacts.

ONNX Runtime has no bf16 kernels on CPUs: there a bf16 graph is computed in fp32, with the same weights.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx

from bmctl.backends import onnxruntime
from bmctl.core import onnxgraph
from bmctl.core.halftypes import widen
from bmctl.core.runner import Runner
from bmctl.schema import Signature


@contextmanager
def open_graph(
    path: Path, *, signature: Signature | None = None, config: onnxruntime.Config | None = None
) -> Iterator[Runner]:
    """A frozen package's graph, ready to run; without a signature, that of the file."""
    config = config or onnxruntime.Config()
    if onnxgraph.precision_of(path) != "bf16":
        with onnxruntime.open(path, config=config, signature=signature) as runner:
            yield runner
        return
    with tempfile.TemporaryDirectory(prefix="bmctl-") as folder:
        wide = Path(folder) / "model.onnx"
        wide.write_bytes(widen(onnx.load(path)).SerializeToString())
        with onnxruntime.open(wide, config=config, signature=signature) as runner:
            yield runner


@contextmanager
def open_reference(path: Path, *, signature: Signature) -> Iterator[tuple[Runner, str]]:
    """The graph as it stands, with nothing fused or rewritten, and the words for it."""
    words = "the graph on ONNX Runtime, as it stands"
    if onnxgraph.precision_of(path) == "bf16":
        words = "the same bf16 weights computed in fp32 on ONNX Runtime"
    config = onnxruntime.Config(optimization="none", device="cpu")
    with open_graph(path, signature=signature, config=config) as runner:
        yield runner, words
