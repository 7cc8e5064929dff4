"""What every runner refuses, and batches of any size on runners that take only some."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from bmctl.core.runner import Batched, Bounds, Closing, batch_axes, check_feed
from bmctl.errors import DataError, UnsupportedError
from bmctl.schema import Signature, TensorSpec

IDS = TensorSpec(name="ids", dtype="int64", shape=("batch", "tokens"))
MASK = TensorSpec(name="mask", dtype="bool", shape=("batch", "tokens"))
CACHE = TensorSpec(name="cache", dtype="float32", shape=(2, "batch", "past", 4), role="state")
SCORES = TensorSpec(name="scores", dtype="float32", shape=("batch", 3))


class Summing(Closing):
    """Sums ids per sample, and hands the cache back; notes the sizes that it was called with."""

    def __init__(self, signature: Signature, bounds: Mapping[str, Bounds] | None = None) -> None:
        self.signature, self.bounds = signature, dict(bounds or {})
        self.sizes: list[int] = []

    def run(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        checked = check_feed(feed, inputs=self.signature.inputs, bounds=self.bounds)
        ids = checked["ids"]
        self.sizes.append(len(ids))
        found = {"scores": np.repeat(ids.sum(1, keepdims=True), 3, axis=1).astype(np.float32)}
        return found | ({"cache": checked["cache"] + 1} if "cache" in checked else {})


def feed(num: int, tokens: int = 5, past: int = 0) -> dict[str, np.ndarray]:
    ids = np.arange(num * tokens).reshape(num, tokens)
    return {
        "ids": ids,
        "mask": ids > 2,
        "cache": np.arange(2.0 * num * past * 4, dtype=np.float32).reshape(2, num, past, 4),
    }


def test_axes_of_one_name_are_of_one_size() -> None:
    inputs = [IDS, MASK, CACHE]
    assert list(check_feed(feed(2), inputs=inputs)) == ["ids", "mask", "cache"]
    with pytest.raises(DataError, match=r"the axis 'tokens' is 5 in 'ids' and 4 in 'mask'"):
        check_feed({**feed(2), "mask": np.ones((2, 4), bool)}, inputs=inputs)


def test_only_the_batch_must_not_be_empty() -> None:
    check_feed(feed(2, past=0), inputs=[IDS, MASK, CACHE])
    with pytest.raises(DataError, match="the batch is empty"):
        check_feed(feed(0), inputs=[IDS, MASK, CACHE])
    with pytest.raises(DataError, match=r"0 along the axis 'past' is outside the profile .* 1 to 8"):
        check_feed(feed(2), inputs=[IDS, MASK, CACHE], bounds={"past": (1, 8)})


def test_state_is_not_looked_at() -> None:
    given = feed(1, past=2)
    given["cache"][:] = np.nan
    check_feed(given, inputs=[IDS, MASK, CACHE])
    value = CACHE.model_copy(update={"role": "value"})
    with pytest.raises(DataError, match="'cache' holds nan or inf"):
        check_feed(given, inputs=[IDS, MASK, value])


def test_a_batch_is_cut_along_its_own_axis_of_each_array() -> None:
    signature = Signature(inputs=(IDS, MASK, CACHE), outputs=(SCORES, CACHE))
    whole, cut = Summing(signature), Summing(signature, {"batch": (2, 3)})
    given = feed(7, past=2)
    want, got = whole.run(given), Batched(cut).run(given)
    assert cut.sizes == [3, 3, 2]  # the last sample alone was repeated: two are the least
    for name in want:
        np.testing.assert_array_equal(got[name], want[name])


def test_a_fixed_batch_is_met() -> None:
    fixed = IDS.model_copy(update={"shape": (2, "tokens")})
    runner = Summing(Signature(inputs=(fixed,), outputs=(SCORES.model_copy(update={"shape": (2, 3)}),)))
    assert batch_axes(runner) == ({"ids": 0, "scores": 0}, (2, 2))
    got = Batched(runner).run({"ids": np.arange(15).reshape(5, 3)})
    assert runner.sizes == [2, 2, 2]
    np.testing.assert_array_equal(got["scores"][:, 0], [3, 12, 21, 30, 39])


def test_an_output_without_samples_cannot_be_joined() -> None:
    mean = SCORES.model_copy(update={"shape": (3,)})
    runner = Summing(Signature(inputs=(IDS,), outputs=(mean,)), {"batch": (1, 2)})
    Batched(runner).run({"ids": np.ones((2, 3), np.int64)})
    with pytest.raises(
        UnsupportedError, match="5 samples take 3 calls, and the output 'scores' has no axis of samples"
    ):
        Batched(runner).run({"ids": np.ones((5, 3), np.int64)})
