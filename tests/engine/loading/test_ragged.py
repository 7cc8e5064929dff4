"""Fields that are of another length in every batch, as those of texts are, in split and loader."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import pytest
import torch

from bmctl.core.columns import Class, Column, Text
from bmctl.engine.loading.arrays import array_batches
from bmctl.engine.loading.loader import open_loader
from bmctl.engine.loading.split import Split, input_columns
from bmctl.errors import DataError
from bmctl.inputs import Resolved, text
from bmctl.sources.samples import ArraySamples
from bmctl.tasks import classify

NUM_WORDS = [1 + 7 * (row % 5) for row in range(40)]
TEXTS = np.array([" ".join(f"w{(row + i) % 7}" for i in range(num)) for row, num in enumerate(NUM_WORDS)], object)
FIELDS = ["input_ids", "attention_mask"]


class Examples:
    """What the tokenizer is trained on."""

    columns: Mapping[str, Column] = MappingProxyType({"text": Text()})
    in_memory = True

    def __len__(self) -> int:
        return len(TEXTS)

    def read(self, most: int | None = None) -> dict[str, np.ndarray]:
        return {"text": TEXTS[:most]}


@pytest.fixture(scope="module")
def split() -> Split:
    columns = {"text": Text(), "label": Class(("a", "b"))}
    samples = ArraySamples(columns, {"text": TEXTS, "label": np.arange(40) % 2}, "f")
    given = Resolved(*text.resolve(text.Config(max_tokens=64), Examples(), published={}))
    task = classify.Config()
    facts = classify.facts(columns, task, {})
    return Split(text.prepare(samples, given=given, folder=None), np.arange(40), "f", given, task, facts)


def tokens(batch: dict[str, np.ndarray]) -> list[tuple[int, ...]]:
    """Of each sample, without padding."""
    rows = zip(batch["input_ids"].tolist(), batch["attention_mask"].sum(1).tolist(), strict=True)
    return [tuple(row[:length]) for row, length in rows]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("raw", [False, True])
def test_they_go_through_loader_processes(split: Split, num_workers: int, raw: bool) -> None:
    with open_loader(split, seed=0, batch_size=4, num_workers=num_workers, device=torch.device("cpu")) as loader:
        loader.raw = raw
        batches = list(loader.batches(epoch=0))
    assert [list(batch) for batch in batches] == [[*FIELDS, "label"]] * 10
    assert len({batch["input_ids"].shape[1] for batch in batches}) > 1
    assert all(batch[name].dtype == torch.int64 for batch in batches for name in FIELDS)
    (whole,) = array_batches(split, batch_size=40)
    assert sorted(row for batch in batches for row in tokens(batch)) == sorted(tokens(whole))
    assert sorted(map(len, tokens(whole))) == sorted(num + 2 for num in NUM_WORDS)


@pytest.mark.parametrize("world", [1, 3])
def test_ranks_evaluate_their_rows_and_know_all_targets(split: Split, world: int) -> None:
    whole = list(array_batches(split, batch_size=9))
    assert [len(batch["label"]) for batch in whole] == [9, 9, 9, 9, 4]
    for rank in range(world):
        for batch, mine in zip(whole, array_batches(split, batch_size=9, rank=rank, world=world), strict=True):
            assert list(mine) == [*FIELDS, "label"]
            assert np.array_equal(mine["label"], batch["label"])
            share = -(-len(batch["label"]) // world)
            rows = range(rank * share, (rank + 1) * share)
            assert tokens(mine) == [row if i in rows else () for i, row in enumerate(tokens(batch))]


def test_a_source_without_such_a_column_is_told(split: Split) -> None:
    assert list(split.columns) == ["text"]
    with pytest.raises(
        DataError, match=r"image encodes columns of picture, and the samples of data\.source have text, label"
    ):
        input_columns(split.samples.columns, kind="image", task=split.task)
