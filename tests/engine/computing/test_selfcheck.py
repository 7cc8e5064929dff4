"""The chosen precision is compared with fp32, and given up where it does not hold; nothing else happens."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bmctl.engine.batch import Batch
from bmctl.engine.computing import selfcheck
from bmctl.engine.computing.precision import Precision
from bmctl.engine.computing.recompute import recompute_blocks
from bmctl.engine.computing.selfcheck import check
from bmctl.engine.parallel import Group
from bmctl.models.own.networks import MLP, ResCNN

CPU = torch.device("cpu")
ALONE = Group(rank=0, local_rank=0, world=1, device=CPU, threads=1)
BF16, FP16 = Precision("bf16", "asked"), Precision("fp16", "asked")


class Offset(nn.Module):
    """Features around `offset` that differ by less than 1, which a LayerNorm then looks at."""

    def __init__(self, offset: float) -> None:
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(192, 64), nn.LayerNorm(64), nn.Linear(64, 10)
        nn.init.constant_(self.body.bias, offset)

    def forward(self, x):
        return self.head(self.norm(self.body(x.flatten(1))).relu())


class Scaled(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor, self.body, self.head = factor, nn.Linear(192, 64), nn.Linear(64, 10)

    def forward(self, x):
        return self.head(self.body(self.factor * x.flatten(1))) / self.factor


def batches(size: int = 8, num: int = 2, num_samples: int = 16) -> list[Batch]:
    numbers = torch.Generator().manual_seed(5)
    return [
        {
            "x": torch.randn(num_samples, 3, size, size, generator=numbers),
            "label": torch.randint(10, (num_samples,), generator=numbers),
        }
        for _ in range(num)
    ]


def cross_entropy(outputs: Batch, batch: Batch) -> torch.Tensor:
    return F.cross_entropy(outputs["logits"], batch["label"])


def checked(model: nn.Module, precision: Precision = BF16, *, size: int = 8, **given: Any) -> Any:
    options = {"loss": cross_entropy, "batches": batches(size), "group": ALONE, **given}
    return check(precision, model=model.train(), takes=["x"], gives=["logits"], **options)


def mlp() -> nn.Module:
    return MLP(num_inputs=192, num_classes=10)


def rescnn() -> nn.Module:
    return ResCNN(num_classes=10, channels=3, width=8)


def resnet() -> nn.Module:
    import torchvision

    return torchvision.models.resnet18(num_classes=10)


def vit() -> nn.Module:
    import timm

    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=3, num_classes=10, drop_rate=0.1, drop_path_rate=0.2
    )


# A CPU takes minutes for resnet18 in fp16.
@pytest.mark.parametrize(
    ("make", "size", "precision"),
    [
        (mlp, 8, BF16),
        (mlp, 8, FP16),
        (rescnn, 16, BF16),
        (rescnn, 16, FP16),
        (vit, 32, BF16),
        (vit, 32, FP16),
        pytest.param(resnet, 32, BF16, marks=pytest.mark.slow),
    ],
)
def test_healthy_models_hold(make, size, precision) -> None:
    torch.manual_seed(0)
    found, note = checked(make(), precision, size=size)
    assert found is precision
    assert note is not None and note.startswith(f"{precision.name} holds: against fp32 over the first 2 batches")


def test_features_that_bf16_cannot_tell_apart() -> None:
    torch.manual_seed(0)
    found, note = checked(Offset(1e4))
    assert (found.name, found.tf32) == ("fp32", None)
    assert note is not None and "cosine of the gradients is 0." in note and note.endswith("training in fp32")
    assert found.reason == note.removesuffix("; training in fp32")
    assert checked(Offset(1.0))[0] is BF16


@pytest.mark.parametrize(("factor", "holds"), [(1.03, True), (1.08, False)])
def test_a_loss_that_is_off_is_enough(factor: float, holds: bool) -> None:
    """Gradients of another length have the same direction."""
    torch.manual_seed(0)

    def off(outputs: Batch, batch: Batch) -> torch.Tensor:
        logits = outputs["logits"]
        return F.cross_entropy(logits.float(), batch["label"]) * (factor if logits.dtype == torch.bfloat16 else 1)

    found, note = checked(mlp(), loss=off)
    assert (found is BF16) == holds
    assert note is not None and "the loss is off by" in note and ("training in fp32" in note) != holds


def test_numbers_beyond_fp16() -> None:
    torch.manual_seed(0)
    found, note = checked(Scaled(1e6), FP16)
    assert found.name == "fp32"
    assert note is not None and "its loss or gradients are not finite" in note
    assert checked(Scaled(1e6), BF16)[0] is BF16


def test_gradients_too_small_for_fp16_unless_scaled() -> None:
    """A loss of a millionth per sample has gradients below fp16's smallest number; the scaler lifts them."""
    torch.manual_seed(0)
    found, _ = checked(mlp(), FP16, loss=lambda outputs, batch: 1 + 1e-6 * cross_entropy(outputs, batch))
    assert found is FP16


def test_a_loss_that_is_not_finite_anyway_is_no_reason() -> None:
    found, _ = checked(mlp(), loss=lambda outputs, batch: outputs["logits"].sum() * float("nan"))
    assert found is BF16


def test_fp32_is_not_compared_with_itself() -> None:
    fp32 = Precision("fp32", "asked")
    never = iter(lambda: pytest.fail("no batch is needed"), None)
    assert checked(mlp(), fp32, batches=never) == (fp32, None)


def test_only_two_batches_are_taken() -> None:
    supply = iter(batches(num=5))
    checked(mlp(), batches=supply)
    assert len(list(supply)) == 3


class Luck(nn.Module):
    """Draws from every generator there is."""

    def forward(self, x):
        return F.dropout(x, 0.5) * random.random() + float(np.random.rand())


@pytest.mark.parametrize("recompute", [False, True])
def test_nothing_is_changed(recompute) -> None:
    torch.manual_seed(0)
    model = rescnn()
    if recompute:
        recompute_blocks(model)
    model = nn.Sequential(model, Luck()).train()
    for each in model.parameters():
        each.grad = torch.randn_like(each)

    def everything() -> dict[str, object]:
        state = {name: tensor.clone() for name, tensor in model.state_dict(keep_vars=True).items()}
        grads = {f"{name}.grad": each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
        return state | grads | {"torch": torch.get_rng_state(), "where": torch.tensor([id(b) for b in model.buffers()])}

    before, drawn = everything(), (random.getstate(), np.random.get_state()[1].tolist())
    assert checked(model, size=16)[0] is BF16
    after = everything()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert drawn == (random.getstate(), np.random.get_state()[1].tolist())
    assert model.training


def test_without_room_nothing_is_decided(monkeypatch) -> None:
    def no_room(*args, **given):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(selfcheck, "trial", no_room)
    found, note = checked(mlp())
    assert found is BF16
    assert note is not None and "was not compared" in note


RANK = """
import sys, torch
import torch.distributed as dist
from bmctl.engine.parallel import Group
from tests.engine.computing.test_selfcheck import Offset, checked

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
group = Group(rank=rank, local_rank=rank, world=2, device=torch.device("cpu"), threads=1)
torch.manual_seed(0)
found, note = checked(Offset([1.0, 1e4][rank]), group=group)
print(found.name, note, flush=True)
dist.destroy_process_group()
"""


def test_all_ranks_agree(tmp_path) -> None:
    """Rank 1 alone has a model that does not hold."""
    root = Path(__file__).parents[3]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path / "meeting")],
            cwd=root,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=200)[0].strip() for rank in ranks]
    assert said[0] == said[1]
    assert said[0].startswith("fp32 bf16 does not hold here")
