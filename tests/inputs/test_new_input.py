"""An input that is not there yet: texts, whose fields are of another length in every batch, in split and loader."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import pytest
import torch

from bmctl import inputs
from bmctl.core.columns import Class, Text
from bmctl.engine.loading import split as splits
from bmctl.engine.loading.arrays import array_batches
from bmctl.engine.loading.loader import open_loader
from bmctl.engine.loading.split import Split
from bmctl.inputs import Resolved
from bmctl.schema import BATCH, Strict, TensorSpec
from bmctl.sources.samples import ArraySamples
from bmctl.tasks import classify

TEXTS = np.array([" ".join(f"w{i % 7}" for i in range(1 + row % 5)) for row in range(40)], object)


class Spec(Strict):
    kind: Literal["words"] = "words"


def prepare(samples: ArraySamples, *, given: Resolved, folder: Path | None) -> ArraySamples:
    """Words become numbers once; those of the file come first."""
    known = {word: number for number, word in enumerate(given.files["words.txt"].decode().split(), start=1)}
    ids = np.empty(len(samples), object)
    ids[:] = [np.array([known.get(word, 0) for word in text.split()], np.int32) for text in samples.arrays["text"]]
    return replace(samples, arrays={**samples.arrays, "text": ids})


def encode(records: Mapping[str, Any], *, given: Resolved, asked: Any = None, luck: Any = None) -> dict[str, Any]:
    (texts,) = records.values()
    ids = np.zeros((len(texts), max(map(len, texts))), np.int32)
    for row, each in zip(ids, texts, strict=True):
        row[: len(each)] = each
    return {"ids": ids}


def finish(fields: Mapping[str, torch.Tensor], **options: Any) -> dict[str, torch.Tensor]:
    return {"input_ids": fields["ids"].long(), "attention_mask": (fields["ids"] != 0).long()}


def specs(spec: Spec) -> tuple[TensorSpec, ...]:
    shape = (BATCH, "tokens")
    return tuple(TensorSpec(name=name, dtype="int64", shape=shape) for name in ("input_ids", "attention_mask"))


@pytest.fixture
def split(monkeypatch: pytest.MonkeyPatch) -> Iterator[Split]:
    words = ModuleType("words")
    words.__dict__.update(COLUMN="text", encode=encode, finish=finish, specs=specs, prepare=prepare)
    monkeypatch.setattr(splits, "INPUTS", {**inputs.INPUTS, "words": words})
    columns = {"text": Text(), "label": Class(("a", "b"))}
    samples = ArraySamples(columns, {"text": TEXTS, "label": np.arange(40) % 2}, "f")
    given = Resolved(Spec(), {"words.txt": b"w0 w1 w2 w3 w4"})
    task = classify.Config()
    facts = classify.facts(columns, task)
    yield Split(prepare(samples, given=given, folder=None), np.arange(40), "f", given, task, facts)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("raw", [False, True])
def test_ragged_fields_go_through_loader_processes(split: Split, num_workers: int, raw: bool) -> None:
    with open_loader(split, seed=0, batch_size=8, num_workers=num_workers, device=torch.device("cpu")) as loader:
        loader.raw = raw
        batches = list(loader.batches(epoch=0))
    assert [list(batch) for batch in batches] == [["input_ids", "attention_mask", "label"]] * 5
    seen = [row[row > 0].tolist() for batch in batches for row in batch["input_ids"]]
    assert sorted(seen) == sorted([1 + i for i in range(1 + row % 5)] for row in range(40))
    assert all(torch.equal(batch["attention_mask"], (batch["input_ids"] > 0).long()) for batch in batches)
    assert all(batch["input_ids"].dtype == torch.int64 for batch in batches)


@pytest.mark.parametrize("world", [1, 3])
def test_ranks_evaluate_their_rows_and_know_all_targets(split: Split, world: int) -> None:
    whole = list(array_batches(split, batch_size=9))
    assert [len(batch["label"]) for batch in whole] == [9, 9, 9, 9, 4]
    for rank in range(world):
        for batch, mine in zip(whole, array_batches(split, batch_size=9, rank=rank, world=world), strict=True):
            assert list(mine) == ["input_ids", "attention_mask", "label"]
            assert np.array_equal(mine["label"], batch["label"])
            share = -(-len(batch["label"]) // world)
            rows = slice(rank * share, (rank + 1) * share)
            width = mine["input_ids"].shape[1]
            assert np.array_equal(mine["input_ids"][rows], batch["input_ids"][rows, :width])


def test_a_source_without_such_a_column_is_told(split: Split) -> None:
    from bmctl.engine.loading.split import input_columns
    from bmctl.errors import DataError

    assert list(split.columns) == ["text"]
    with pytest.raises(DataError, match=r"image encodes a picture, and the samples of data\.source have text, label"):
        input_columns(split.samples.columns, kind="image", task=split.task)
