"""A model in the hands of a group of one: every collective, hook and policy of a larger group, on one device.

Several processes need as many GPUs: nccl gives each to one of them.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

for package in ("torch", "pydantic", "yaml", "safetensors"):
    pytest.importorskip(package)

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from bmctl.engine.computing.precision import Precision
from bmctl.engine.parallel import Group
from bmctl.engine.sharding import shared
from bmctl.engine.sharding.communication import Clock, TimedAllGather, TimedReduceScatter
from bmctl.engine.sharding.shared import SharedModel
from bmctl.engine.training.optim import build_optimizer
from bmctl.fit import AdamW

STEPS = 4


def make() -> nn.Module:
    """With blocks, as fsdp looks for them."""
    torch.manual_seed(0)
    layers = [nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True) for _ in range(3)]
    return nn.Sequential(nn.Sequential(*layers), nn.Flatten(), nn.Linear(64, 10))


def stepped(model: SharedModel, *, device: str, precision: Precision) -> list[float]:
    """The losses of a few steps on one batch."""
    chance = torch.Generator().manual_seed(0)
    x, y = torch.randn(8, 4, 16, generator=chance).to(device), torch.arange(8, device=device)
    optimizer = build_optimizer(model.model, AdamW(lr=1e-2))
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        with model.exchange(True), precision.autocast(x.device):
            loss = nn.functional.cross_entropy(model.forward(x).float(), y)
        loss.backward()
        assert torch.isfinite(model.clip(1.0))
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def alone(precision: str = "fp32", *, device: str) -> list[float]:
    made = make().to(device)
    given = {"takes": ["x"], "gives": ["logits"], "group": group_on(device), "clock": Clock(torch.device(device))}
    single = SharedModel(made, forward=made, strategy="single", reason="", **given)  # type: ignore[arg-type]
    return stepped(single, device=device, precision=Precision(precision, ""))  # type: ignore[arg-type]


def group_on(device: str) -> Group:
    return Group(rank=0, local_rank=0, world=1, device=torch.device(device, 0 if device == "cuda" else None), threads=1)


@pytest.fixture
def group(device: str) -> Iterator[Group]:
    """A process group of one, with the backends that `join` takes."""
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    yield group_on(device)
    dist.destroy_process_group()


def test_numbers_go_over_both_backends(group: Group) -> None:
    """What processes agree on lies in the machine's memory, gradients on the device."""
    for device in {"cpu", group.device.type}:
        number = torch.tensor([3, 4], device=device)
        dist.all_reduce(number, dist.ReduceOp.MAX)
        assert number.tolist() == [3, 4]


def test_ddp_does_what_one_process_does(group: Group, device: str) -> None:
    model, clock = make(), Clock(group.device)
    forward = shared._replicated(model, group=group, clock=clock, looks=False)
    given = {"takes": ["x"], "gives": ["logits"], "group": group, "clock": clock}
    made = SharedModel(model, forward=forward, strategy="ddp", reason="", **given)  # type: ignore[arg-type]
    found = stepped(made, device=device, precision=Precision("fp32", ""))
    assert found == pytest.approx(alone(device=device), rel=1e-4)
    if device == "cuda":
        torch.cuda.synchronize()
    assert made.take_communication_s() > 0


def test_what_fsdp_gathers_and_sums_is_timed(group: Group) -> None:
    """By hand: in a group of one, torch's fsdp copies instead."""
    clock, mine = Clock(group.device), torch.randn(6, device=group.device)
    gathered, summed = torch.empty_like(mine), torch.empty_like(mine)
    assert dist.group.WORLD is not None
    TimedAllGather(clock)(gathered, mine, dist.group.WORLD)
    TimedReduceScatter(clock)(summed, mine, dist.group.WORLD, dist.ReduceOp.SUM)
    assert torch.equal(gathered, mine) and torch.equal(summed, mine)
    if group.device.type == "cuda":
        torch.cuda.synchronize()
    assert clock.take() > 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("offload", [False, pytest.param(True, marks=pytest.mark.gpu)])
def test_fsdp_does_what_one_process_does(group: Group, device: str, precision: str, offload: bool) -> None:
    if offload and device == "cpu":
        pytest.skip("nothing is moved off a CPU")
    model, clock = make(), Clock(group.device)
    chosen = Precision(precision, "")  # type: ignore[arg-type]
    empty = shared.on_meta(model)
    shared._shard(model, group=group, precision=chosen, clock=clock, offload=offload)
    given = {"takes": ["x"], "gives": ["logits"], "group": group, "clock": clock}
    made = SharedModel(model, forward=model, strategy="fsdp", reason="", empty=empty, **given)  # type: ignore[arg-type]
    weights = list(model.parameters())
    assert all(isinstance(weight, DTensor) for weight in weights)
    found = stepped(made, device=device, precision=chosen)
    assert {weight.device.type for weight in weights} == {"cpu" if offload else device}
    assert found == pytest.approx(alone(precision, device=device), rel=1e-4 if precision == "fp32" else 3e-2)
    whole = made.whole_model()
    assert whole.training and not any(isinstance(weight, DTensor) for weight in whole.parameters())
