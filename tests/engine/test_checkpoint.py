"""Checkpoints: whole or not there, verified before they are used, kept as long as they are needed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bmctl import store
from bmctl.engine import checkpoint
from bmctl.engine.checkpoint import Identity, Snapshot, State
from bmctl.errors import BmctlError, DataError, DivergedError, PackageError, ResourceError

IDENTITY = Identity(optimizer="adamw", data_fingerprint="d", settings={"fit": {"epochs": 3, "lr": 0.1}})


def make_snapshot(step: int, **given) -> Snapshot:
    tensors = {"a.weight": torch.full((2, 3), float(step)), "a.count": torch.tensor(step), "mask": torch.tensor([True])}
    return Snapshot(
        **{
            "model": tensors,
            "optimizer": {"exp_avg/a.weight": torch.ones(2, 3), "step/a.weight": torch.tensor(float(step))},
            "best": {},
            "state": State(step=step, loss_sum=0.1 + 0.2, random=({"torch": "abc"},)),
            **given,
        }
    )


def save(folder: Path, step: int, *, keep: int = 2, best_step: int | None = None, **given) -> list[str]:
    notes: list[str] = []
    fields = {"stage": "train", "best_step": best_step, "num_steps": 9, "identity": IDENTITY}
    fields |= {"world": 1, "threads": 1, "device": "cpu"}
    checkpoint.save(folder, make_snapshot(step, **given), step=step, keep=keep, fields=fields, note=notes.append)
    return notes


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    weight = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    tied = {"w": weight, "also_w": weight, "part": weight[0]}
    save(tmp_path, 7, model=tied, best={"w": torch.zeros(1)})
    found, manifest = checkpoint.load(tmp_path / "latest")
    assert manifest.step == 7
    assert manifest.identity == IDENTITY
    assert found.model.keys() == tied.keys()
    assert all(torch.equal(found.model[name], tied[name]) for name in tied)
    assert torch.equal(found.best["w"], torch.zeros(1))
    assert found.state == make_snapshot(7).state
    assert found.optimizer["step/a.weight"].item() == 7.0


def test_latest_follows_and_parents_are_known(tmp_path: Path) -> None:
    save(tmp_path, 1)
    first = store.manifest_hash(tmp_path / "step-00000001")
    save(tmp_path, 2)
    assert (tmp_path / "latest").resolve() == tmp_path / "step-00000002"
    assert checkpoint.load(tmp_path / "latest")[1].parent == first


def test_the_best_and_the_newest_are_kept(tmp_path: Path) -> None:
    for step in range(1, 7):
        save(tmp_path, step, best_step=min(step, 2))
    assert names(tmp_path) == ["latest", "step-00000002", "step-00000005", "step-00000006"]


def test_only_what_verifies_counts_as_kept(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    (tmp_path / "step-00000002" / "state.json").write_text("{}")
    notes = save(tmp_path, 3)
    assert names(tmp_path) == ["latest", "step-00000001", "step-00000002.corrupt", "step-00000003"]
    assert "state.json" in notes[0]


def test_a_step_is_never_published_twice(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with pytest.raises(ResourceError, match="step-00000001"):
        save(tmp_path, 1)


@pytest.mark.parametrize("kind", ["model", "optimizer", "best"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_never_published(tmp_path: Path, kind: str, value: float) -> None:
    save(tmp_path, 1)
    with pytest.raises(DivergedError, match="bad"):
        save(tmp_path, 2, **{kind: {"bad": torch.tensor([0.0, value])}})
    assert names(tmp_path) == ["latest", "step-00000001"]
    assert (tmp_path / "latest").resolve().name == "step-00000001"


FILES = [
    "model-rank-0.safetensors",
    "optimizer-rank-0.safetensors",
    "index.json",
    "state.json",
    "manifest.json",
]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def add(path: Path) -> None:
    path.with_name("extra").write_text("")


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("harm", [truncate, flip, Path.unlink, add], ids=["truncate", "flip", "remove", "add"])
def test_a_bad_checkpoint_is_set_aside_and_said(tmp_path: Path, file: str, harm) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    notes: list[str] = []
    bad = tmp_path / "step-00000002"
    before = store.manifest_hash(bad)
    harm(bad / file)
    if file == "manifest.json" and harm is truncate:
        truncate(bad / file)  # the first byte off is only the newline at its end
    found = checkpoint.find_newest(tmp_path, note=notes.append)
    if file == "manifest.json" and harm is flip and found == bad:
        assert store.manifest_hash(bad) != before  # a digit of what the manifest merely reports
        return
    assert found == tmp_path / "step-00000001"
    assert "step-00000002.corrupt" in notes[0]
    assert (tmp_path / "step-00000002.corrupt").is_dir()
    assert checkpoint.load(found)[0].state.step == 1


def test_no_checkpoint_verifies(tmp_path: Path) -> None:
    assert checkpoint.find_newest(tmp_path / "none", note=print) is None
    for count in range(2):
        save(tmp_path, 1)
        (tmp_path / "step-00000001" / "state.json").unlink()
        assert checkpoint.find_newest(tmp_path, note=lambda text: None) is None
        assert len([name for name in names(tmp_path) if "corrupt" in name]) == count + 1


@pytest.mark.parametrize("text", ["[]", '{"step": "one"}', '{"no": 1}', "\x00"])
def test_a_forged_state_is_refused(tmp_path: Path, text: str) -> None:
    save(tmp_path, 1)
    path = tmp_path / "step-00000001"
    (path / "state.json").write_text(text)
    _record_again(path)
    with pytest.raises(PackageError, match="cannot be read"):
        checkpoint.load(path)


def test_forged_tensors_are_refused(tmp_path: Path) -> None:
    save(tmp_path, 1)
    path = tmp_path / "step-00000001"
    (path / "model-rank-0.safetensors").write_bytes(b"\x80\x04.")  # a pickle
    _record_again(path)
    with pytest.raises(PackageError, match="cannot be read"):
        checkpoint.load(path)


def _record_again(path: Path) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"] = {name: record.model_dump() for name, record in store.records(path).items()}
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("change", "kind", "says"),
    [
        ({"optimizer": "sgd"}, PackageError, "holds the state of adamw; the recipe says sgd"),
        ({"data_fingerprint": "e"}, DataError, "the data set changed"),
        ({"settings": {"fit": {"epochs": 3, "lr": 0.2}}}, PackageError, "fit.lr was 0.1, is 0.2"),
        ({"settings": {"fit": {"epochs": 3}}}, PackageError, "fit.lr was 0.1, is None"),
    ],
)
def test_only_the_same_training_goes_on(change: dict, kind: type[BmctlError], says: str) -> None:
    with pytest.raises(kind, match=says) as caught:
        checkpoint.check_identity(Path("step-1"), IDENTITY, IDENTITY.model_copy(update=change))
    assert "--overwrite" in caught.value.hint
    checkpoint.check_identity(Path("step-1"), IDENTITY, IDENTITY)


def test_room_is_checked_first(tmp_path: Path, monkeypatch) -> None:
    model = torch.nn.Linear(1000, 1000)
    checkpoint.check_room(tmp_path / "new", model)
    assert names(tmp_path / "new") == []
    asked = []
    monkeypatch.setattr(store, "check_room", lambda folder, size_bytes: asked.append(size_bytes))
    checkpoint.check_room(tmp_path, model)
    assert 4 * 4_000_000 < asked[0] < 64_000_000
