"""The largest power of two that fits, and nothing else changed."""

from __future__ import annotations

import random
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from bmctl.core import memory
from bmctl.engine.parallel import Group
from bmctl.engine.training import batchsize
from bmctl.engine.training.batchsize import find_batch_size
from bmctl.errors import ResourceError
from bmctl.models.own.networks import MLP, ResCNN

CPU = torch.device("cpu")
ALONE = Group(rank=0, local_rank=0, world=1, device=CPU, threads=1)
MIB = 2**20
CAPPED = "leave an epoch too few steps"


class Machine:
    """Memory that a trial takes: `constant` plus `per_sample` for each, out of `room`."""

    def __init__(self, monkeypatch, *, room: int, constant: int, per_sample: int) -> None:
        self.tried: list[int] = []
        self.constant, self.per_sample = constant, per_sample
        monkeypatch.setattr(memory, "free_bytes", lambda: room * MIB)
        monkeypatch.setattr(memory, "resident_bytes", lambda: 1000 * MIB)
        monkeypatch.setattr(memory, "reset_peak", lambda: None)
        monkeypatch.setattr(memory, "peak_bytes", self.peak)

    def peak(self) -> int:
        return (1000 + self.constant + self.per_sample * self.tried[-1]) * MIB

    def trial(self, batch: int) -> None:
        self.tried.append(batch)

    def find(self, *, limit: int = 2**20, model: nn.Module | None = None) -> tuple[int, list[str]]:
        return find_batch_size(self.trial, model=model or nn.Identity(), group=ALONE, limit=limit, limited_by=CAPPED)


@pytest.mark.parametrize(
    ("room", "constant", "per_sample", "expected"),
    [
        (1000, 0, 10, 64),
        (1000, 0, 12, 64),
        (1000, 0, 13, 32),
        (1000, 300, 1, 256),
        (1000, 0, 799, 1),
        (1000, 100, 1, 512),
    ],
)
def test_a_cpu_never_tries_what_would_pass_80_percent(monkeypatch, room, constant, per_sample, expected) -> None:
    machine = Machine(monkeypatch, room=room, constant=constant, per_sample=per_sample)
    found, notes = machine.find()
    assert found == expected == max(machine.tried)
    assert constant + 2 * expected * per_sample > 0.8 * room
    assert len(notes) == len(machine.tried)
    assert "twice as many would take about" in notes[-1]


def test_no_more_than_the_data_has(monkeypatch) -> None:
    machine = Machine(monkeypatch, room=1000, constant=0, per_sample=1)
    found, notes = machine.find(limit=100)
    assert (found, machine.tried) == (64, [1, 2, 4, 8, 16, 32, 64])
    assert notes[0] == "batch size, 1 at a time: takes 1 of 800 MiB"
    assert notes[-1] == f"batch size, 64 at a time: takes 64 of 800 MiB; twice as many would {CAPPED}"


def test_what_stops_it_is_said(monkeypatch) -> None:
    """Memory, the data, or both."""
    machine = Machine(monkeypatch, room=1000, constant=0, per_sample=10)
    assert machine.find()[1][-1].endswith("twice as many would take about 1280 MiB")
    assert machine.find(limit=64)[1][-1].endswith(f"twice as many would take about 1280 MiB and {CAPPED}")
    assert machine.find(limit=63)[1][-1].endswith(f"takes 320 of 800 MiB; twice as many would {CAPPED}")


def test_batch_normalisation_begins_with_two(monkeypatch) -> None:
    machine = Machine(monkeypatch, room=1000, constant=0, per_sample=1)
    machine.find(limit=8, model=nn.BatchNorm1d(4))
    assert machine.tried == [2, 4, 8]


def test_room_for_the_optimizer_is_kept(monkeypatch) -> None:
    machine = Machine(monkeypatch, room=1000, constant=0, per_sample=10)
    big = nn.Linear(1024, 64 * 1024, bias=False, device="meta")
    assert machine.find(model=big)[0] == 16  # 64 need 640 of 800 MiB, of which Adam's state takes 512


def test_gradients_are_no_growth(monkeypatch) -> None:
    """One sample takes 491 of 800 MiB, but 480 of them are gradients."""
    machine = Machine(monkeypatch, room=2200, constant=480, per_sample=11)
    assert machine.find(model=nn.Linear(1024, 120 * 1024, bias=False, device="meta"))[0] == 16


def test_processes_of_one_machine_share_its_memory(monkeypatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert Machine(monkeypatch, room=1000, constant=0, per_sample=10).find()[0] == 16


def test_not_even_one_fits(monkeypatch) -> None:
    machine = Machine(monkeypatch, room=1000, constant=900, per_sample=1)
    with pytest.raises(ResourceError, match=r"not even 1 at a time fit: .* takes 901 of 800 MiB, too much") as caught:
        machine.find()
    assert caught.value.exit_code == 7


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: not enough memory"),
    ],
)
def test_running_out_of_memory_ends_the_search(monkeypatch, error) -> None:
    machine = Machine(monkeypatch, room=10**6, constant=0, per_sample=1)

    def trial(batch: int) -> None:
        machine.trial(batch)
        if batch > 8:
            raise error

    found, notes = find_batch_size(trial, model=nn.Identity(), group=ALONE, limit=10**6, limited_by=CAPPED)
    assert (found, machine.tried) == (8, [1, 2, 4, 8, 16])
    assert notes[-1] == "batch size, 16 at a time: does not fit in memory"


def test_another_error_is_an_error(monkeypatch) -> None:
    def trial(batch: int) -> None:
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        find_batch_size(trial, model=nn.Identity(), group=ALONE, limit=8, limited_by=CAPPED)


def test_a_gpu_says_itself_when_it_is_full(monkeypatch) -> None:
    """No prediction: sizes are doubled until one fails, and the cache is emptied each time."""
    emptied: list[int] = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (1000 * MIB, 2000 * MIB))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device=None: 100 * MIB)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device=None: (100 + 10 * tried[-1]) * MIB)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(1))
    monkeypatch.setattr(batchsize, "no_trace", lambda model, device: nullcontext())
    tried: list[int] = []

    def trial(batch: int) -> None:
        tried.append(batch)
        if batch > 64:
            raise torch.OutOfMemoryError

    gpu = Group(rank=0, local_rank=0, world=1, device=torch.device("cuda", 0), threads=1)
    assert find_batch_size(trial, model=nn.Identity(), group=gpu, limit=10**6, limited_by=CAPPED)[0] == 64
    assert tried[-1] == 128
    assert len(emptied) == len(tried)


def test_in_lock_step_a_gpu_is_never_filled(monkeypatch) -> None:
    """A process that ran out of memory within an attempt would leave the others waiting in a collective."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (1000 * MIB, 2000 * MIB))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device=None: 100 * MIB)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device=None: (100 + 10 * tried[-1]) * MIB)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(batchsize, "no_trace", lambda model, device: nullcontext())
    tried: list[int] = []
    gpu = Group(rank=0, local_rank=0, world=1, device=torch.device("cuda", 0), threads=1)
    given = {"model": nn.Identity(), "group": gpu, "limit": 10**6, "limited_by": CAPPED, "in_lock_step": True}
    assert find_batch_size(tried.append, **given)[0] == max(tried) == 64

    def full(batch: int) -> None:
        tried.append(batch)
        if batch == 4:
            raise torch.OutOfMemoryError

    with pytest.raises(ResourceError, match="4 at a time do not fit") as caught:
        find_batch_size(full, **given)
    assert caught.value.hint == "--set train.batch_size=2"


def test_a_real_trial_changes_nothing() -> None:
    torch.manual_seed(0)
    model = ResCNN(num_classes=10, channels=1, width=4).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    drawn = random.getstate(), torch.get_rng_state()

    def trial(batch: int) -> None:
        model(torch.randn(batch, 1, 16, 16)).sum().backward()

    found, notes = find_batch_size(trial, model=model, group=ALONE, limit=16, limited_by=CAPPED)
    assert found == 16
    assert len(notes) == 4
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(each.grad is None for each in model.parameters())
    assert drawn[0] == random.getstate()
    assert torch.equal(drawn[1], torch.get_rng_state())


def test_a_real_peak_is_seen() -> None:
    """Where freed memory is kept too, as in a training: what lies between the trials must not count."""
    memory.keep_freed()
    pins: list[torch.Tensor] = []
    model = MLP(num_inputs=4, num_classes=2)
    taken: list[torch.Tensor] = []

    def trial(batch: int) -> None:
        taken.clear()
        taken.append(torch.ones(batch, 32 * MIB // 4))
        pins.append(torch.ones(batch, 20 * MIB // 4))  # above it, as no hole has room: what lies below cannot grow
        taken.clear()

    _, notes = find_batch_size(trial, model=model, group=ALONE, limit=8, limited_by=CAPPED)
    peaks = [int(note.split("takes ")[1].split()[0]) for note in notes]
    assert 550 < peaks[-1] < 650, f"256 MiB, and 300 that stay: {notes}"
