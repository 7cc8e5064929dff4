"""Tensors in pieces: written by any number of processes, read by any other, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.engine.ranks import on_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from bmctl.engine.checkpoints import pieces
from bmctl.engine.checkpoints.checkpoint import Snapshot, State, open_checkpoint
from bmctl.engine.checkpoints.pieces import Entry, Piece
from bmctl.engine.checkpoints.saver import Saver
from bmctl.engine.parallel import Group
from bmctl.errors import PackageError

FIELDS = {"stage": "train", "best_step": None, "num_steps": 9, "threads": 1, "device": "cpu"}
FIELDS["identity"] = {"optimizer": "adamw", "data_fingerprint": "d", "settings": {}}


def wholes() -> dict[str, torch.Tensor]:
    """Shapes that 2, 3 and 4 processes cannot share evenly; some leave processes with nothing."""
    draw = torch.Generator().manual_seed(0)
    shapes = {"even": (12, 4), "uneven": (7, 5), "single": (1, 3), "long": (13,), "empty": (0, 4), "cube": (3, 2, 5)}
    found = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    found["half"] = torch.randn(5, 6, generator=draw).bfloat16()
    found["count"] = torch.arange(11)
    found["mask"] = torch.randn(5, 2, generator=draw) > 0
    return found


PLAIN = {"scalar": torch.tensor(3.0), "buffer": torch.arange(4.0), "unsigned": torch.tensor([7], dtype=torch.uint64)}


def spread(group: Group, how: str) -> dict[str, torch.Tensor]:
    """`wholes` as this process holds them: plain, or as DTensors."""
    if how == "plain":
        return wholes()
    mesh, placements = layout(group, how)
    # Cut by hand: what DTensor's own functions did to the tensors would be one more thing to trust.
    found: dict[str, torch.Tensor] = {}
    for name, whole in wholes().items():
        fitting = [Shard(0) if isinstance(one, Shard) and one.dim >= whole.dim() else one for one in placements]
        found[name] = DTensor.from_local(
            cut(whole, mesh.get_coordinate(), mesh.shape, fitting),
            mesh,
            fitting,
            run_check=False,
            shape=whole.shape,
            stride=whole.stride(),
        )
    return found


def layout(group: Group, how: str):
    if how == "grid":
        return init_device_mesh("cpu", (2, 2), mesh_dim_names=("copy", "shard")), [Replicate(), Shard(0)]
    if how == "tiles":
        return init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "columns")), [Shard(0), Shard(1)]
    placement = {"rows": Shard(0), "columns": Shard(1), "copies": Replicate()}[how]
    return init_device_mesh("cpu", (group.world,)), [placement]


def cut(whole: torch.Tensor, here, sizes: tuple[int, ...], placements: list[Placement]) -> torch.Tensor:
    for at, size, placement in zip(here, sizes, placements, strict=True):
        if isinstance(placement, Shard):
            length = -(-whole.shape[placement.dim] // size)
            start, stop = (min(length * index, whole.shape[placement.dim]) for index in (at, at + 1))
            whole = whole.narrow(placement.dim, start, stop - start)
    return whole.clone()


def save(folder: Path, group: Group, how: str) -> None:
    snapshot = Snapshot(
        model=spread(group, how) | PLAIN,
        optimizer={f"exp_avg/{name}": tensor for name, tensor in spread(group, how).items()},
        state=State(step=1, random=({"torch": str(group.rank)},), progress=({"loss_sum": float(group.rank)},)),
    )
    saver = Saver(folder, group=group, keep=2, asynchronous=False, note=print)
    saver.begin(snapshot, step=1, fields=FIELDS)


def check(folder: Path, group: Group, how: str) -> None:
    found = open_checkpoint(folder / "latest")
    wanted = wholes()
    assert set(found.names("model")) == set(wanted) | set(PLAIN)
    for name, like in spread(group, how).items():
        for kind, key in (("model", name), ("optimizer", f"exp_avg/{name}")):
            read = found.read(kind, key, like)
            assert type(read) is type(like)
            assert read.dtype == like.dtype
            assert read.shape == like.shape
            assert torch.equal(pieces.held(read), pieces.held(like)), f"{kind} {key}"
            if isinstance(like, DTensor):
                assert read.placements == like.placements
            assert torch.equal(found.read(kind, key), wanted[name])
    for name, tensor in PLAIN.items():
        assert torch.equal(found.read("model", name), tensor)


WAYS = [
    (1, "plain"),
    (1, "rows"),
    (2, "plain"),
    (2, "rows"),
    (2, "columns"),
    (2, "copies"),
    (3, "rows"),
    (3, "columns"),
]
WAYS += [(4, "grid"), (4, "tiles")]
FAST = [(1, "plain"), (2, "rows"), (2, "plain")]


@pytest.mark.parametrize(
    ("world", "how"), [pytest.param(*way, marks=[pytest.mark.slow] * (way not in FAST)) for way in WAYS]
)
def test_what_any_number_of_processes_saved_any_other_reads(tmp_path: Path, world: int, how: str) -> None:
    told = on_ranks(world, lambda group: save(tmp_path, group, how))
    assert [one.code for one in told] == [0] * world, told
    assert all(one.value is None for one in told), told
    state = open_checkpoint(tmp_path / "latest").state
    assert [one["torch"] for one in state.random] == [str(rank) for rank in range(world)]
    assert [one["loss_sum"] for one in state.progress] == [float(rank) for rank in range(world)]
    for readers, other in [(1, "plain"), (2, "rows"), (3, "columns")]:
        told = on_ranks(readers, lambda group, other=other: check(tmp_path, group, other))
        assert [one.code for one in told] == [0] * readers, (readers, other)
        assert all(one.value is None for one in told), told


@pytest.mark.parametrize(("world", "how"), [(2, "plain"), (2, "copies"), (4, "grid"), (3, "rows")])
def test_every_element_is_written_once(tmp_path: Path, world: int, how: str) -> None:
    on_ranks(world, lambda group: save(tmp_path, group, how))
    path = tmp_path / "step-00000001"
    size = sum(tensor.nbytes for tensor in wholes().values())
    files = list(path.glob("optimizer-rank-*.safetensors"))
    assert size <= sum(file.stat().st_size for file in files) < size + len(files) * 2000
    assert len(files) == {"plain": 1, "copies": 1, "grid": 2, "rows": 3}[how]


def test_only_the_slices_of_a_shard_are_read(tmp_path: Path) -> None:
    on_ranks(1, lambda group: save(tmp_path, group, "plain"))

    def read(group: Group) -> list[int]:
        found, seen = open_checkpoint(tmp_path / "latest"), []
        for name, file in found._files.items():
            found._files[name] = Counting(file, seen)
        found.read("model", "even", spread(group, "rows")["even"])
        return seen

    assert [one.value for one in on_ranks(3, read)] == [[4 * 4]] * 3


class Counting:
    def __init__(self, file, seen: list[int]) -> None:
        self.file, self.seen = file, seen

    def get_slice(self, key: str):
        return self.file_slice(self.file.get_slice(key))

    def file_slice(self, part):
        seen = self.seen

        class Part:
            def __getitem__(self, where):
                found = part[where]
                seen.append(found.numel())
                return found

        return Part()


def test_a_model_under_fsdp_and_its_optimizer(tmp_path: Path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3))

    def train(model: nn.Module, *, sharded: bool, group: Group) -> torch.optim.Optimizer:
        if sharded:
            fully_shard(model[0])
            fully_shard(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        for weight in model.parameters():
            weight.grad = weight.detach() * 2 + 1
        optimizer.step()
        return optimizer

    def write(group: Group, *, sharded: bool) -> None:
        model = make()
        optimizer = train(model, sharded=sharded, group=group)
        moments = {f"exp_avg/{name}": optimizer.state[weight]["exp_avg"] for name, weight in model.named_parameters()}
        snapshot = Snapshot(model=dict(model.state_dict()), optimizer=moments, state=State(step=1))
        saver = Saver(tmp_path, group=group, keep=2, asynchronous=True, note=print)
        saver.begin(snapshot, step=1, fields=FIELDS)
        saver.finish()

    def read_sharded(group: Group) -> list[bool]:
        model = make()
        optimizer = train(model, sharded=True, group=group)
        found = open_checkpoint(tmp_path / "latest")
        same = [
            torch.equal(pieces.held(found.read("model", name, tensor)), pieces.held(tensor))
            for name, tensor in model.state_dict().items()
        ]
        return same + [
            torch.equal(pieces.held(found.read("optimizer", f"exp_avg/{name}", weight)), pieces.held(moment))
            for name, weight in model.named_parameters()
            for moment in [optimizer.state[weight]["exp_avg"]]
        ]

    told = on_ranks(2, lambda group: write(group, sharded=True))
    assert [(one.code, one.value) for one in told] == [(0, None)] * 2
    plain = make()
    optimizer = train(plain, sharded=False, group=Group(0, 0, 1, torch.device("cpu"), 1))
    found = open_checkpoint(tmp_path / "latest")
    assert found.names("model") == list(plain.state_dict())
    for name, tensor in plain.state_dict().items():
        assert torch.equal(found.read("model", name), tensor), name
    for name, weight in plain.named_parameters():
        assert torch.equal(found.read("optimizer", f"exp_avg/{name}"), optimizer.state[weight]["exp_avg"]), name
    for readers in (1, 2, 3):
        told = on_ranks(readers, read_sharded)
        assert all(one.value == [True] * 15 for one in told), told


# -- entries ------------------------------------------------------------------------------------------


def piece(offsets: tuple[int, ...], shape: tuple[int, ...]) -> Piece:
    return Piece(file="model-rank-0.safetensors", key="w", offsets=offsets, shape=shape)


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ([((0, 0), (4, 6))], None),
        ([((0, 0), (2, 6)), ((2, 0), (2, 3)), ((2, 3), (2, 3))], None),
        ([((0, 0), (2, 6))], "missing"),
        ([], "missing"),
        ([((0, 0), (3, 6)), ((2, 0), (2, 6))], "overlap"),
        ([((0, 0), (2, 6)), ((0, 0), (2, 6))], "overlap"),
        ([((1, 0), (4, 6))], "outside"),
        ([((0, 0), (5, 6))], "outside"),
        ([((0,), (4,))], "dimensions"),
        ([((0, 0, 0), (4, 6, 1))], "dimensions"),
    ],
)
def test_pieces_must_fill_their_tensor(parts: list, says: str | None) -> None:
    entry = Entry(shape=(4, 6), dtype="F32", pieces=tuple(piece(*part) for part in parts))
    if says is None:
        pieces.check_entry(entry, what="w")
        return
    with pytest.raises(PackageError, match=says):
        pieces.check_entry(entry, what="w")


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(PackageError, match="F4"):
        pieces.check_entry(Entry(shape=(), dtype="F4", pieces=(piece((), ()),)), what="w")


def test_processes_that_disagree_are_found_out() -> None:
    one, other = (Entry(shape=shape, dtype="F32") for shape in ((2,), (3,)))
    with pytest.raises(ValueError, match="disagree"):
        pieces.merge([{"model": {"w": one}}, {"model": {"w": other}}])
