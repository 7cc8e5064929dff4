"""Which samples form which step, what they look like, and that neither depends on processes or workers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.sources.conftest import write_lines, write_shards

from bmctl.engine.loading import data
from bmctl.engine.loading.arrays import array_batches
from bmctl.engine.loading.data import Data
from bmctl.engine.loading.leaks import check_leaks
from bmctl.engine.loading.loader import open_loader
from bmctl.engine.loading.order import Plan
from bmctl.engine.loading.split import Split
from bmctl.errors import DataError, RecipeError, ResourceError
from bmctl.inputs import image
from bmctl.inputs.image import Spec
from bmctl.recipe.sections import Recipe

PLAIN = Spec(size=(28, 28), channels=1, mean=(0.0,), std=(1.0,))


def recipe(source: dict[str, Any] | None = None, *, model: dict[str, Any] | None = None, **sections: Any) -> Recipe:
    """A recipe on digits, which load fast, unless another source is asked for."""
    return Recipe.model_validate(
        {
            "name": "test",
            "model": model or {"name": "bmctl:rescnn"},
            "data": {"source": source or {"kind": "digits"}, **sections},
        }
    )


def opened(source: dict[str, Any] | None = None, **sections: Any) -> Data:
    return Data(recipe(source, **sections))


def resolve(source: dict[str, Any] | None = None, **sections: Any) -> Spec:
    return data.resolve_input(opened(source, **sections)).spec


def split(name: str = "train", *, source: Any = None, augment: bool = False, **sections: Any) -> Split:
    """Prepared as the source's data say, whatever the sections."""
    given = data.resolve_input(opened(source))
    return data.open_split(opened(source, **sections), name=name, given=given, augment=augment)


def labels(chosen: Split) -> np.ndarray:
    return chosen.targets(np.arange(len(chosen)))["label"]


def inputs(chosen: Split) -> np.ndarray:
    return chosen.arrays(np.arange(len(chosen))).fields["input"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """30 RGB images of 8x6 in each of two classes."""
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for index in range(30):
            Image.fromarray(rng.integers(0, 256, (8, 6, 3), np.uint8)).save(tmp_path / name / f"{index:02}.png")
    return tmp_path


# -- choice -----------------------------------------------------------------------------------------


def test_a_limit_takes_the_classes_in_equal_numbers() -> None:
    chosen = split(train={"limit": 25})
    assert len(chosen) == 25
    assert set(np.bincount(labels(chosen))) == {2, 3}
    assert np.array_equal(chosen.indices, split().indices[:25])
    assert len(set(split().indices)) == len(split().samples)


def test_calibration_is_of_train_or_val_and_unaugmented() -> None:
    calib = split("calib", calib={"split": "val", "limit": 12}, input={"augment": {"flip": True}})
    assert calib.samples.fingerprint == split("val").samples.fingerprint
    assert len(calib) == 12
    assert calib.asked is None
    few = split("calib", train={"limit": 20}, calib={"limit": 300})
    assert np.array_equal(few.indices, split(train={"limit": 20}).indices)


def test_fingerprints_follow_the_choice() -> None:
    assert split().fingerprint == split().fingerprint
    assert split().fingerprint != split(train={"limit": 500}).fingerprint
    assert data.data_fingerprint(opened()) == data.data_fingerprint(opened(test={"limit": 3}))
    assert data.data_fingerprint(opened()) != data.data_fingerprint(opened(val={"limit": 3}))


def test_a_recipe_without_data_says_so() -> None:
    with pytest.raises(RecipeError, match="no data section"):
        data.data_fingerprint(Data(Recipe.model_validate({"name": "x", "model": {"name": "bmctl:mlp"}})))


# -- batches ----------------------------------------------------------------------------------------


def epoch(chosen: Split, *, start_step: int = 0, **options: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    with open_loader(chosen, **{"seed": 3, "batch_size": 60, **options}) as loader:
        return [(batch["input"], batch["label"]) for batch in loader.batches(epoch=1, start_step=start_step)]


def same(first: list, second: list) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a, b) for left, right in zip(first, second, strict=True) for a, b in zip(left, right, strict=True)
    )


AUGMENT = {"input": {"augment": {"flip": True, "shift": 1}}}


def augmented() -> Split:
    return split(augment=True, **AUGMENT)


def test_all_but_an_incomplete_batch_is_seen_once() -> None:
    chosen = augmented()
    batches = epoch(chosen)
    assert len(batches) == len(chosen) // 60
    assert {len(y) for _, y in batches} == {60}
    assert batches[0][0].dtype == torch.float32
    assert batches[0][0].shape == (60, 1, 8, 8)
    seen = np.bincount(torch.cat([y for _, y in batches]).numpy(), minlength=10)
    assert (np.bincount(labels(chosen)) - seen).sum() == len(chosen) % 60


@pytest.mark.parametrize("num_workers", [1, 2])
def test_loader_processes_change_nothing(num_workers: int) -> None:
    assert same(epoch(augmented()), epoch(augmented(), num_workers=num_workers))


@pytest.mark.parametrize("world", [2, 3])
def test_the_ranks_together_see_what_one_process_sees(world: int) -> None:
    alone = epoch(augmented())
    ranks = [epoch(augmented(), rank=rank, world=world) for rank in range(world)]
    together = [tuple(map(torch.cat, zip(*parts, strict=True))) for parts in zip(*ranks, strict=True)]
    assert same(alone, together)


def test_resuming_in_the_middle_goes_on_as_if_nothing_had_been() -> None:
    assert same(epoch(augmented())[7:], epoch(augmented(), start_step=7))


def test_global_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    for num_workers in (0, 1):
        epoch(augmented(), num_workers=num_workers)
    assert torch.equal(before, torch.get_rng_state())


def test_too_few_samples_for_one_step() -> None:
    with pytest.raises(DataError, match="20 samples, fewer than one step of 60") as caught:
        epoch(split(train={"limit": 20}))
    assert caught.value.hint == "--set train.batch_size=10"
    with pytest.raises(ValueError, match="does not divide"):
        epoch(split(), world=7)


def test_evaluation_takes_all_in_order() -> None:
    chosen = split("val")
    batches = list(array_batches(chosen, batch_size=50))
    assert np.array_equal(np.concatenate([batch["label"] for batch in batches]), labels(chosen))
    assert list(batches[0]) == ["input", "label"]
    assert sum(len(batch["input"]) for batch in batches) == len(chosen)
    assert len(batches[-1]["input"]) == len(chosen) % 50
    assert np.array_equal(np.concatenate([batch["input"] for batch in batches]), inputs(chosen))


def test_files_are_evaluated_in_order_too(folder: Path) -> None:
    source = {"kind": "folder", "root": str(folder), "val": 0.4}
    chosen = split("val", source=source)
    batches = list(array_batches(chosen, batch_size=3))
    assert len(batches) == 8
    assert np.array_equal(np.concatenate([batch["input"] for batch in batches]), inputs(chosen))
    assert next(iter(array_batches(chosen, batch_size=3)))["input"].shape == (3, 3, 8, 6)  # may be left half-way


@pytest.mark.parametrize("world", [2, 3])
def test_a_rank_reads_only_the_rows_that_it_evaluates(folder: Path, monkeypatch, world: int) -> None:
    source = {"kind": "folder", "root": str(folder), "val": 0.4}
    chosen = split("val", source=source)
    whole = list(array_batches(chosen, batch_size=11))
    read: list[int] = []
    real = image.encode

    def counted(records, **options):
        read.append(len(records["picture"]))
        return real(records, **options)

    monkeypatch.setattr(image, "encode", counted)
    ranks = [list(array_batches(chosen, batch_size=11, rank=rank, world=world)) for rank in range(world)]
    assert sum(read) == len(chosen) == 24
    assert [len(batch["input"]) for batch in whole] == [11, 11, 2]  # of two rows a third rank has none
    for batch, *parts in zip(whole, *ranks, strict=True):
        assert np.array_equal(sum(part["input"] for part in parts), batch["input"])
        assert all(np.array_equal(part["label"], batch["label"]) for part in parts)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_bad_file_is_named_by_whichever_process_finds_it(folder: Path, num_workers: int) -> None:
    source = {"kind": "folder", "root": str(folder)}
    chosen = split("train", source=source)
    bad = chosen.samples.paths[0]
    bad.write_bytes(b"\x89PNG no more")
    with pytest.raises(DataError) as caught:
        epoch(chosen, batch_size=4, num_workers=num_workers)
    assert str(bad) in caught.value.message
    assert "Traceback" not in caught.value.message
    assert caught.value.hint
    with pytest.raises(DataError, match=bad.name):
        list(array_batches(chosen, batch_size=4))


class Dying:
    """Samples whose reader is killed, as by the kernel when memory is short."""

    def __init__(self, samples: Any) -> None:
        self.columns, self.fingerprint = samples.columns, samples.fingerprint
        self.in_memory, self.window, self.parts = True, None, None

    def read_each(self, batches: Any) -> Any:
        os.kill(os.getpid(), 9)


def test_a_killed_loader_process_is_told() -> None:
    from dataclasses import replace

    chosen = replace(split(), samples=Dying(split().samples))
    with pytest.raises(ResourceError, match="a loader process died") as caught:
        epoch(chosen, num_workers=1)
    assert "num_workers=0" in caught.value.hint


LEFT_OPEN = """
import os, signal
from bmctl.engine.loading import data
from bmctl.engine.loading.loader import open_loader
from bmctl.recipe.sections import Recipe
recipe = Recipe.model_validate({"name": "x", "model": {"name": "bmctl:mlp"}, "data": {"source": {"kind": "digits"}}})
opened = data.Data(recipe)
split = data.open_split(opened, name="train", given=data.resolve_input(opened))
held = open_loader(split, seed=0, batch_size=32, num_workers=2)
batches = held.__enter__().batches(epoch=0)
next(batches)
import multiprocessing
for worker in multiprocessing.active_children():
    os.kill(worker.pid, signal.SIGTERM)
    os.kill(worker.pid, signal.SIGINT)
print(sum(len(next(batches)["label"]) for _ in range(20)))
"""


def test_loader_processes_ignore_signals_and_still_end_with_their_parent() -> None:
    """The epoch is left half-way, with the iterator alive when the interpreter exits."""
    done = subprocess.run([sys.executable, "-c", LEFT_OPEN], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{20 * 32}\n"


# -- augmentation -----------------------------------------------------------------------------------


def test_only_training_is_augmented() -> None:
    assert np.array_equal(inputs(split("val", **AUGMENT)), inputs(split("val")))
    plain, moved = (
        next(split(augment=True, **sections).encoded(Plan(seed=0, epoch=0, batch_size=50)))
        for sections in ({}, AUGMENT)
    )
    same = (plain.fields["input"] == moved.fields["input"]).all(axis=(1, 2, 3))
    assert 0 < same.sum() < 25
    still = next(split(**AUGMENT).encoded(Plan(seed=0, epoch=0, batch_size=50)))
    assert np.array_equal(still.fields["input"], plain.fields["input"])


# -- what the input becomes --------------------------------------------------------------------------


def test_the_data_decide_where_nobody_else_does() -> None:
    found = resolve({"kind": "bundled"})
    pixels = opened({"kind": "bundled"}).samples("train").arrays["picture"] / 255
    assert found.size == (28, 28)
    assert found.channels == 1
    assert found.mean == (round(float(pixels.mean()), 4),)
    assert found.std == (round(float(pixels.std()), 4),)
    assert found.crop is None


def test_colour_files_have_a_mean_for_each_channel(folder: Path) -> None:
    source = {"kind": "folder", "root": str(folder)}
    found = resolve(source)
    samples = opened(source).samples("train")
    pixels = np.stack(samples.read(range(len(samples)))["picture"]) / 255
    assert found.size == (8, 6)
    assert found.channels == 3
    assert found.mean == tuple(round(float(each), 4) for each in pixels.mean(axis=(0, 1, 2)))
    assert found.std == tuple(round(float(each), 4) for each in pixels.std(axis=(0, 1, 2)))
    grey = resolve(source, input={"channels": 1})
    assert len(grey.mean) == 1


def test_the_publisher_is_over_the_data_and_the_recipe_over_both() -> None:
    published = {"name": "torchvision:resnet50", "pretrained": True}
    found = resolve(model=published)
    assert (found.size, found.channels, found.mean[0], found.crop) == ((224, 224), 3, 0.485, 224 / 232)
    found = resolve(model=published, input={"size": 96, "mean": [0.0, 0.0, 0.0], "crop": 1.0})
    assert (found.size, found.mean, found.std[0], found.crop) == ((96, 96), (0.0, 0.0, 0.0), 0.229, 1.0)
    untrained = resolve(model={"name": "torchvision:resnet18"})
    assert (untrained.size, untrained.channels, len(set(untrained.mean))) == ((8, 8), 3, 1)


def test_contradictions_are_refused(folder: Path) -> None:
    with pytest.raises(RecipeError, match="1, but the model takes 3"):
        resolve(model={"name": "torchvision:resnet18"}, input={"channels": 1})
    with pytest.raises(RecipeError, match=r"data\.input\.mean: 3 values for 1 channels"):
        resolve(input={"mean": [0.5, 0.5, 0.5]})
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(folder / "a" / "00.png")
    source = {"kind": "folder", "root": str(folder), "val": 0.01, "test": 0.01}
    with pytest.raises(DataError, match="size is not given, and the images differ in size") as caught:
        resolve(source)
    assert caught.value.hint == "--set data.input.size=224"
    assert resolve(source, input={"size": [10, 12]}).size == (10, 12)


def test_images_of_one_colour_are_refused(folder: Path) -> None:
    for path in folder.rglob("*.png"):
        Image.new("L", (4, 4), 7).save(path)
    with pytest.raises(DataError, match="all of one colour"):
        resolve({"kind": "folder", "root": str(folder)})


# -- leaks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["bundled", "digits"])
def test_own_data_do_not_leak(source: str) -> None:
    assert check_leaks(opened({"kind": source})) == ()


def split_folders(folder: Path) -> dict[str, Any]:
    """train 20, val 6, test 4 of each class."""
    for index, path in enumerate(sorted(folder.rglob("*.png"))):
        name = "train" if index % 30 < 20 else "val" if index % 30 < 26 else "test"
        target = folder / name / path.parent.name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
    (folder / "a").rmdir()
    (folder / "b").rmdir()
    return {"kind": "folder", "root": str(folder)}


def test_training_images_in_validation_are_refused(folder: Path) -> None:
    source = split_folders(folder)
    assert check_leaks(opened(source)) == ()
    for path in (folder / "train" / "a").iterdir():
        (folder / "val" / "a" / f"copy of {path.name}").write_bytes(path.read_bytes())
    with pytest.raises(DataError, match="20 of 32 val samples stand in train too"):
        check_leaks(opened(source))


def test_a_single_twin_among_many_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = split_folders(folder)
    twin = folder / "val" / "b" / "twin.png"
    twin.write_bytes((folder / "train" / "a" / "00.png").read_bytes())
    with pytest.raises(DataError, match="1 of 13"):
        check_leaks(opened(source))
    monkeypatch.setattr("bmctl.engine.loading.leaks.TOLERATED", 0.1)
    (note,) = check_leaks(opened(source))
    assert "1 of 13 val samples stand in train too" in note
    assert str(twin) in note


def test_rows_in_memory_are_compared_as_well(tmp_path: Path) -> None:
    """IDX files whose test images are training images."""
    import struct

    images = np.random.default_rng(0).integers(0, 256, (40, 5, 5), np.uint8)
    for prefix, rows in (("train", images), ("t10k", images[:10])):
        labels = np.arange(len(rows), dtype=np.uint8) % 2
        for kind, array in (("images-idx3", rows), ("labels-idx1", labels)):
            head = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
            (tmp_path / f"{prefix}-{kind}-ubyte").write_bytes(head + array.tobytes())
    with pytest.raises(DataError, match="test samples stand in train too"):
        check_leaks(opened({"kind": "idx", "root": str(tmp_path)}))


def test_too_many_files_are_not_compared_in_silence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bmctl.engine.loading.leaks.MAX_FILES", 50)
    (note,) = check_leaks(opened({"kind": "folder", "root": str(folder)}))
    assert "not searched" in note


def test_archives_and_streams_are_compared_without_reading_them_again(tmp_path: Path) -> None:
    write_shards(tmp_path / "tars", files=1, samples=40)
    write_shards(tmp_path / "same", files=1, samples=20)
    write_lines(tmp_path / "train.jsonl.gz", count=40)
    write_lines(tmp_path / "test.jsonl.gz", count=20)
    tars = {"kind": "webdataset", "shards": str(tmp_path / "tars")}
    lines = {"kind": "stream", "path": str(tmp_path / "train.jsonl.gz")}
    assert check_leaks(opened(tars)) == check_leaks(opened(lines)) == ()
    with pytest.raises(DataError, match=r"\d+ of 20 test samples stand in train too, such as .*member '000000'"):
        check_leaks(opened({**tars, "test_shards": str(tmp_path / "same"), "val": 0.01}))
    with pytest.raises(
        DataError, match=r"\d+ of 20 test samples stand in train too, such as .*test\.jsonl\.gz, line 1"
    ):
        check_leaks(opened({**lines, "test_path": str(tmp_path / "test.jsonl.gz"), "val": 0.01}))


# -- streams ----------------------------------------------------------------------------------------


def test_a_stream_is_evaluated_in_one_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bmctl.sources import stream

    write_lines(tmp_path / "a.jsonl.gz", count=60)
    source = {"kind": "stream", "path": str(tmp_path / "a.jsonl.gz"), "val": 0.4}
    chosen = split("val", source=source, val={"limit": 20})
    assert np.array_equal(chosen.indices, np.sort(chosen.indices))
    assert set(np.bincount(labels(chosen))) == {6, 7}
    expected = inputs(chosen)
    passes = []
    whole = stream._opened
    monkeypatch.setattr(stream, "_opened", lambda *given: passes.append(given) or whole(*given))
    batches = list(array_batches(chosen, batch_size=6))
    assert len(passes) == 1
    assert np.array_equal(np.concatenate([batch["input"] for batch in batches]), expected)
    assert np.array_equal(np.concatenate([batch["label"] for batch in batches]), labels(chosen))
    calib = split("calib", source=source, calib={"limit": 9})
    assert np.bincount(labels(calib)).tolist() == [3, 3, 3]


# -- opening ----------------------------------------------------------------------------------------


def test_a_source_is_opened_once_whatever_is_asked_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from bmctl.sources import digits

    seen: list[str] = []
    whole = digits.open
    monkeypatch.setattr(digits, "open", lambda config, *, split: seen.append(split) or whole(config, split=split))
    one = opened()
    given = data.resolve_input(one)
    for name in ("train", "val", "calib", "train"):
        data.open_split(one, name=name, given=given)
    data.data_fingerprint(one)
    assert sorted(seen) == ["train", "val"]  # the test split is nobody's business before it is asked for
    check_leaks(one)
    assert sorted(seen) == ["test", "train", "val"]


def test_a_task_without_classes_takes_samples_in_another_order(monkeypatch: pytest.MonkeyPatch) -> None:
    from bmctl.core.chance import shuffled
    from bmctl.tasks import classify

    monkeypatch.setattr(classify, "balance", lambda config: None)
    chosen = split(train={"limit": 25})
    assert np.array_equal(chosen.indices, shuffled(len(chosen.samples), keys=())[:25])
    assert len(set(np.bincount(labels(chosen), minlength=10))) > 2
