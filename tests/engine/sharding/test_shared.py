"""Models in the hands of two real processes over gloo do what one process does, with less memory each."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from tests.engine.ranks import on_ranks
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from bmctl.engine.batch import call, rows
from bmctl.engine.computing.precision import Precision
from bmctl.engine.computing.recompute import recompute_blocks
from bmctl.engine.loading.order import share_of
from bmctl.engine.parallel import Group
from bmctl.engine.sharding.plan import plan
from bmctl.engine.sharding.shared import SharedModel, share
from bmctl.engine.training.ema import Average
from bmctl.engine.training.optim import build_optimizer
from bmctl.errors import RecipeError
from bmctl.fit import SGD, Adafactor, Adam, AdamW, Muon, RMSprop
from bmctl.recipe import LaunchConfig
from bmctl.schema import BATCH, TensorSpec

ALONE = Group(rank=0, local_rank=0, world=1, device=torch.device("cpu"), threads=1)
STEPS = 5
IMAGE = [TensorSpec(name="x", dtype="float32", shape=(BATCH, 3, 8, 8))]
CURVE = {"fp32": 1e-5, "bf16": 2e-2}
"""Largest difference of a loss or a gradient to those of one process, relative to the loss or the gradient's norm.

fp32 sums in another order; bf16 has 8 bits, and a sum of gradients in fp32.
"""


def vit() -> nn.Module:
    return VisionTransformer(img_size=8, patch_size=4, embed_dim=32, depth=3, num_heads=2, num_classes=10)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 33), nn.ReLU(), nn.Linear(33, 10))


def normed() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(180, 10))


def make(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build()


def shared(model: nn.Module, group: Group, strategy: str = "ddp", precision: str = "fp32", **given: Any) -> SharedModel:
    launch = LaunchConfig(strategy=strategy)  # type: ignore[arg-type]
    chosen = Precision(precision, "")  # type: ignore[arg-type]
    told = {"given": IMAGE, "gives": ["logits"], **given}
    found = plan(model, group=group, launch=launch, precision=chosen, **told)
    takes = [spec.name for spec in told["given"]]
    return share(model, found, group=group, precision=chosen, takes=takes, gives=told["gives"])


def batch(step: int, num: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    chance = torch.Generator().manual_seed(step)
    return torch.randn(num, 3, 8, 8, generator=chance), torch.randint(0, 10, (num,), generator=chance)


def gradients(
    one: SharedModel, group: Group, step: int, *, parts: int = 1, precision: str = "fp32", poison: bool = False
) -> float:
    """Forward and backward as the loop does it; returns this process's loss."""
    x, y = batch(step)
    share_ = len(x) // group.world
    rows = slice(group.rank * share_, (group.rank + 1) * share_)
    total = 0.0
    # All processes take their share of each part, so that one process sees the same parts.
    for part, (x_part, y_part) in enumerate(zip(x[rows].chunk(parts), y[rows].chunk(parts), strict=True)):
        with one.exchange(part == parts - 1):
            with Precision(precision, "").autocast(x.device):  # type: ignore[arg-type]
                outputs = one.forward(x_part)
            loss = nn.functional.cross_entropy(outputs.float(), y_part) / parts
            (loss * math.nan if poison else loss).backward()
        total += float(loss)
    return total


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def train(one: SharedModel, group: Group, *, optimizer: Any, clip: float | None = None, **given: Any) -> dict[str, Any]:
    """A few steps: the losses, the norms, and the gradients of the last step."""
    optimizers = build_optimizer(one.model, optimizer)
    losses, norms = [], []
    for step in range(STEPS):
        optimizers.zero_grad()
        losses.append(gradients(one, group, step, **given))
        norms.append(float(one.clip(clip)))
        optimizers.step()
    last = [whole(weight.grad) for weight in one.model.parameters() if weight.grad is not None]
    return {"losses": losses, "norms": norms, "gradients": torch.cat([grad.flatten() for grad in last]).tolist()}


def mean(lists: list[list[float]]) -> torch.Tensor:
    return torch.tensor(lists).mean(0)


def apart(got: Any, wanted: Any) -> float:
    """Length of the difference, relative to the length of what was wanted."""
    return float((torch.tensor(got) - torch.tensor(wanted)).norm() / torch.tensor(wanted).norm())


# -- the same curve -----------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_curve_and_gradients_are_those_of_one_process(strategy: str, precision: str) -> None:
    cases = [(mlp, 1, None), (vit, 1, 0.5), (vit, 2, None), (vit, 2, 0.5)]
    config = SGD(name="sgd", lr=0.05, momentum=0.9) if strategy == "ddp" else RMSprop(name="rmsprop", lr=1e-3)

    def work(group: Group) -> list[dict[str, Any]]:
        found = []
        for build, parts, clip in cases:
            one = shared(make(build, group.rank), group, strategy, precision)
            assert one.strategy == ("single" if group.world == 1 else strategy)
            found.append(train(one, group, optimizer=config, clip=clip, parts=parts, precision=precision))
        return found

    torch.set_num_threads(1)
    told = [each.value for each in on_ranks(2, work)]
    (alone,) = (each.value for each in on_ranks(1, work))
    for case, (first, second, single) in zip(cases, zip(*told, alone, strict=True), strict=True):
        assert mean([first["losses"], second["losses"]]) == pytest.approx(single["losses"], rel=CURVE[precision]), case
        assert first["norms"] == second["norms"]
        assert first["norms"] == pytest.approx(single["norms"], rel=5 * CURVE[precision]), case
        assert apart(first["gradients"], single["gradients"]) <= 10 * CURVE[precision], case


OPTIMIZERS = [
    SGD(name="sgd", lr=0.05),
    SGD(name="sgd", lr=0.05, nesterov=True, layer_decay=0.7),
    Adam(name="adam"),
    AdamW(),
    RMSprop(name="rmsprop", momentum=0.9),
    Adafactor(name="adafactor"),
    Muon(name="muon"),
]


@pytest.mark.slow
def test_optimizers_on_parts_of_matrices() -> None:
    def work(group: Group) -> list[list[float]]:
        found = []
        for config in OPTIMIZERS:
            one = shared(make(vit), group, "fsdp")
            train(one, group, optimizer=config)
            found.append(nn.utils.parameters_to_vector(one.whole_model().parameters()).tolist())
        return found

    (alone,) = (each.value for each in on_ranks(1, work))
    told = [each.value for each in on_ranks(2, work)]
    for config, got, same, wanted in zip(OPTIMIZERS, *told, alone, strict=True):
        assert got == same, config
        # Where a gradient is all but zero, its direction is what rounding makes of it; Muon orthogonalises in bf16.
        assert apart(got, wanted) < (1e-3 if config.name == "muon" else 1e-4), config


def test_activations_computed_again_on_gathered_weights() -> None:
    def work(group: Group) -> dict[str, Any]:
        model = make(vit)
        recompute_blocks(model)
        one = shared(model, group, "fsdp")
        found = train(one, group, optimizer=AdamW())
        assert type(one.whole_model().blocks[0].forward).__name__ == "method"
        return found

    first, _ = (each.value for each in on_ranks(2, work))
    (alone,) = (
        each.value for each in on_ranks(1, lambda group: train(shared(make(vit), group), group, optimizer=AdamW()))
    )
    assert apart(first["gradients"], alone["gradients"]) < 1e-4


# -- what a group agrees on ---------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_rank_0_s_weights_are_everyone_s(strategy: str) -> None:
    def work(group: Group) -> bool:
        model = make(normed, seed=group.rank)
        model[1].running_mean.fill_(group.rank)
        one = shared(model, group, strategy)
        got, wanted = one.whole_model().state_dict(), make(normed, seed=0).state_dict()
        return list(got) == list(wanted) and all(torch.equal(got[name], wanted[name]) for name in wanted)

    assert [each.value for each in on_ranks(2, work)] == [True, True]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_nan_on_one_rank_is_seen_by_all_in_the_same_step(strategy: str) -> None:
    def work(group: Group) -> list[bool]:
        one = shared(make(vit), group, strategy)
        optimizers = build_optimizer(one.model, AdamW())
        seen = []
        for step in range(3):
            poisons = step == 1 and group.rank == 1
            gradients(one, group, step, poison=poisons and strategy == "ddp")
            if poisons and strategy == "fsdp":  # in the one part that no other process holds
                one.model.head.weight.grad.to_local()[0, 0] = math.nan
            seen.append(math.isfinite(float(one.clip(None))))
            optimizers.zero_grad()
        return seen

    assert [each.value for each in on_ranks(2, work)] == [[True, False, True]] * 2


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_the_clock_changes_no_bit(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against torch's own collectives, which are what runs without the hooks."""

    def work(group: Group) -> tuple[list[float], float]:
        one = shared(make(vit), group, strategy)
        return train(one, group, optimizer=AdamW())["gradients"], one.take_communication_s()

    timed, _ = (each.value for each in on_ranks(2, work))
    monkeypatch.setattr(nn.parallel.DistributedDataParallel, "register_comm_hook", lambda *given: None)
    monkeypatch.setattr(FSDPModule, "set_custom_all_gather", lambda *given: None)
    monkeypatch.setattr(FSDPModule, "set_custom_reduce_scatter", lambda *given: None)
    plain, _ = (each.value for each in on_ranks(2, work))
    assert timed[0] == plain[0]
    assert timed[1] > 0 == plain[1]


@pytest.mark.parametrize("traced", [True, False])
def test_parameters_that_get_no_gradient(traced: bool) -> None:
    """Seen on shapes alone; of a model that cannot be traced so, looked for in every step."""

    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = mlp(), nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x if traced or float(x.sum()) else -x)

    def work(group: Group) -> dict[str, Any]:
        one = shared(make(Partly), group)
        if group.world > 1:
            assert one.forward.find_unused_parameters
            assert ("looked for in every step: the model cannot be traced" in one.reason) != traced
        return train(one, group, optimizer=AdamW(), parts=2)

    first, second = (each.value for each in on_ranks(2, work))
    (alone,) = (each.value for each in on_ranks(1, work))
    assert mean([first["losses"], second["losses"]]) == pytest.approx(alone["losses"], rel=1e-5)


class Tokens(nn.Module):
    """Sees ids and a mask, and keeps a buffer that is neither floating point nor a number."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(20, 16), nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 3))
        self.register_buffer("places", torch.arange(64))
        self.register_buffer("known", torch.ones(20, dtype=torch.bool))

    def forward(self, ids_BT: torch.Tensor, mask_BT: torch.Tensor) -> dict[str, torch.Tensor]:
        x_BTE = (
            self.table(ids_BT) * (mask_BT & self.known[ids_BT])[..., None] + 0.01 * self.places[: ids_BT.shape[1], None]
        )
        return {"hidden": x_BTE, "logits": self.head(x_BTE.mean(1)), "longest": mask_BT.sum(1)}


IDS = [
    TensorSpec(name="ids", dtype="int64", shape=(BATCH, "tokens")),
    TensorSpec(name="mask", dtype="bool", shape=(BATCH, "tokens")),
]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_model_of_tokens(strategy: str) -> None:
    """Takes two tensors, gives three by name; no parameter is looked for in any step."""

    def work(group: Group) -> list[Any]:
        gives = ["logits", "longest"]
        one = shared(make(Tokens), group, strategy, given=IDS, gives=gives, sizes={"tokens": 7})
        assert strategy == "fsdp" or group.world == 1 or not one.forward.find_unused_parameters
        assert "traced" not in one.reason
        optimizers = build_optimizer(one.model, AdamW())
        chance = torch.Generator().manual_seed(0)
        for _ in range(3):
            ids = torch.randint(20, (8, 7), generator=chance)
            batch = {"ids": ids, "mask": ids > 5, "label": ids.sum(1) % 3}
            mine = rows(batch, share_of(8, rank=group.rank, world=group.world))
            with one.exchange(True):
                outputs = call(one.forward, mine, takes=one.takes, gives=one.gives)
                nn.functional.cross_entropy(outputs["logits"], mine["label"]).backward()
            optimizers.step()
            optimizers.zero_grad()
        found = one.outputs(rows(batch, slice(0, 5)))
        assert (list(found), found["longest"].dtype) == (gives, torch.int64)
        return [each.tolist() for each in found.values()]

    first, second = (each.value for each in on_ranks(2, work))
    (alone,) = (each.value for each in on_ranks(1, work))
    assert first == second
    assert apart(first[0], alone[0]) < 1e-4
    assert first[1] == alone[1]


def test_observers_follow_rank_0_in_training() -> None:
    """What a forward pass in training reads must be the same everywhere; a checkpoint keeps only rank 0's."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()
            self.register_buffer("largest", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.inner(x * self.largest)
            self.largest.copy_(x.abs().max())
            return y

    def work(group: Group) -> list[float]:
        one = shared(make(Scaled), group)
        used = []
        for step in range(3):
            with one.exchange(True):
                used.append(float(one.model.largest))
                one.forward(batch(step)[0][group.rank :: group.world]).sum().backward()
        return used

    first, second = (each.value for each in on_ranks(2, work))
    assert first == second and len(set(first)) == 3


# -- evaluation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_outputs_have_the_order_of_the_rows(strategy: str) -> None:
    def work(group: Group) -> list[list[list[float]]]:
        one = shared(make(vit), group, strategy)
        train(one, group, optimizer=AdamW())
        found = []
        for num in (1, 2, 3, 7):
            rows = batch(9, num)[0]
            mine = torch.zeros_like(rows)
            share = share_of(num, rank=group.rank, world=group.world)
            mine[share] = rows[share]
            found.append(one.outputs({"x": mine})["logits"].tolist())
        assert one.model.training
        # The optimizer and the checkpoint look at parts, not at what an evaluation gathered.
        assert strategy == "ddp" or group.world == 1 or all(isinstance(w, DTensor) for w in one.model.parameters())
        gradients(one, group, 0)
        return found

    (alone,) = (each.value for each in on_ranks(1, work))
    told = [each.value for each in on_ranks(2, work)]
    assert told[0] == told[1]
    for got, wanted in zip(told[0], alone, strict=True):
        assert apart(got, wanted) < 1e-4


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_batch_statistics_are_rank_0_s(strategy: str, precision: str) -> None:
    def work(group: Group) -> tuple[list[list[float]], list[float], float]:
        one = shared(make(normed), group, strategy, precision)
        train(one, group, optimizer=AdamW(), precision=precision)
        own = one.model[1].running_mean.tolist()
        rows = one.outputs({"x": batch(9, 4)[0]})["logits"]
        again = one.whole_model().eval()(batch(9, 4)[0])
        return rows.tolist(), own, float((rows - again).abs().max())

    first, second = (each.value for each in on_ranks(2, work))
    assert first[0] == second[0]
    assert first[1] != second[1]
    assert max(first[2], second[2]) < 1e-5


# -- the whole model ----------------------------------------------------------------------------------


def test_the_whole_model_is_plain_and_training_goes_on() -> None:
    def work(group: Group) -> list[list[float]]:
        one = shared(make(vit), group, "fsdp")
        optimizers = build_optimizer(one.model, AdamW())
        found = []
        for step in range(3):
            gradients(one, group, step)
            optimizers.step()
            optimizers.zero_grad()
            model = one.whole_model()
            assert type(model) is VisionTransformer
            assert not any(isinstance(module, FSDPModule) or module._forward_hooks for module in model.modules())
            assert all(type(weight) is nn.Parameter for weight in model.parameters())
            assert list(model.state_dict()) == list(make(vit).state_dict())
            assert copy.deepcopy(model)(batch(0)[0]).requires_grad
            found.append(nn.utils.parameters_to_vector(model.parameters()).tolist())
        return found

    (alone,) = (each.value for each in on_ranks(1, work))
    told = [each.value for each in on_ranks(2, work)]
    assert told[0] == told[1]
    assert apart(told[0], alone) < 1e-4


def test_tied_weights_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
            self.second.weight = self.first.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x))

    def work(group: Group) -> bool:
        one = shared(make(Tied), group, "fsdp")
        one.forward(torch.randn(2, 6)).sum().backward()
        model = one.whole_model()
        return model.first.weight is model.second.weight

    assert [each.value for each in on_ranks(2, work)] == [True, True]


def test_averages_follow_the_parts_of_a_model() -> None:
    def work(group: Group) -> float:
        one = shared(make(mlp), group, "fsdp")
        average = Average(one.model, decay=0.5)
        optimizers = build_optimizer(one.model, AdamW())
        wanted = torch.zeros(()) + whole(one.model.state_dict()["1.weight"])
        for step in range(3):
            gradients(one, group, step)
            optimizers.step()
            average.update(step)
            decay = min(0.5, (1 + step) / (10 + step))
            wanted = wanted.lerp(whole(one.model.state_dict()["1.weight"]), 1 - decay)
        return float((whole(average.tensors()["1.weight"]) - wanted).abs().max())

    assert max(each.value for each in on_ranks(2, work)) < 1e-7


# -- memory -------------------------------------------------------------------------------------------


def held_bytes(one: SharedModel, optimizers: Any) -> int:
    """Of parameters, gradients and optimizer state, as far as this process holds them."""
    weights = list(one.model.parameters())
    tensors = [*weights, *(weight.grad for weight in weights), *optimizers.tensors(one.model).values()]
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return sum(tensor.untyped_storage().nbytes() for tensor in {t.untyped_storage()._cdata: t for t in local}.values())


def test_a_part_of_the_model_is_a_part_of_the_memory() -> None:
    model = timm.create_model("vit_small_patch16_224", depth=6, img_size=32, num_classes=10)
    large = [TensorSpec(name="x", dtype="float32", shape=(BATCH, 3, 32, 32))]

    def work(group: Group) -> dict[str, int]:
        found = {}
        for strategy in ("ddp", "fsdp"):
            one = shared(copy.deepcopy(model), group, strategy, given=large)
            optimizers = build_optimizer(one.model, AdamW())
            one.forward(torch.randn(2, 3, 32, 32)).sum().backward()
            optimizers.step()
            found[strategy] = held_bytes(one, optimizers)
        return found

    for each in on_ranks(2, work):
        assert each.value["ddp"] >= 16 * sum(weight.numel() for weight in model.parameters())
        assert each.value["fsdp"] <= 0.55 * each.value["ddp"]


def test_nothing_to_offload() -> None:
    launch = LaunchConfig(strategy="fsdp", cpu_offload=True)
    with pytest.raises(RecipeError, match="on the CPU it is there already") as caught:
        plan(make(mlp), group=ALONE, launch=launch, precision=Precision("fp32", ""), given=IMAGE, gives=["logits"])
    assert "cpu_offload=false" in caught.value.hint
