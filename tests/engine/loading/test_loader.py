"""Loader processes: the same batches from any number of them, through a whole training, and how they end."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.sources.conftest import write_lines, write_shards

from bmctl.engine.loading import data, loader
from bmctl.engine.loading.loader import Loader, choose_workers, open_loader
from bmctl.engine.loading.split import Split
from bmctl.errors import DataError, ResourceError
from bmctl.recipe.sections import Recipe

BATCH = 12
EVERY = {"crop": {}, "flip": True, "shift": 1, "brightness": 0.3, "contrast": 0.3, "saturation": 0.3, "erase": 0.3}


def open_train(source: dict[str, Any], **sections: Any) -> Split:
    recipe = Recipe.model_validate(
        {"name": "test", "model": {"name": "bmctl:mlp"}, "data": {"source": source, **sections}}
    )
    opened = data.Data(recipe)
    return data.open_split(opened, name="train", given=data.resolve_input(opened), augment=True)


def sources(folder: Path) -> dict[str, dict[str, Any]]:
    write_shards(folder / "tars", files=4, samples=25)
    for part in range(3):
        write_lines(folder / "lines" / f"{part}.jsonl.gz", count=34, first=34 * part)
    tars = {"kind": "webdataset", "shards": str(folder / "tars")}
    return {
        "array": {"kind": "digits"},
        "tar": tars,
        "tar by shards": {**tars, "order": "shards", "window": 20},
        "stream": {"kind": "stream", "path": str(folder / "lines"), "window": 30},
    }


KINDS = ("array", "tar", "tar by shards", "stream")


def ids(x_nCHW: torch.Tensor) -> list[bytes]:
    """What a sample is told by: all images differ."""
    return [each.numpy().tobytes() for each in x_nCHW]


def seen(split: Split, *, world: int = 1, num_workers: int = 0, start_step: int = 0, epoch: int = 1) -> list:
    """The samples of every step, put together from all ranks."""
    ranks = []
    for rank in range(world):
        with open_loader(split, seed=3, batch_size=BATCH, rank=rank, world=world, num_workers=num_workers) as opened:
            ranks.append([ids(batch["input"]) for batch in opened.batches(epoch=epoch, start_step=start_step)])
    return [[each for part in parts for each in part] for parts in zip(*ranks, strict=True)]


@pytest.mark.parametrize("kind", KINDS)
def test_which_samples_form_a_step_depends_on_seed_and_batch_alone(kind: str, tmp_path: Path) -> None:
    split = open_train(sources(tmp_path)[kind], train={"limit": 70})
    expected = seen(split)
    everything = [each for step in expected for each in step]
    assert len(expected) == len(split) // BATCH
    assert len(set(everything)) == len(everything) == len(expected) * BATCH
    assert seen(split, epoch=2) != expected
    for world in (1, 2, 4):
        for num_workers in (0, 1, 3):
            assert seen(split, world=world, num_workers=num_workers) == expected, (world, num_workers)
    for world, num_workers in ((1, 3), (2, 1), (4, 0)):
        resumed = seen(split, world=world, num_workers=num_workers, start_step=2)
        assert resumed == expected[2:], (world, num_workers)


@pytest.mark.parametrize("kind", KINDS)
def test_augmented_batches_are_the_same_from_any_number_of_processes(kind: str, tmp_path: Path) -> None:
    split = open_train(sources(tmp_path)[kind], train={"limit": 50}, input={"augment": EVERY})
    expected = seen(split)
    assert expected != seen(replace(split, asked=None))
    assert seen(split, num_workers=2) == expected
    assert seen(split, num_workers=1, world=2, start_step=1) == expected[1:]


@contextlib.contextmanager
def opened(split: Split, num_workers: int, **options: Any) -> Iterator[Loader]:
    with open_loader(split, seed=3, batch_size=BATCH, num_workers=num_workers, **options) as one:
        yield one


def test_processes_stay_from_epoch_to_epoch_and_end_with_the_block(tmp_path: Path) -> None:
    split = open_train(sources(tmp_path)["tar"], input={"augment": EVERY})
    expected = [seen(split, epoch=epoch) for epoch in range(3)]
    with opened(split, 2) as one:
        found, pids = [], set()
        for epoch in range(3):
            found.append([ids(batch["input"]) for batch in one.batches(epoch=epoch)])
            pids |= {child.pid for child in multiprocessing.active_children()}
        assert found == expected
        assert len(pids) == 2
    assert not {child.pid for child in multiprocessing.active_children()} & pids


@pytest.mark.parametrize("kind", ["tar", "stream"])
def test_an_epoch_left_half_way_leaves_nothing_behind(kind: str, tmp_path: Path) -> None:
    split = open_train(sources(tmp_path)[kind])
    with opened(split, 2) as one:
        next(one.batches(epoch=0))
        assert [ids(batch["input"]) for batch in one.batches(epoch=1, start_step=3)] == seen(split, start_step=3)
        assert [ids(batch["input"]) for batch in one.batches(epoch=1)] == seen(split)


def test_layouts_and_what_a_device_normalises_are_equal_bit_for_bit(tmp_path: Path) -> None:
    split = open_train(sources(tmp_path)["tar"], input={"channels": 3, "size": [7, 5]})
    with opened(split, 0) as one:
        expected = list(one.batches(epoch=0))
    labels = [batch["label"].tolist() for batch in expected]
    assert list(expected[0]) == ["input", "label"]
    assert expected[0]["input"].is_contiguous()
    for num_workers in (0, 1):
        for raw in (False, True):
            for channels_last in (False, True):
                with opened(split, num_workers, channels_last=channels_last, device=torch.device("cpu")) as one:
                    one.raw = raw
                    found = list(one.batches(epoch=0))
                inputs = [batch["input"] for batch in found]
                layout = torch.channels_last if channels_last else torch.contiguous_format
                assert all(x.is_contiguous(memory_format=layout) for x in inputs)
                assert [ids(x.contiguous()) for x in inputs] == [ids(batch["input"]) for batch in expected]
                assert [batch["label"].tolist() for batch in found] == labels


def test_global_random_state_is_left_alone(tmp_path: Path) -> None:
    split = open_train(sources(tmp_path)["tar"], input={"augment": EVERY})
    before = torch.get_rng_state()
    for num_workers in (0, 1):
        with opened(split, num_workers) as one:
            for epoch in range(2):
                list(one.batches(epoch=epoch))
    assert torch.equal(before, torch.get_rng_state())


# -- faults -----------------------------------------------------------------------------------------


class Dying:
    """A split whose reader ends as it is told, in the loader process and nowhere else."""

    def __init__(self, split: Split, end: Any) -> None:
        self.split, self.end, self.parent = split, end, os.getpid()
        self.in_memory, self.finished = True, split.finished

    def __len__(self) -> int:
        return len(self.split)

    def encoded(self, plan: Any, *, first: int, every: int) -> Iterator[Any]:
        for step, batch in enumerate(self.split.encoded(plan, first=first, every=every)):
            if step == 2 and os.getpid() != self.parent:
                self.end()
            yield batch


@pytest.mark.parametrize(
    ("end", "said", "hint"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "number 0 was killed by SIGKILL", "memory is short"),
        (lambda: os.kill(os.getpid(), signal.SIGSEGV), "number 0 was killed by SIGSEGV", "num_workers=0"),
        (lambda: os._exit(7), "number 0 exited with 7", "num_workers=0"),
        (lambda: os.kill(os.getpid(), signal.SIGBUS), "no room in /dev/shm", "--shm-size"),
    ],
)
def test_it_is_told_how_a_loader_process_died(end: Any, said: str, hint: str) -> None:
    split = Dying(open_train({"kind": "digits"}), end)
    with pytest.raises(ResourceError, match=said) as caught, opened(split, 1) as one:  # type: ignore[arg-type]
        list(one.batches(epoch=0))
    assert hint in caught.value.hint


def test_no_room_for_shared_memory_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(size_bytes: int) -> torch.UntypedStorage:
        raise RuntimeError(
            "unable to allocate shared memory(shm) for file </torch_1_2_3>: No space left on device (28)"
        )

    monkeypatch.setattr(torch.UntypedStorage, "_new_shared", full)
    split = open_train({"kind": "digits"})
    with pytest.raises(ResourceError, match=r"no room in /dev/shm.*No space left") as caught, opened(split, 1) as one:
        list(one.batches(epoch=0))
    assert "data.prefetch" in caught.value.hint


SMALL_SHM = """
import sys
from bmctl.engine.loading import data
from bmctl.engine.loading.loader import open_loader
from bmctl.errors import ResourceError
from bmctl.recipe.sections import Recipe
source = {"kind": "bundled"}
recipe = Recipe.model_validate({"name": "x", "model": {"name": "bmctl:mlp"}, "data": {"source": source}})
opened = data.Data(recipe)
split = data.open_split(opened, name="train", given=data.resolve_input(opened))
try:
    with open_loader(split, seed=0, batch_size=4096, num_workers=2) as loader:
        list(loader.batches(epoch=0))
except ResourceError as error:
    print(error.message)
"""


@pytest.mark.slow
def test_a_dev_shm_that_is_really_too_small(tmp_path: Path) -> None:
    mount = "mount -t tmpfs -o size=4m tmpfs /dev/shm"
    unshare = ["unshare", "--mount", "--map-root-user", "sh", "-c"]
    if subprocess.run([*unshare, mount], capture_output=True, check=False).returncode:
        pytest.skip("needs user namespaces")
    command = [*unshare, f'{mount} && exec "$@"', "sh", sys.executable, "-c", SMALL_SHM]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert "no room in /dev/shm" in done.stdout, done.stderr


KILLED = """
import os, sys, time, multiprocessing
from bmctl.engine.loading import data
from bmctl.engine.loading.loader import open_loader
from bmctl.recipe.sections import Recipe
recipe = Recipe.model_validate({"name": "x", "model": {"name": "bmctl:mlp"}, "data": {"source": {"kind": "digits"}}})
opened = data.Data(recipe)
split = data.open_split(opened, name="train", given=data.resolve_input(opened))
with open_loader(split, seed=0, batch_size=32, num_workers=2) as loader:
    next(loader.batches(epoch=0))
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    time.sleep(600)
"""


def runs(pid: int) -> bool:
    """Not gone, and not waiting to be collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_loader_processes_do_not_outlive_a_killed_parent() -> None:
    with subprocess.Popen([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert len(pids) == 2
        assert all(map(runs, pids))
        process.kill()
        process.wait()
        deadline = time.monotonic() + 60
        while any(map(runs, pids)) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not any(map(runs, pids))


def test_too_few_samples_for_one_step() -> None:
    split = open_train({"kind": "digits"}, train={"limit": 20})
    few = pytest.raises(DataError, match="20 samples, fewer than one step of 60")
    with few as caught, open_loader(split, seed=0, batch_size=60):
        pass
    assert caught.value.hint == "--set train.batch_size=10"
    with pytest.raises(ValueError, match="does not divide"), open_loader(split, seed=0, batch_size=20, world=3):
        pass


# -- how many ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "num_cores", "local_world", "expected"),
    [
        ("cpu", 1, 1, 0),
        ("cpu", 2, 1, 1),
        ("cpu", 2, 2, 0),
        ("cpu", 16, 1, 4),
        ("cpu", 16, 4, 1),
        ("cuda", 1, 1, 1),
        ("cuda", 16, 1, 15),
        ("cuda", 64, 8, 7),
        ("cuda", 256, 1, 16),
    ],
)
def test_workers_follow_the_cores(device: str, num_cores: int, local_world: int, expected: int, tmp_path: Path) -> None:
    split = open_train(sources(tmp_path)["tar"])
    given = {"batch_size": 4, "device": torch.device(device), "num_cores": num_cores, "local_world": local_world}
    found, why = choose_workers(split, asked="auto", **given)
    assert found == expected
    assert "core" in why
    assert choose_workers(split, asked=5, **given) == (5, "as the recipe says")


def test_quick_batches_from_memory_need_no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    split = open_train({"kind": "digits"})
    given = {"batch_size": 32, "device": torch.device("cpu"), "num_cores": 8}
    monkeypatch.setattr(loader, "_batch_ms", lambda split, batch_size: 0.4)
    assert choose_workers(split, asked="auto", **given) == (0, "a batch from memory takes 0.4 ms")
    monkeypatch.setattr(loader, "_batch_ms", lambda split, batch_size: 30.0)
    assert choose_workers(split, asked="auto", **given)[0] == 2
    monkeypatch.undo()
    assert loader._batch_ms(split, len(split)) > 0  # one step is all there is
