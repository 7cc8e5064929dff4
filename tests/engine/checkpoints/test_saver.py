"""The save protocol with all its ranks: killed or failing at any point, in the background, never half done."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine.ranks import on_ranks

from bmctl import disk
from bmctl.engine.checkpoints import checkpoint, publication, saver, tensorfile
from bmctl.engine.checkpoints.checkpoint import KINDS, Identity, Snapshot, State, open_checkpoint
from bmctl.engine.checkpoints.publication import POINTS
from bmctl.engine.checkpoints.saver import Saver
from bmctl.engine.checkpoints.tensorfile import TensorFile
from bmctl.engine.parallel import Group
from bmctl.errors import BmctlError, DivergedError, ResourceError

ALONE = Group(rank=0, local_rank=0, world=1, device=torch.device("cpu"), threads=1)
FIELDS: dict[str, Any] = {
    "stage": "train",
    "best_step": None,
    "num_steps": 9,
    "identity": Identity(optimizer="adamw", data_fingerprint="d", settings={}),
    "threads": 1,
    "device": "cpu",
}
LAST_BEFORE = POINTS.index("renamed")
"""From here on the new checkpoint is there."""
EVERY_RANKS = POINTS[POINTS.index("copied") : POINTS.index("part-written") + 1]


def make_snapshot(step: int, *, rank: int = 0) -> Snapshot:
    tensors = {kind: {f"{kind}.w": torch.full((3, 4), float(step)), "n": torch.tensor(step)} for kind in KINDS}
    if rank:  # what a task owns is each process's own, under names of its own
        tensors["task"] = {f"{name}@{rank}": tensor for name, tensor in tensors["task"].items()}
    return Snapshot(**tensors, state=State(step=step, random=({"rank": rank},)))


def make_saver(folder: Path, *, group: Group = ALONE, asynchronous: bool = False, **given: Any) -> Saver:
    given = {"keep": 2, "note": lambda text: None, **given}
    return Saver(folder, group=group, asynchronous=asynchronous, **given)


def save(folder: Path, *steps: int, group: Group = ALONE, asynchronous: bool = False, **given: Any) -> None:
    """As a loop saves: it asks at its borders how it goes, and at its end waits."""
    one = make_saver(folder, group=group, asynchronous=asynchronous, **given)
    try:
        for step in steps:
            one.begin(make_snapshot(step, rank=group.rank), step=step, fields=FIELDS)
        one.finish()
    finally:
        one.abandon()


def newest(folder: Path) -> int:
    """The step of the newest checkpoint, which is whole."""
    path = checkpoint.find_newest(folder, note=lambda text: pytest.fail(text))
    assert path is not None
    found = open_checkpoint(path)
    step = found.state.step
    for kind in KINDS:
        assert torch.equal(found.read(kind, f"{kind}.w"), torch.full((3, 4), float(step)))
    return step


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# -- every point --------------------------------------------------------------------------------------


def test_the_points_are_all_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1, 2)
    reached: list[str] = []
    from bmctl import store

    for module in (disk, store, publication, tensorfile, checkpoint, saver):
        monkeypatch.setattr(module, "reach", lambda point: reached.append(point.removeprefix("store:")))
    save(tmp_path, 3)
    assert tuple(reached) == POINTS


@pytest.mark.parametrize(
    ("point", "asynchronous"), [*((point, True) for point in POINTS), ("task-written", False), ("renamed", False)]
)
def test_killed_at_any_point_leaves_the_old_state_or_the_new(tmp_path: Path, point: str, asynchronous: bool) -> None:
    save(tmp_path, 1, 2)
    told = on_ranks(1, lambda group: save(tmp_path, 3, asynchronous=asynchronous), fault=f"store:{point}")
    assert told[0].code == -signal.SIGKILL
    assert newest(tmp_path) == (2 if POINTS.index(point) < LAST_BEFORE else 3)
    assert not [name for name in names(tmp_path) if name.startswith(".")]  # looking for the newest cleans up
    assert os.readlink(tmp_path / "latest") == f"step-{newest(tmp_path):08d}"  # noqa: PTH115
    save(tmp_path, 4)
    assert newest(tmp_path) == 4
    assert names(tmp_path)[0] == "latest"
    assert len(names(tmp_path)) == 3


SAYS = {"ENOSPC": "disk is full", "EIO": "input/output error"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("point", "code"), [(point, code) for index, point in enumerate(POINTS) for code in list(SAYS)[index % 2 :][:1]]
)
def test_an_error_at_any_point_is_of_the_disk_and_leaves_the_others(
    tmp_path: Path, point: str, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1, 2)
    monkeypatch.setenv("BMCTL_FAULT", f"store:{point}={code}")
    with pytest.raises(ResourceError) as caught:
        save(tmp_path, 3, asynchronous=code == "EIO")
    assert caught.value.exit_code == 7
    if point != "copied":
        assert SAYS[code] in caught.value.message
        assert str(tmp_path) in caught.value.message
    monkeypatch.delenv("BMCTL_FAULT")
    is_there = POINTS.index(point) >= LAST_BEFORE
    assert not [name for name in names(tmp_path) if name.startswith(".")]
    assert "step-00000002" in names(tmp_path)
    assert newest(tmp_path) == (3 if is_there else 2)
    save(tmp_path, 4)
    assert newest(tmp_path) == 4
    assert len(names(tmp_path)) == 3


@pytest.mark.parametrize("point", ["probe", "atomic-written", "atomic-renamed", "probed"])
def test_killed_while_probing_leaves_nothing(tmp_path: Path, point: str) -> None:
    def probe(group: Group) -> None:
        checkpoint.check_room(tmp_path, torch.nn.Linear(2, 2))

    assert on_ranks(1, probe, fault=f"store:{point}")[0].code == -signal.SIGKILL
    assert on_ranks(1, probe, fault=f"store:{point}=ENOSPC")[0].value["exit_code"] == 7
    save(tmp_path, 1)
    assert names(tmp_path) == ["latest", "step-00000001"]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("point", ["copied", "model-written", "ema-synced", "part-written"])
def test_an_error_of_one_rank_is_the_same_on_all(tmp_path: Path, point: str, rank: int) -> None:
    save(tmp_path, 1, 2)
    fault = f"store:{point}@{rank}=ENOSPC"
    if rank and point != "copied":
        fault = f"store:part-written@{rank}=ENOSPC"  # all else plain tensors leave to rank 0
    told = on_ranks(2, lambda group: save(tmp_path, 3, group=group, asynchronous=point != "ema-synced"), fault=fault)
    assert [one.code for one in told] == [0, 0]
    assert told[0].value == told[1].value
    assert told[0].value["error"] == "ResourceError"
    assert names(tmp_path) == ["latest", "step-00000001", "step-00000002"]
    assert newest(tmp_path) == 2


@pytest.mark.slow
@pytest.mark.parametrize("point", [point for point in POINTS if point not in EVERY_RANKS])
def test_an_error_of_rank_0_as_it_publishes_is_the_same_on_all(tmp_path: Path, point: str) -> None:
    save(tmp_path, 1, 2)
    told = on_ranks(2, lambda group: save(tmp_path, 3, group=group, asynchronous=True), fault=f"store:{point}@0=ENOSPC")
    assert [one.code for one in told] == [0, 0]
    assert told[0].value == told[1].value
    assert told[0].value["exit_code"] == 7
    assert newest(tmp_path) == (3 if POINTS.index(point) >= LAST_BEFORE else 2)


@pytest.mark.parametrize(("point", "rank"), [("copied", 1), ("part-written", 1), ("model-synced", 0), ("synced", 0)])
def test_one_of_two_ranks_is_killed(tmp_path: Path, point: str, rank: int) -> None:
    save(tmp_path, 1, 2)
    told = on_ranks(2, lambda group: save(tmp_path, 3, group=group, asynchronous=True), fault=f"store:{point}@{rank}")
    assert told[rank].code == -signal.SIGKILL
    assert told[1 - rank].code == 1  # gloo's own error: the launcher knows whom to blame
    assert newest(tmp_path) == 2
    assert names(tmp_path) == ["latest", "step-00000001", "step-00000002"]


def test_ranks_that_share_no_disk_are_told(tmp_path: Path) -> None:
    def work(group: Group) -> None:
        folder = tmp_path / str(group.rank)
        folder.mkdir()
        save(folder, 1, group=group)

    told = on_ranks(2, work)
    assert told[0].value == told[1].value
    assert "rank 1 does not see" in told[0].value["message"]
    assert "-o RUN" in told[0].value["hint"]


def test_nan_on_one_rank_is_never_published(tmp_path: Path) -> None:
    def work(group: Group) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import DTensor, Shard

        local = torch.tensor([1.0, float("nan") if group.rank else 0.0])
        shard = DTensor.from_local(local, init_device_mesh("cpu", (2,)), [Shard(0)])
        one = make_saver(tmp_path, group=group, asynchronous=True)
        one.begin(Snapshot(model={"w": shard}, optimizer={}, state=State(step=1)), step=1, fields=FIELDS)
        one.finish()

    told = on_ranks(2, work)
    assert told[0].value == told[1].value
    assert told[0].value["error"] == "DivergedError"
    assert "w is no longer finite" in told[0].value["message"]
    assert names(tmp_path) == []


# -- in the background ----------------------------------------------------------------------------------


class Gate:
    """Holds the writing of files up until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.writing = threading.Event(), threading.Event()
        write = TensorFile.write

        def held(file: TensorFile, path: Path, **given: Any):
            self.writing.set()
            while not self.open.wait(0.01):
                given["going_on"]()
            return write(file, path, **given)

        monkeypatch.setattr(TensorFile, "write", held)


def test_what_is_published_is_what_was_there_at_the_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    one, live = make_saver(tmp_path, asynchronous=True), make_snapshot(1)
    one.begin(live, step=1, fields=FIELDS)  # returns though nothing can be written yet
    assert gate.writing.wait(30)
    for kind in KINDS:
        for tensor in getattr(live, kind).values():
            tensor.add_(100)
    for _ in range(3):
        status = one.status()
        assert status == saver.BUSY
        one.advance(status)
    assert checkpoint.steps_in(tmp_path) == []
    gate.open.set()
    seen = set()
    while one.saved_step != 1:
        seen.add(one.status())
        one.advance(one.status())
    assert seen <= {saver.IDLE, saver.BUSY}
    assert newest(tmp_path) == 1
    assert torch.equal(open_checkpoint(tmp_path / "latest").read("model", "n"), torch.tensor(1))


def test_nothing_is_published_before_all_ranks_have_written(tmp_path: Path) -> None:
    def work(group: Group) -> list[bool]:
        one = make_saver(tmp_path, group=group, asynchronous=True)
        with pytest.MonkeyPatch.context() as patch:
            gate = Gate(patch)
            if group.rank == 0:
                gate.open.set()
            one.begin(sharded(group), step=1, fields=FIELDS)
            seen = []
            for _ in range(20):
                one.advance(agreed(group, one))
                seen.append((tmp_path / "step-00000001").exists())
            gate.open.set()
            one.finish()
        return [any(seen), (tmp_path / "step-00000001").exists()]

    assert [one.value for one in on_ranks(2, work)] == [[False, True]] * 2


def agreed(group: Group, one: Saver) -> int:
    from bmctl.engine.parallel import Vote

    return Vote(group, [one.status()]).result()[0]


def sharded(group: Group) -> Snapshot:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = init_device_mesh("cpu", (group.world,))
    weight = DTensor.from_local(torch.full((2,), float(group.rank)), mesh, [Shard(0)])
    return Snapshot(model={"w": weight}, optimizer={}, state=State(step=1))


def test_the_copies_live_in_the_same_memory_again(tmp_path: Path) -> None:
    one = make_saver(tmp_path)
    places = []
    for step in (1, 2):
        one.begin(make_snapshot(step), step=step, fields=FIELDS)
        places.append([file._memory.data_ptr() for file in one._files.values()])
    assert places[0] == places[1]
    snapshot = make_snapshot(3)
    snapshot.best.clear()
    one.begin(snapshot, step=3, fields=FIELDS)
    assert open_checkpoint(tmp_path / "latest").names("best") == []


def test_a_save_that_takes_too_long_is_waited_for_and_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, notes, beats = Gate(monkeypatch), [], []

    def beat(step: int, doing: str) -> None:
        beats.append((step, doing))
        gate.open.set()

    one = make_saver(tmp_path, asynchronous=True, note=notes.append, beat=beat)
    for step in (1, 2, 3):
        gate.open.clear()
        one.begin(make_snapshot(step), step=step, fields=FIELDS)
    one.finish()
    assert checkpoint.steps_in(tmp_path) == [2, 3]
    assert len(notes) == 1
    assert "longer" in notes[0]
    assert "checkpoint_every_steps" in notes[0]
    assert beats[0] == (1, "saving")


def test_a_step_is_saved_once(tmp_path: Path) -> None:
    one = make_saver(tmp_path, asynchronous=True)
    for _ in range(2):
        one.begin(make_snapshot(1), step=1, fields=FIELDS)
    one.finish()
    one.begin(make_snapshot(1), step=1, fields=FIELDS)
    one.finish()
    assert one.saved_step == 1
    assert checkpoint.steps_in(tmp_path) == [1]


def test_what_is_abandoned_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    one = make_saver(tmp_path, asynchronous=True)
    one.begin(make_snapshot(1), step=1, fields=FIELDS)
    assert gate.writing.wait(30)
    one.abandon()
    one.abandon()
    assert names(tmp_path) == []
    assert one.status() == saver.IDLE


def test_a_vote_from_before_a_save_does_not_count_for_it(tmp_path: Path) -> None:
    """The loop votes before the optimizer's step and hears the result after it."""
    one = make_saver(tmp_path, asynchronous=True)
    status = one.status()
    one.begin(make_snapshot(1), step=1, fields=FIELDS)
    one.advance(status)
    assert one._phase == "writing"
    one.finish()


def test_a_failed_save_is_told_at_the_next_border(tmp_path: Path) -> None:
    one = make_saver(tmp_path, asynchronous=True)
    snapshot = make_snapshot(1)
    snapshot.ema["ema.w"][0, 0] = float("inf")
    one.begin(snapshot, step=1, fields=FIELDS)
    while (status := one.status()) == saver.BUSY:
        time.sleep(0.001)
    assert status == saver.FAILED
    with pytest.raises(DivergedError, match=r"ema after step 1: ema\.w"):
        one.advance(status)
    assert names(tmp_path) == []


def test_a_bug_in_the_background_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publication, "retain", lambda *_, **__: 1 / 0)
    with pytest.raises(BmctlError, match="ZeroDivisionError") as caught:
        save(tmp_path, 1, asynchronous=True)
    assert caught.value.exit_code == 1
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_old_checkpoints_are_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1, 2)
    checked: list[str] = []
    verified = checkpoint.verified
    monkeypatch.setattr(checkpoint, "verified", lambda path: checked.append(path.name) or verified(path))
    one = make_saver(tmp_path, keep=3)
    for step in (3, 4):
        one.begin(make_snapshot(step), step=step, fields=FIELDS)
    assert checked == ["step-00000002", "step-00000001"]
    file = tmp_path / "step-00000003" / "state.json"
    file.write_bytes(file.read_bytes().replace(b'"step":3', b'"step":9'))
    one.begin(make_snapshot(5), step=5, fields=FIELDS)
    assert checked[2:] == ["step-00000003"]
    assert "step-00000003.corrupt" in names(tmp_path)
