"""Batches are cut along their samples, and models of any kind are called with them in one way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

from bmctl.engine.batch import blank, call, channels_last, chunks, free_sizes, moved, num_rows, rows
from bmctl.errors import UnsupportedError
from bmctl.schema import BATCH, TensorSpec

IDS = TensorSpec(name="ids", dtype="int64", shape=(BATCH, "tokens"))
MASK = TensorSpec(name="mask", dtype="bool", shape=(BATCH, "tokens"))
IMAGE = TensorSpec(name="image", dtype="float32", shape=(BATCH, 3, 4, 4))


def batch() -> dict[str, torch.Tensor]:
    return {
        "ids": torch.arange(12).reshape(6, 2),
        "mask": torch.ones(6, 2, dtype=torch.bool),
        "scale": torch.tensor(3.0),
        "label": torch.arange(6),
    }


# -- calls ------------------------------------------------------------------------------------------


class Giving(nn.Module):
    """Takes two tensors by position, under names that nobody knows, and gives what it is told to make of them."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.make = make

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> Any:
        return self.make(first * second, first - second)


@pytest.mark.parametrize(
    ("make", "gives"),
    [
        (lambda a, b: a, ("one",)),
        (lambda a, b: (a, b), ("one", "two")),
        (lambda a, b: [a, b], ("one", "two")),
        (lambda a, b: (a, b, None), ("one", "two")),
        (lambda a, b: {"two": b, "other": None, "one": a}, ("one", "two")),
    ],
    ids=["tensor", "tuple", "list", "longer tuple", "dict"],
)
def test_outputs_get_their_names(make: Any, gives: tuple[str, ...]) -> None:
    given = batch()
    found = call(Giving(make), given, takes=("label", "scale"), gives=gives)
    assert tuple(found) == gives
    assert found["one"].tolist() == [0, 3, 6, 9, 12, 15]
    assert found.get("two", given["label"] - 3).tolist() == [-3, -2, -1, 0, 1, 2]


def test_the_order_of_takes_is_that_of_the_arguments() -> None:
    given = {"label": torch.tensor([5.0]), "scale": torch.tensor([2.0])}
    for takes, expected in ((("label", "scale"), 3.0), (("scale", "label"), -3.0)):
        found = call(Giving(lambda a, b: (a, b)), given, takes=takes, gives=("product", "difference"))
        assert found["difference"].item() == expected


def test_outputs_of_transformers() -> None:
    found = call(
        Giving(lambda a, b: SequenceClassifierOutput(logits=a, hidden_states=(a, b))),
        batch(),
        takes=("label", "scale"),
        gives=("logits",),
    )
    assert list(found) == ["logits"] and type(found) is dict


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ((torch.zeros(1),), "gives a tuple of 1, expected one, two"),
        (torch.zeros(1), r"gives one tensor \[1\], expected one, two"),
        ({"one": torch.zeros(1)}, "gives a dict of one, expected"),
        ((torch.zeros(1), [torch.zeros(1)]), "gives a tuple of 2, expected"),
        (None, "gives a NoneType"),
        (3.0, "gives a float"),
    ],
)
def test_other_outputs_are_refused(made: Any, said: str) -> None:
    with pytest.raises(UnsupportedError, match=said):
        call(lambda: made, {}, takes=(), gives=("one", "two"))


# -- samples ----------------------------------------------------------------------------------------


def test_rows_of_every_tensor_and_what_all_samples_share() -> None:
    found = rows(batch(), torch.tensor([5, 0]))
    assert found["ids"].tolist() == [[10, 11], [0, 1]]
    assert found["label"].tolist() == [5, 0]
    assert found["scale"].item() == 3.0
    assert rows(batch(), slice(1, 3))["label"].tolist() == [1, 2]
    assert (num_rows(found), num_rows({"scale": torch.tensor(1.0), **batch()})) == (2, 6)


@pytest.mark.parametrize(("count", "sizes"), [(1, [6]), (2, [3, 3]), (3, [2, 2, 2]), (4, [2, 2, 2]), (6, [1] * 6)])
def test_parts_are_those_of_torch(count: int, sizes: list[int]) -> None:
    whole = batch()
    parts = chunks(whole, count)
    assert [num_rows(part) for part in parts] == sizes
    assert all(torch.equal(*pair) for pair in zip([p["ids"] for p in parts], whole["ids"].chunk(count), strict=True))
    assert all(part["scale"] is whole["scale"] for part in parts)


def test_only_images_have_channels() -> None:
    given = {"image": torch.zeros(2, 3, 4, 4), "maps": torch.zeros(2, 3, 4, 4, dtype=torch.int64), **batch()}
    found = channels_last(given)
    assert found["image"].is_contiguous(memory_format=torch.channels_last)
    assert all(found[name] is given[name] for name in given if name != "image")
    assert moved(given, torch.device("meta"))["mask"].is_meta


def test_a_blank_batch_has_the_sizes_of_a_real_one() -> None:
    given = (IDS, MASK, IMAGE)
    sizes = free_sizes({**batch(), "image": torch.zeros(6, 3, 4, 4)}, given)
    assert sizes == {"tokens": 2}
    made = blank(given, sizes={**sizes, BATCH: 5}, device=torch.device("meta"))
    assert list(made) == ["ids", "mask", "image"]
    assert [tuple(each.shape) for each in made.values()] == [(5, 2), (5, 2), (5, 3, 4, 4)]
    assert [each.dtype for each in made.values()] == [torch.int64, torch.bool, torch.float32]
