"""What is said about memory before a process is started, and what is chosen by it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.engine.runs import RECIPE
from torch import nn

from bmctl.engine.sharding.outline import on_meta, outline_of
from bmctl.engine.sharding.strategy import Outline, amount, choose, loads, state_bytes
from bmctl.fit import SGD, Adafactor, Adam, AdamW, Ema, Fit, Muon, RMSprop
from bmctl.recipe import LaunchConfig
from bmctl.schema import BATCH, TensorSpec

MIB = 2**20
FOUR = [TensorSpec(name="x", dtype="float32", shape=(BATCH, 4))]
MODEL = Outline(num_params=10 * MIB, num_trained=8 * MIB, num_gathered=MIB, activation_bytes=MIB)


def test_loads_are_counted_by_hand() -> None:
    found = loads(MODEL, fit=Fit(accumulate=2), world=4, batch_size=64)
    ddp, fsdp = found["ddp"], found["fsdp"]
    assert (ddp.weights, ddp.gradients, ddp.optimizer, ddp.gathered) == (40 * MIB, 32 * MIB, 64 * MIB, 0)
    assert (fsdp.weights, fsdp.gradients, fsdp.optimizer, fsdp.gathered) == (10 * MIB, 8 * MIB, 16 * MIB, 8 * MIB)
    assert ddp.activations == fsdp.activations == 8 * MIB
    assert ddp.total == 144 * MIB
    assert str(ddp).endswith("+ 8.0 MiB activations = 144.0 MiB in each process")


@pytest.mark.parametrize(
    ("given", "name", "size"),
    [
        ({"ema": Ema()}, "weights", 80 * MIB),
        ({"precision": "bf16"}, "activations", 4 * MIB),
        ({"activation_checkpointing": True}, "activations", 0),
    ],
)
def test_what_else_takes_or_saves_memory(given, name, size) -> None:
    assert getattr(loads(MODEL, fit=Fit(**given), world=2, batch_size=16)["ddp"], name) == size


@pytest.mark.parametrize(
    "config",
    [SGD(name="sgd"), SGD(name="sgd", momentum=0.0), Adam(name="adam"), AdamW(), RMSprop(name="rmsprop"),
     RMSprop(name="rmsprop", momentum=0.9), Adafactor(name="adafactor"), Muon(name="muon")],
)  # fmt: skip
def test_state_bytes_are_what_torch_keeps(config) -> None:
    from bmctl.engine.training.optim import build_optimizer

    model = nn.Sequential(nn.Linear(64, 512, bias=False), nn.Linear(512, 4, bias=False))
    optimizers = build_optimizer(model, config)
    model(torch.randn(2, 64)).sum().backward()
    optimizers.step()
    kept = [tensor for key, tensor in optimizers.tensors(model).items() if key.endswith("/0.weight")]
    assert sum(tensor.numel() * 4 for tensor in kept) / (64 * 512) == pytest.approx(state_bytes(config), abs=0.1)


def test_the_choice_goes_by_memory() -> None:
    launch = LaunchConfig(nproc=2)
    given = {"fit": Fit(), "launch": launch, "world": 2, "batch_size": 2}
    assert choose(MODEL, **given, memory_bytes=1000 * MIB)[0] == "ddp"
    strategy, reason = choose(MODEL, **given, memory_bytes=150 * MIB)
    assert strategy == "fsdp"
    assert reason == "ddp's 137.0 MiB in each process are more than 70% of 150.0 MiB; fsdp takes 77.0 MiB"
    assert "too much as well" in choose(MODEL, **given, memory_bytes=50 * MIB)[1]


@pytest.mark.parametrize(
    ("launch", "world", "strategy", "reason"),
    [
        ({"strategy": "fsdp"}, 1, "single", "there is one process"),
        ({"strategy": "ddp"}, 2, "ddp", "launch.strategy is ddp"),
        ({"strategy": "fsdp"}, 2, "fsdp", "launch.strategy is fsdp"),
        ({"cpu_offload": True}, 2, "fsdp", "launch.cpu_offload is for fsdp"),
    ],
)
@pytest.mark.parametrize("memory_bytes", [1, 2**40])
def test_the_choice_of_the_recipe(launch: dict, world: int, strategy: str, reason: str, memory_bytes: int) -> None:
    given = {"fit": Fit(), "batch_size": 2, "memory_bytes": memory_bytes}
    assert choose(MODEL, launch=LaunchConfig(**launch), world=world, **given) == (strategy, reason)


def test_amounts() -> None:
    assert [amount(size) for size in (3, 1024, 3 * MIB // 2, 2**45)] == ["3 B", "1.0 KiB", "1.5 MiB", "32.0 TiB"]


# -- outlines -----------------------------------------------------------------------------------------


class Partly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(4, 8), nn.Linear(2, 2)
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.norm(self.used(x)))


def test_an_outline_is_traced_without_memory() -> None:
    model = Partly()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = outline_of(model, given=FOUR, gives=["y"])
    assert found.num_params == found.num_trained == found.num_gathered == 4 * 8 + 8 + 6 + 16
    assert found.unused == ("unused.weight", "unused.bias")
    # The input, what the norm takes, and what tanh gives; the norm's mean and deviation are of the whole batch.
    assert found.activation_bytes == 4 * (4 + 8 + 8) + 4 * 16 // 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_model_that_asks_for_numbers_is_not_traced() -> None:
    class Asking(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) if float(x.sum()) > 0 else x

    found = outline_of(Asking(4, 4), given=FOUR, gives=["y"])
    assert (found.activation_bytes, found.unused) == (None, None)
    assert found.untraced.startswith("DataDependentOutputException: ")
    given = {"fit": Fit(), "launch": LaunchConfig(), "world": 2, "batch_size": 8, "memory_bytes": 2**30}
    assert "without activations: the model cannot be traced" in choose(found, **given)[1]
    assert "traced" not in choose(outline_of(nn.Linear(4, 4), given=FOUR, gives=["y"]), **given)[1]


class Tokens(nn.Module):
    """Sees nothing but ids and a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head, self.unused = nn.Embedding(20, 8), nn.Linear(8, 3), nn.Linear(2, 2)

    def forward(self, ids_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
        return self.head((self.table(ids_BT) * mask_BT[..., None]).mean(1))


TOKENS = [
    TensorSpec(name="ids", dtype="int64", shape=(BATCH, "tokens")),
    TensorSpec(name="mask", dtype="bool", shape=(BATCH, "tokens")),
]


def test_ids_and_masks_are_traced_at_the_size_of_a_batch() -> None:
    found = [outline_of(Tokens(), given=TOKENS, gives=["y"], sizes={"tokens": size}) for size in (16, 32)]
    assert [each.unused for each in found] == [("unused.weight", "unused.bias")] * 2
    # Of a token its id and its mask are kept, for the gradients of the table and of what is masked.
    assert found[1].activation_bytes - found[0].activation_bytes == 16 * (8 + 1)
    assert found[0].untraced == ""


def test_encoders_of_transformers_are_traced() -> None:
    """They ask a plain meta tensor whether anything is masked, and it cannot tell."""
    from transformers import BertConfig, BertForSequenceClassification

    small = BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, num_labels=3
    )
    given = [TOKENS[0], TOKENS[1].model_copy(update={"dtype": "int64"})]
    found = outline_of(BertForSequenceClassification(small), given=given, gives=["logits"], sizes={"tokens": 16})
    assert (found.unused, found.untraced) == ((), "")
    assert found.activation_bytes is not None and found.activation_bytes > 16 * 8 * 4


def test_a_copy_on_meta_keeps_ties_and_freezes() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    model[0].bias.requires_grad_(False)
    copy = on_meta(model)
    assert copy[0].weight is copy[1].weight and copy[0].weight.is_meta
    assert not copy[0].bias.requires_grad and copy[1].bias.requires_grad


# -- the commands -------------------------------------------------------------------------------------


def dry_run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "small.yaml").write_text(RECIPE)
    command = [sys.executable, "-m", "bmctl", "distribute", "-r", "small.yaml", "--dry-run", "--json"]
    command += [word for override in arguments for word in ("--set", override)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


def test_a_dry_run_shows_the_arithmetic(tmp_path: Path) -> None:
    done = dry_run(tmp_path, "launch.nproc=2")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["parameters"].startswith("535,818 in fp32 = 2.0 MiB; adamw keeps 8 bytes for each")
    assert said["ddp"].startswith("2.0 MiB weights + 2.0 MiB gradients + 4.1 MiB optimizer + ")
    assert said["fsdp"].startswith("1.0 MiB weights + 1.0 MiB gradients + 2.0 MiB optimizer + ")
    assert "this machine's, shared by 2), 70% of it usable" in said["memory"]
    assert said["strategy"].startswith("ddp in 2 processes: ")
    assert list(tmp_path.iterdir()) == [tmp_path / "small.yaml"]


@pytest.mark.slow
def test_a_dry_run_without_the_data(tmp_path: Path) -> None:
    done = dry_run(tmp_path, "launch.nproc=2", "data.source={kind: folder, root: gone}", "train.batch_size=auto")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert "1000 classes and samples of " in said["parameters"] and "gone" in said["parameters"]
    assert "activations are those of one sample" in said["parameters"]
    assert "strategy" in said


@pytest.mark.slow
def test_one_process_needs_no_arithmetic(tmp_path: Path) -> None:
    said = json.loads(dry_run(tmp_path, "launch.nproc=1").stdout)
    assert "train" in said and "strategy" not in said
