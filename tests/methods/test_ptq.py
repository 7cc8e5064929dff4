"""Static quantization: int8 in the file, close in its numbers, taken by every backend; and what is refused."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper
from tests.methods.graphs import make_context, run, samples, save_residual

from bmctl.backends import BACKENDS
from bmctl.core import onnxfile, onnxgraph
from bmctl.errors import DataError, InterruptedRunError, RecipeError, UnsupportedError
from bmctl.methods import ptq
from bmctl.methods.ptq import quantization
from bmctl.schema import Span


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_residual(tmp_path_factory.mktemp("fp32") / "model.onnx")


@pytest.fixture(scope="module")
def quantized(graph: Path) -> Path:
    out = graph.parent / "int8.onnx"
    meta = ptq.apply(graph, ptq.Config(), make_context([samples()[:16], samples()[16:]]), out=out)
    assert meta["precision"] == "int8" and meta["num_pairs"] == quantizers(out)
    assert meta["calibration"] == {"source": "noise", "num_samples": 24, "used": 24}
    assert meta["nncf"] and meta["notes"] == []
    return out


def quantizers(path: Path) -> int:
    return sum(node.op_type == "QuantizeLinear" for node in onnx.load(path).graph.node)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_close_to_fp32_on_every_runtime(graph: Path, quantized: Path, backend: str) -> None:
    x = samples()
    want, got = run(graph, x, backend=backend), run(quantized, x, backend=backend)
    assert np.abs(got - want).max() < 0.05 * np.abs(want).max()
    assert np.abs(got - want).max() > 0, "nothing was quantized"


def test_weights_are_stored_as_int8(graph: Path, quantized: Path) -> None:
    model = onnx.load(quantized)
    held = {tensor.name: tensor for tensor in model.graph.initializer}
    sizes = {t.name: numpy_helper.to_array(t).size for t in held.values() if t.data_type == TensorProto.FLOAT}
    assert max(sizes.values()) <= 16, f"weights left in fp32: {sizes}"
    stored = [t for t in held.values() if t.data_type == TensorProto.INT8 and numpy_helper.to_array(t).size > 16]
    assert len(stored) == 3, "stem, block and head"
    assert onnxgraph.is_quantized(quantized) and not onnxgraph.is_quantized(graph)
    onnxfile.check_onnx(quantized)


def test_every_quantizer_is_symmetric(quantized: Path) -> None:
    model = onnx.load(quantized)
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    points = [held[node.input[2]] for node in model.graph.node if node.op_type in onnxgraph.QUANTIZING]
    assert points and not any(point.any() for point in points)


def test_tensorrt_rtx_builds_it(quantized: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    module = BACKENDS["tensorrt_rtx"]
    config = module.Config(capabilities=("sm89",))
    signature, out = onnxgraph.read_signature(quantized), tmp_path / "model.rtx.engine"
    axes = dict.fromkeys(signature.axes, Span(min=1, opt=2, max=4))
    module.build(quantized, config=config, signature=signature, axes=axes, out=out)
    assert out.stat().st_size > 1000


def test_the_same_samples_give_the_same_bytes(graph: Path, quantized: Path, tmp_path: Path) -> None:
    """However they come in calls; other samples give other scales."""
    again, other = tmp_path / "again.onnx", tmp_path / "other.onnx"
    ptq.apply(graph, ptq.Config(), make_context([samples()]), out=again)
    ptq.apply(graph, ptq.Config(samples=8), make_context([3 * samples()]), out=other)
    assert again.read_bytes() == quantized.read_bytes() != other.read_bytes()


def test_it_can_be_stopped_while_nncf_looks_at_samples(graph: Path, tmp_path: Path) -> None:
    """The signal is seen through NNCF, and its error is no failure of NNCF's."""
    seen = []

    def check() -> None:
        seen.append(1)
        if len(seen) == 5:
            raise InterruptedRunError("SIGINT")

    with pytest.raises(InterruptedRunError):
        ptq.apply(graph, ptq.Config(), replace(make_context([samples()]), check=check), out=tmp_path / "out.onnx")
    assert len(seen) == 5 and not (tmp_path / "out.onnx").exists()


def test_ignored_nodes_stay_in_fp32(graph: Path, quantized: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    config = ptq.Config(ignore=("head", "block.*"))
    meta = ptq.apply(graph, config, make_context([samples()]), out=out)
    held = {tensor.name: tensor.data_type for tensor in onnx.load(out).graph.initializer}
    assert held["head.weight"] == held["block.weight"] == TensorProto.FLOAT and "stem.weight" not in held
    assert meta["num_ignored"] == 2 and quantizers(out) < quantizers(quantized)


def test_products_left_in_fp32_are_told(graph: Path) -> None:
    (note,) = quantization._left_over(onnx.load(graph), ["head"])
    assert note.startswith("2 of 3 products stay in fp32, such as stem")


def test_mixed_takes_asymmetric_activations(graph: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    ptq.apply(graph, ptq.Config(preset="mixed"), make_context([samples()]), out=out)
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(out).graph.initializer}
    points = [held[node.input[2]] for node in onnx.load(out).graph.node if node.op_type == "QuantizeLinear"]
    assert any(point.any() for point in points)


def test_twice_is_refused(quantized: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="quantized already"):
        ptq.apply(quantized, ptq.Config(), make_context([samples()]), out=tmp_path / "out.onnx")


BAD = samples()
BAD[5, 0, 0, 0] = np.nan


@pytest.mark.parametrize(
    ("calls", "config", "pattern"),
    [
        ([], {}, "there are none"),
        ([samples(), BAD], {}, "samples 24 to 47: input 'input' holds nan or inf"),
        ([samples()], {"samples": 100}, "samples is 100, and the calibration data has 24"),
        (
            [samples()[:, :1]],
            {},
            r"samples 0 to 23: input 'input' has the shape \[24, 1, 8, 8\], expected \[batch, 3, 8, 8\]",
        ),
        ([samples()[:, :, 0]], {}, r"shape \[24, 3, 8\]"),
    ],
)
def test_bad_calibration(
    graph: Path, tmp_path: Path, calls: list[np.ndarray], config: dict[str, int], pattern: str
) -> None:
    with pytest.raises(DataError, match=pattern) as caught:
        ptq.apply(graph, ptq.Config(**config), make_context(calls), out=tmp_path / "out.onnx")
    assert caught.value.exit_code == 4 and not (tmp_path / "out.onnx").exists()


def test_a_pattern_that_fits_nothing(graph: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="'fc' fits no node"):
        ptq.apply(graph, ptq.Config(ignore=("fc",)), make_context([samples()]), out=tmp_path / "out.onnx")


QUIET = """
import socket, sys
from pathlib import Path

def refuse(*arguments, **more):
    print("connect", arguments, file=sys.stderr)
    raise OSError("no network")

socket.socket.connect = socket.socket.connect_ex = socket.create_connection = socket.getaddrinfo = refuse
from bmctl.methods import ptq
from tests.methods.graphs import make_context, samples
ptq.apply(Path(sys.argv[1]), ptq.Config(), make_context([samples()]), out=Path(sys.argv[2]))
import openvino
assert "openvino_telemetry.main" not in sys.modules
"""


def test_nothing_is_printed_and_nothing_is_sent(graph: Path, tmp_path: Path) -> None:
    """In a process of its own, with no sign of a test or of CI, under which the telemetry holds still by itself."""
    home = tmp_path / "home"
    home.mkdir()
    result = subprocess.run(
        [sys.executable, "-c", QUIET, str(graph), str(tmp_path / "out.onnx")],
        env={"HOME": str(home), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert not (home / "intel").exists()
