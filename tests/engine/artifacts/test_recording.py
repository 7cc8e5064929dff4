"""Recorded calls: kept as they were made, cut and stretched along their samples, and made again."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from bmctl.backends.eager import open_module
from bmctl.core.runner import Batched
from bmctl.engine.artifacts.recording import Call, Recorder, cut, of_part, replay, stretched
from bmctl.schema import Signature, TensorSpec

SIGNATURE = Signature(
    inputs=(
        TensorSpec(name="x", dtype="float32", shape=("batch", 4)),
        TensorSpec(name="scale", dtype="float32", shape=()),
    ),
    outputs=(TensorSpec(name="y", dtype="float32", shape=("batch", 4)),),
)


class Scaled(nn.Module):
    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return x * scale


def feed(num: int) -> dict[str, np.ndarray]:
    return {"x": np.arange(4 * num, dtype=np.float32).reshape(num, 4), "scale": np.array(2, np.float32)}


def test_calls_of_several_parts_are_kept_in_their_order() -> None:
    calls: list[Call] = []
    parts = {
        n: Recorder(open_module(Scaled(), signature=SIGNATURE), part=n, calls=calls) for n in ("encoder", "decoder")
    }
    parts["encoder"].run(feed(2))
    for _ in range(2):
        parts["decoder"].run(feed(3))
    assert [call.part for call in calls] == ["encoder", "decoder", "decoder"]
    assert len(list(of_part(calls, "decoder"))) == 2
    np.testing.assert_array_equal(calls[0].outputs["y"], 2 * feed(2)["x"])


def test_what_a_graph_is_really_fed_is_recorded_within_batches() -> None:
    calls: list[Call] = []
    runner = open_module(Scaled(), signature=SIGNATURE)
    runner.bounds["batch"] = (1, 2)
    Batched(Recorder(runner, part="model", calls=calls)).run(feed(5))
    assert [len(call.feed["x"]) for call in calls] == [2, 2, 1]


def test_a_call_is_cut_and_stretched_along_its_samples() -> None:
    call = Call("model", SIGNATURE, feed(3), {"y": 2 * feed(3)["x"]})
    short, long = cut(call, 2), stretched(call, 7)
    assert short.feed["x"].shape == (2, 4) and short.outputs["y"].shape == (2, 4) and short.feed["scale"].shape == ()
    np.testing.assert_array_equal(long.feed["x"][:, 0], [0, 4, 8, 0, 4, 8, 0])
    assert long.outputs == {}


def test_replayed_calls_reach_the_part_that_they_were_made_on() -> None:
    calls: list[Call] = []
    parts = {name: Recorder(open_module(Scaled(), signature=SIGNATURE), part=name, calls=[]) for name in ("a", "b")}
    parts["b"]._calls = calls
    replay(parts, [Call("a", SIGNATURE, feed(1), {}), Call("b", SIGNATURE, feed(2), {})])
    assert [len(call.feed["x"]) for call in calls] == [2]
