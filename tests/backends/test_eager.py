"""A module as a runner: called by position, whatever its types, and what it gives by name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from bmctl.backends.eager import open_module
from bmctl.errors import DataError, UnsupportedError
from bmctl.schema import Signature, TensorSpec

SIGNATURE = Signature(
    inputs=(
        TensorSpec(name="ids", dtype="int64", shape=("batch", "tokens")),
        TensorSpec(name="mask", dtype="bool", shape=("batch", "tokens")),
    ),
    outputs=(TensorSpec(name="mean", dtype="float32", shape=("batch", 4)),),
)


class Mean(nn.Module):
    """Its arguments have other names than the signature's."""

    def __init__(self, wrap: object = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.drop, self.wrap = nn.Embedding(9, 4), nn.Dropout(0.9), wrap

    def forward(self, x: torch.Tensor, seen: torch.Tensor) -> object:
        found = (self.drop(self.table(x)) * seen[..., None]).sum(1)
        return {"mapping": {"mean": found, "more": x}, "tuple": (found, x), "text": "no"}.get(str(self.wrap), found)


FEED = {"mask": np.array([[True, False, True]]), "ids": np.array([[1, 2, 3]])}


@pytest.mark.parametrize("wrap", [None, "mapping", "tuple"])
def test_outputs_come_by_name_whatever_they_are_wrapped_in(wrap: str | None) -> None:
    model = Mean(wrap).train()
    with open_module(model, signature=SIGNATURE) as runner:
        got = runner.run(FEED)
    want = (model.table.weight[1] + model.table.weight[3]).detach().numpy()
    assert list(got) == ["mean"] and got["mean"].dtype == np.float32
    np.testing.assert_allclose(got["mean"], want[None])
    with pytest.raises(ValueError, match="closed"):
        runner.run(FEED)


def test_half_precision_comes_back_as_float32() -> None:
    got = open_module(Mean().bfloat16(), signature=SIGNATURE).run(FEED)
    assert got["mean"].dtype == np.float32


def test_what_is_no_tensor_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="the model gives a str, expected mean"):
        open_module(Mean("text"), signature=SIGNATURE).run(FEED)


def test_a_feed_is_checked() -> None:
    with pytest.raises(DataError, match="'ids' is int32, expected int64"):
        open_module(Mean(), signature=SIGNATURE).run(FEED | {"ids": FEED["ids"].astype(np.int32)})
