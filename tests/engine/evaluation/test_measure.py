"""Numbers that can be worked out by hand, and rounds that really interleave."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from tests.engine.exporting import export
from torch import nn

from bmctl.core import memory
from bmctl.engine.evaluation import measure


def conv_net() -> nn.Module:
    """Conv 3 -> 8, 3x3, stride 2 on 8x8, then Linear 128 -> 10."""
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10)).eval()


CONV_MACS = 8 * 4 * 4 * 3 * 9 + 128 * 10
CONV_PARAMS = 8 * 3 * 9 + 8 + 128 * 10 + 10


class Attention(nn.Module):
    """One head of 16 over 12 tokens, by the fused kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return nn.functional.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0].mean(1)


def test_parameters_are_counted_once_and_zeros_apart() -> None:
    model = conv_net()
    assert measure.num_params(model) == CONV_PARAMS
    with torch.no_grad():
        model[0].weight[0] = 0
    assert measure.num_nonzero(model) == CONV_PARAMS - 27
    tied = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    tied[1].weight = tied[0].weight
    assert measure.num_params(tied) == 16


def test_macs_are_of_one_sample_whatever_the_batch() -> None:
    model = conv_net()
    assert measure.macs(model, [torch.randn(5, 3, 8, 8)]) == CONV_MACS
    assert measure.macs(model.train(), [torch.randn(1, 3, 8, 8)]) == CONV_MACS
    assert model.training


def test_macs_count_fused_attention() -> None:
    assert measure.macs(Attention().eval(), [torch.randn(2, 12, 16)]) == 12 * 16 * 48 + 2 * 12 * 12 * 16


def test_a_graph_counts_as_its_module(tmp_path: Path) -> None:
    for model, shape, macs in (
        (conv_net(), (2, 3, 8, 8), CONV_MACS),
        (Attention().eval(), (2, 12, 16), 12 * 16 * 48 + 2 * 12 * 12 * 16),
    ):
        path = tmp_path / "model.onnx"
        export(model, torch.randn(shape), path)
        assert measure.graph_macs(path) == macs
    export(conv_net(), torch.randn(2, 3, 8, 8), path)
    assert measure.graph_num_params(path) == CONV_PARAMS
    assert measure.size_bytes(path) == path.stat().st_size


def quantized_graph(path: Path, *, op: str = "MatMul") -> Path:
    """x [batch, 6] times an int8 weight [6, 4] behind DequantizeLinear."""
    constants = [
        numpy_helper.from_array(np.ones((6, 4), np.int8), "w_q"),
        numpy_helper.from_array(np.ones(4, np.float32), "w_scale"),
        numpy_helper.from_array(np.zeros(4, np.int8), "w_zero"),
    ]
    nodes = [
        helper.make_node("DequantizeLinear", ["w_q", "w_scale", "w_zero"], ["w"], axis=1),
        helper.make_node(op, ["x", "w"], ["y"]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 6])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])
    graph = helper.make_graph(nodes, "g", [x], [y], initializer=constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]), path)
    return path


@pytest.mark.parametrize("op", ["MatMul", "Gemm"])
def test_a_quantized_graph_counts_weights_not_scales(tmp_path: Path, op: str) -> None:
    path = quantized_graph(tmp_path / "q.onnx", op=op)
    assert measure.graph_num_params(path) == 24
    assert measure.graph_macs(path) == 24


def test_a_graph_whose_shapes_are_unknown_has_no_macs(tmp_path: Path) -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 6])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    nodes = [helper.make_node("NonZero", ["x"], ["i"]), helper.make_node("Cast", ["i"], ["f"], to=TensorProto.FLOAT)]
    nodes.append(helper.make_node("MatMul", ["w", "f"], ["y"]))
    weight = numpy_helper.from_array(np.ones((4, 2), np.float32), "w")
    model = helper.make_model(helper.make_graph(nodes, "g", [x], [y], initializer=[weight]))
    onnx.save(model, tmp_path / "d.onnx")
    assert measure.graph_macs(tmp_path / "d.onnx") is None


def test_directories_are_summed(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "a").write_bytes(b"12")
    (tmp_path / "deep" / "b").write_bytes(b"345")
    assert measure.size_bytes(tmp_path) == 5


def test_rounds_interleave_and_their_order_alternates(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that only the callables advance: what is measured is known, and so is who ran when."""
    clock = {"s": 0.0}
    calls: list[str] = []
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock["s"])

    def run(name: str, seconds: float) -> None:
        calls.append(name)
        clock["s"] += seconds

    found = measure.latency({"a": lambda: run("a", 0.02), "b": lambda: run("b", 0.001)}, rounds=4, warmup=2)
    assert calls[:4] == ["a", "a", "b", "b"]
    timed = calls[4:]
    order = [name for i, name in enumerate(timed) if i == 0 or timed[i - 1] != name]
    assert order == ["a", "b", "a", "b", "a"]  # a b | b a | a b | b a
    assert timed.count("a") == 8  # each round's first call is not counted
    assert (timed.count("b") / 4 - 1) * 0.001 >= measure.SHORTEST_S
    assert found["a"].p50_ms == pytest.approx(20)
    assert found["b"].samples_ms == pytest.approx((1.0,) * 4)
    assert measure.throughput(found["a"], batch_size=64) == pytest.approx(3200)


def test_percentiles_are_of_the_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, durations = {"s": 0.0}, iter([1.0, 1.0, 9.0, 0.1, 9.0, 0.2, 9.0, 0.3])  # the 9 are each round's first call
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock["s"])

    def run() -> None:
        clock["s"] += next(durations)

    found = measure.latency({"a": run}, rounds=3, warmup=2)["a"]
    assert found.p50_ms == pytest.approx(200)
    assert found.p50_ms < found.p90_ms < found.p99_ms < 300


def test_peak_memory_sees_what_is_freed_again() -> None:
    """In a process that trained, too: there freed memory is kept, and would be taken again unseen."""
    memory.keep_freed()
    size = 200 * 2**20
    np.ones(size // 8).sum()
    found = measure.peak_memory_bytes(lambda: float(np.ones(size // 8).sum()))
    assert 0.8 * size < found < 3 * size
    assert measure.peak_memory_bytes(lambda: None) < 0.2 * size


def test_the_machine_is_plain_data() -> None:
    found = measure.machine()
    assert {"cpu", "cores", "threads", "gpus", "versions"} <= set(found)
    assert found["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert found["cpu"]
    json.dumps(found)
