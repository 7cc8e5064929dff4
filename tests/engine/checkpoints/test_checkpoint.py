"""Checkpoints: whole or not there, verified before they are used, kept as long as they are needed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bmctl import store
from bmctl.engine.checkpoints import checkpoint
from bmctl.engine.checkpoints.checkpoint import KINDS, Identity, open_checkpoint
from bmctl.engine.checkpoints.saver import Saver
from bmctl.engine.checkpoints.state import Snapshot, State
from bmctl.engine.parallel import Group
from bmctl.errors import BmctlError, DataError, DivergedError, FormatError, PackageError, ResourceError

IDENTITY = Identity(optimizer="adamw", data_fingerprint="d", settings={"fit": {"epochs": 3, "lr": 0.1}})


def make_snapshot(step: int, **given) -> Snapshot:
    tensors = {"a.weight": torch.full((2, 3), float(step)), "a.count": torch.tensor(step), "mask": torch.tensor([True])}
    return Snapshot(
        **{
            "model": tensors,
            "optimizer": {"exp_avg/a.weight": torch.ones(2, 3), "step/a.weight": torch.tensor(float(step))},
            "best": {},
            "state": State(step=step, elapsed_s=0.1 + 0.2, random=({"torch": "abc"},)),
            **given,
        }
    )


def save(folder: Path, step: int, *, keep: int = 2, best_step: int | None = None, **given) -> list[str]:
    notes: list[str] = []
    fields = {"stage": "train", "best_step": best_step, "num_steps": 9, "identity": IDENTITY}
    fields |= {"threads": 1, "device": "cpu"}
    group = Group(rank=0, local_rank=0, world=1, device=torch.device("cpu"), threads=1)
    saver = Saver(folder, group=group, keep=keep, asynchronous=False, note=notes.append)
    saver.begin(make_snapshot(step, **given), step=step, fields=fields)
    return notes


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_is_read(tmp_path: Path) -> None:
    weight = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    tied = {"w": weight, "also_w": weight, "part": weight[0], "turned": weight.transpose(0, 1)}
    others = {
        "half": weight.bfloat16(),
        "empty": torch.empty(0, 3),
        "bits": weight > 0,
        "eight": torch.arange(3).byte(),
    }
    save(tmp_path, 7, model=tied, best={"w": torch.zeros(1)}, task=others)
    found = open_checkpoint(tmp_path / "latest")
    assert found.manifest.step == 7
    assert found.manifest.identity == IDENTITY
    assert found.state == make_snapshot(7).state
    assert found.names("model") == list(tied)
    for kind, tensors in (("model", tied), ("task", others)):
        for name, tensor in tensors.items():
            assert torch.equal(found.read(kind, name), tensor), name
            assert found.read(kind, name, tensor).dtype == tensor.dtype
    assert torch.equal(found.read("best", "w"), torch.zeros(1))
    assert found.names("ema") == []
    assert found.read("optimizer", "step/a.weight").item() == 7.0


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 1)
    found = open_checkpoint(tmp_path / "latest")
    with pytest.raises(PackageError, match=r"a\.weight has shape \[2, 3\] there, \[3, 2\] here"):
        found.read("model", "a.weight", torch.zeros(3, 2))
    with pytest.raises(PackageError, match="no ema tensor"):
        found.read("ema", "a.weight")


def test_every_field_of_the_state_comes_back(tmp_path: Path) -> None:
    """None is lost, and each is another value than its default."""
    state = State(
        step=5, validated_step=4, best_step=3, best_value=0.1 + 0.2, num_seen=64, seed=9, epoch=2, batch_size=32,
        precision="fp16", scaler={"scale": 65536.0}, skipped=2, waited=3, elapsed_s=1.5,
        random=({"torch": "abc"},), progress=({"loss_sum": 0.1},),
    )  # fmt: skip
    assert not [name for name, info in State.model_fields.items() if getattr(state, name) == info.default]
    save(tmp_path, 5, state=state)
    assert open_checkpoint(tmp_path / "latest").state == state


def test_latest_follows_and_parents_are_known(tmp_path: Path) -> None:
    save(tmp_path, 1)
    first = store.manifest_hash(tmp_path / "step-00000001")
    save(tmp_path, 2)
    assert (tmp_path / "latest").resolve() == tmp_path / "step-00000002"
    assert open_checkpoint(tmp_path / "latest").manifest.parent == first


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


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "task"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_never_published(tmp_path: Path, kind: str, value: float) -> None:
    save(tmp_path, 1)
    with pytest.raises(DivergedError, match="bad"):
        save(tmp_path, 2, **{kind: {"bad": torch.tensor([0.0, value])}})
    assert names(tmp_path) == ["latest", "step-00000001"]
    assert (tmp_path / "latest").resolve().name == "step-00000001"


def test_what_a_feed_owns_may_be_infinite(tmp_path: Path) -> None:
    save(tmp_path, 1, task={"rank-0/best_return": torch.tensor(-torch.inf)})
    assert open_checkpoint(tmp_path / "latest").read("task", "rank-0/best_return") == -torch.inf


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
    assert open_checkpoint(found).state.step == 1
    assert (tmp_path / "latest").resolve() == found


def test_no_checkpoint_verifies(tmp_path: Path) -> None:
    assert checkpoint.find_newest(tmp_path / "none", note=print) is None
    for count in range(2):
        save(tmp_path, 1)
        (tmp_path / "step-00000001" / "state.json").unlink()
        assert checkpoint.find_newest(tmp_path, note=lambda text: None) is None
        assert len([name for name in names(tmp_path) if "corrupt" in name]) == count + 1


def test_a_checkpoint_of_another_version_is_refused_and_stays(tmp_path: Path) -> None:
    save(tmp_path, 1)
    path = tmp_path / "step-00000001" / "manifest.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(fields | {"format": fields["format"] - 1}))
    with pytest.raises(FormatError, match="made by an older bmctl"):
        checkpoint.find_newest(tmp_path, note=pytest.fail)
    assert names(tmp_path) == ["latest", "step-00000001"]


def test_what_a_killed_process_left_is_cleared_away(tmp_path: Path) -> None:
    save(tmp_path, 1)
    dead = 2**22 + 1  # beyond any pid
    (tmp_path / f".step-00000002.tmp-{dead}-0123abcd").mkdir()
    (tmp_path / f".latest.tmp-{dead}-0123abcd").symlink_to("step-00000002")
    (tmp_path / f".probe.tmp-{dead}-0123abcd").write_text("probe")
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").symlink_to("step-00000009")
    assert checkpoint.find_newest(tmp_path, note=pytest.fail) == tmp_path / "step-00000001"
    assert names(tmp_path) == ["latest", "step-00000001"]
    assert (tmp_path / "latest").resolve() == tmp_path / "step-00000001"
    (tmp_path / "step-00000001" / "index.json").unlink()
    assert checkpoint.find_newest(tmp_path, note=lambda text: None) is None
    assert names(tmp_path) == ["step-00000001.corrupt"]


def test_all_checkpoints_are_discarded_at_once(tmp_path: Path) -> None:
    folder = checkpoint.folder_of(tmp_path, "train")
    save(folder, 1)
    checkpoint.discard(folder)
    checkpoint.discard(folder)
    assert names(folder.parent) == []


# -- forged, and with the right hashes all the same -----------------------------------------------------


@pytest.mark.parametrize("file", ["state.json", "index.json"])
@pytest.mark.parametrize("text", ["[]", '{"step": "one"}', '{"no": 1}', "\x00", '{"step": NaN}'])
def test_forged_json_is_refused(tmp_path: Path, file: str, text: str) -> None:
    save(tmp_path, 1)
    path = tmp_path / "step-00000001"
    (path / file).write_text(text)
    record_again(path)
    with pytest.raises(PackageError, match="cannot be read"):
        open_checkpoint(path)


@pytest.mark.parametrize("data", [b"\x80\x04.", b"PK\x03\x04", b"", b"\xff" * 64])
def test_forged_tensors_are_refused(tmp_path: Path, data: bytes) -> None:
    save(tmp_path, 1)
    path = tmp_path / "step-00000001"
    (path / "model-rank-0.safetensors").write_bytes(data)
    record_again(path)
    with pytest.raises(PackageError, match="cannot be read"):
        open_checkpoint(path)


def record_again(path: Path) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"] = {name: record.model_dump() for name, record in store.records(path).items()}
    (path / "manifest.json").write_text(json.dumps(manifest))


WEIGHT = ("tensors", "model", "a.weight")
PIECE = (*WEIGHT, "pieces", 0)


@pytest.mark.parametrize(
    ("where", "value", "says"),
    [
        ((*PIECE, "offsets"), [1, 0], "outside"),
        ((*PIECE, "offsets"), [-1, 0], "cannot be read"),
        ((*PIECE, "offsets"), [0], "dimensions"),
        ((*PIECE, "offsets"), [2**80, 0], "cannot be read"),
        ((*PIECE, "offsets"), [0.5, 0], "cannot be read"),
        ((*PIECE, "shape"), [3, 2], "another shape or dtype"),
        ((*PIECE, "shape"), [2**61, 2**61], "another shape or dtype"),
        ((*PIECE, "key"), "a.count", "another shape or dtype"),
        ((*PIECE, "key"), "none", "has no 'none'"),
        ((*PIECE, "file"), "../../../../etc/passwd", "no such file"),
        ((*PIECE, "file"), "/etc/passwd", "no such file"),
        ((*PIECE, "file"), "model-rank-1.safetensors", "no such file"),
        ((*PIECE, "file"), "optimizer-rank-0.safetensors", "no such file"),
        ((*PIECE, "file"), "state.json", "no such file"),
        ((*WEIGHT, "pieces"), [], "missing"),
        ((*WEIGHT, "shape"), [2, 4], "missing"),
        ((*WEIGHT, "shape"), [4, 3], "missing"),
        ((*WEIGHT, "shape"), [1, 3], "outside"),
        ((*WEIGHT, "shape"), [10**15, 10**15], "missing"),
        ((*WEIGHT, "shape"), [6], "dimensions"),
        ((*WEIGHT, "dtype"), "F64", "another shape or dtype"),
        ((*WEIGHT, "dtype"), "I32", "another shape or dtype"),
        ((*WEIGHT, "dtype"), "object", "another shape or dtype"),
        ((*WEIGHT, "more"), 1, "cannot be read"),
        (("tensors", "model"), {}, "leaves out"),
        (("tensors", "teacher"), {}, "unknown kind"),
    ],
)
def test_a_forged_index_is_refused(tmp_path: Path, where: tuple, value: object, says: str) -> None:
    save(tmp_path, 1)
    path = tmp_path / "step-00000001"
    index = json.loads((path / "index.json").read_text())
    inner = index
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = value
    (path / "index.json").write_text(json.dumps(index))
    record_again(path)
    with pytest.raises(PackageError, match=says) as caught:
        open_checkpoint(path)
    assert caught.value.exit_code == 5


def test_pieces_that_overlap_or_stand_twice_are_refused(tmp_path: Path) -> None:
    save(tmp_path, 1)
    path = tmp_path / "step-00000001"
    index = json.loads((path / "index.json").read_text())
    pieces = index["tensors"]["model"]["a.weight"]["pieces"]
    pieces.append(pieces[0])
    (path / "index.json").write_text(json.dumps(index))
    record_again(path)
    with pytest.raises(PackageError, match="more pieces than there were processes"):
        open_checkpoint(path)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"world": 2}))
    with pytest.raises(PackageError, match="of another tensor"):
        open_checkpoint(path)


@pytest.mark.parametrize("name", ["index.json", "state.json"])
def test_a_manifest_must_record_what_every_checkpoint_has(tmp_path: Path, name: str) -> None:
    save(tmp_path, 1)
    path = tmp_path / "step-00000001"
    (path / name).unlink()
    record_again(path)
    with pytest.raises(PackageError, match=name):
        open_checkpoint(path)


def test_a_state_of_another_step_is_refused(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    path = tmp_path / "step-00000002"
    (path / "state.json").write_bytes((tmp_path / "step-00000001" / "state.json").read_bytes())
    record_again(path)
    with pytest.raises(PackageError, match="manifest is of step 2, its state of step 1"):
        open_checkpoint(path)


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
