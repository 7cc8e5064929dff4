"""`launch.strategy: fsdp` through the whole loop: what one process and ddp do, with a part of the model in each."""

from __future__ import annotations

import ctypes
import json
import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.engine.ranks import on_ranks
from tests.engine.runs import Seen, distance, fit, make_context, make_recipe, run_to_end, same, weights
from tests.engine.training.test_train import StopAt
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from bmctl.cli import main
from bmctl.core import masks, memory
from bmctl.engine.computing.precision import Precision
from bmctl.engine.parallel import Group
from bmctl.engine.sharding.plan import Plan
from bmctl.engine.training import setup, train
from bmctl.errors import PreemptedError
from bmctl.job import Logs
from bmctl.methods import MethodContext, magnitude
from bmctl.recipe import load_recipe, recipe_yaml

SUMS = 1e-5
"""Largest difference to one process: of a loss, relative to it, and of any weight. Sums have another order."""
SETTINGS = (
    "train.epochs=2", "train.ema={decay: 0.9}", "train.accumulate=2", "train.clip_norm=1.0", "data.val.limit=101",
    "data.input.augment.shift=2", "train.checkpoint_every_steps=3",
)  # fmt: skip


def vit() -> nn.Module:
    """Two blocks, and parameters that lie in none."""
    torch.manual_seed(0)
    return VisionTransformer(28, patch_size=7, in_chans=1, embed_dim=24, depth=2, num_heads=2, num_classes=10)


def trained(
    run: Path,
    *overrides: str,
    world: int = 2,
    strategy: str = "fsdp",
    build: Callable[[], nn.Module] = vit,
    **given: Any,
) -> dict[str, Any]:
    """Train in `world` processes: what rank 0 said, and its weights; None where a signal stopped it."""
    run.mkdir(exist_ok=True)
    recipe = make_recipe(run, *SETTINGS, f"launch.strategy={strategy}", *overrides)
    stop_at = given.pop("stop_at", None)

    def work(group: Group) -> dict[str, Any]:
        seen, result = Seen(), None
        stop = {} if stop_at is None else {"stop": StopAt(stop_at)}
        context = replace(make_context(run, recipe, seen=seen, **given, **stop), group=group)
        try:
            result = fit(context, build())
        except PreemptedError:
            return {"notes": seen.notes}
        if group.leads:
            assert type(result.model) is type(build())
            save_file({name: each.contiguous() for name, each in result.model.state_dict().items()}, run / "weights")
        score = result.val.values if result.val else {}
        return {"notes": seen.notes, "evaluations": seen.of("evaluation"), "score": score, "best": result.best_step}

    told = on_ranks(world, work, timeout_s=120)
    assert [each.code for each in told] == [0] * world, told
    assert "error" not in told[0].value, told[0].value
    return told[0].value


def kept(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "weights")


def check_same(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Losses, scores and what was chosen, of every evaluation, and of what is kept."""
    assert len(found["evaluations"]) == len(wanted["evaluations"]) > 0
    for got, want in zip(found["evaluations"], wanted["evaluations"], strict=True):
        assert (got["step"], got["is_best"]) == (want["step"], want["is_best"])
        assert (got["loss"], got["val_loss"]) == pytest.approx((want["loss"], want["val_loss"]), rel=SUMS)
        assert got["val_metric"] == want["val_metric"]
    assert found["score"] == pytest.approx(wanted["score"], rel=SUMS)
    assert found["best"] == wanted["best"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The same in one process that nothing disturbs."""
    run = tmp_path_factory.mktemp("alone") / "run"
    return run, trained(run, world=1)


def test_parts_train_and_evaluate_as_the_whole_does(tmp_path: Path, alone: tuple[Path, dict[str, Any]]) -> None:
    """And stopped half-way they go on bit for bit."""
    found = trained(tmp_path / "run")
    assert "fsdp: launch.strategy is fsdp" in found["notes"]
    check_same(found, alone[1])
    assert distance(kept(tmp_path / "run"), kept(alone[0])) < SUMS
    trained(tmp_path / "half", stop_at=8)
    resumed = trained(tmp_path / "half", resume=True)
    assert "going on from step" in resumed["notes"]
    assert "not the same weights" not in resumed["notes"]
    assert same(kept(tmp_path / "half"), kept(tmp_path / "run"))
    assert resumed["score"] == found["score"]


@pytest.mark.slow
def test_ddp_does_the_same(tmp_path: Path, alone: tuple[Path, dict[str, Any]]) -> None:
    check_same(trained(tmp_path / "run", strategy="ddp"), alone[1])
    assert distance(kept(tmp_path / "run"), kept(alone[0])) < SUMS


@pytest.mark.slow
@pytest.mark.parametrize("way", ["fsdp 2, fsdp 1, fsdp 2", "ddp 2, fsdp 2, ddp 2", "fsdp 1, fsdp 3"])
def test_other_numbers_of_processes_and_other_strategies(
    tmp_path: Path, alone: tuple[Path, dict[str, Any]], way: str
) -> None:
    run, phases = tmp_path / "run", [phase.split() for phase in way.split(", ")]
    batch = ["train.batch_size=48"] if "3" in way else []
    wanted = trained(tmp_path / "wanted", *batch, world=1) and kept(tmp_path / "wanted") if batch else kept(alone[0])
    for number, (strategy, world) in enumerate(phases):
        given = {"stop_at": 5} if number < len(phases) - 1 else {}
        told = trained(run, *batch, strategy=strategy, world=int(world), resume=number > 0, **given)
        if number:
            before, now = (_crew(*phase) for phase in phases[number - 1 : number + 1])
            assert f"begun by {before} with 1 thread on cpu and torch's kernels, going on by {now} " in told["notes"]
    assert distance(kept(run), wanted) < SUMS


def _crew(strategy: str, world: str) -> str:
    return "1 process" if world == "1" else f"{world} processes ({strategy})"


@pytest.mark.slow
def test_a_gpu_that_does_not_hold_the_whole_is_agreed_upon(tmp_path: Path, monkeypatch) -> None:
    """One rank finds no room for the last evaluation: all of them evaluate in parts."""
    go = nn.Module.to

    def full(self, *given, **told):
        if torch.distributed.is_initialized() and torch.distributed.get_rank() == 1 and given == (torch.device("cpu"),):
            raise torch.OutOfMemoryError
        return go(self, *given, **told)

    whole = trained(tmp_path / "whole", "train.max_steps=4")
    made = train._made_whole

    def made_whole(training, model):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(nn.Module, "to", full)
            return made(training, model)

    monkeypatch.setattr(train, "_made_whole", made_whole)
    found = trained(tmp_path / "run", "train.max_steps=4")
    assert "no GPU holds the whole model: the last evaluation is in fp32" in found["notes"]
    assert found["score"] == pytest.approx(whole["score"], rel=SUMS)


# -- what a process holds -----------------------------------------------------------------------------


@pytest.mark.slow
def test_the_batch_size_is_found_in_parts(tmp_path: Path) -> None:
    given = ("train.accumulate=1", "train.epochs=1")
    found = trained(tmp_path / "found", *given, "train.batch_size=auto")
    assert "batch size, 16 at a time: takes" in found["notes"]
    assert "twice as many would leave an epoch of 320 samples fewer than 10 steps" in found["notes"]
    assert "batch size: 32, which is 16 at a time, times train.accumulate (1), times processes (2)" in found["notes"]
    trained(tmp_path / "given", *given, "train.batch_size=32")
    assert same(kept(tmp_path / "found"), kept(tmp_path / "given")), "trying leaves no trace"


class Reached(Exception):
    """The model is about to be cut up."""


@pytest.mark.parametrize("strategy", ["auto", "fsdp"])
def test_what_will_be_in_parts_is_never_whole_on_a_gpu(tmp_path: Path, monkeypatch, strategy: str) -> None:
    """Up to where it is cut up nothing is put on the GPU, tried or compared, whoever said that it is too large."""
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr("bmctl.engine.sharding.plan.memory_at_hand", lambda device, *, num_local: 2**16)
    monkeypatch.setattr(setup, "_precision", lambda training, found: Precision("fp32", "", tf32=False))

    def reached(model: nn.Module, plan: Plan, **given: Any) -> None:
        assert {each.device.type for each in (*model.parameters(), *model.buffers())} == {"cpu"}
        raise Reached(plan.reason)

    monkeypatch.setattr(setup, "share", reached)
    recipe = make_recipe(tmp_path, *SETTINGS, f"launch.strategy={strategy}", "train.batch_size=auto")

    def work(group: Group) -> str:
        context = replace(make_context(tmp_path / "run", recipe), group=replace(group, device=gpu))
        with pytest.raises(Reached) as caught:
            fit(context, vit())
        return str(caught.value)

    for told in on_ranks(2, work):
        assert told.value == ("launch.strategy is fsdp" if strategy == "fsdp" else told.value)
        assert strategy == "fsdp" or "in each process are more than 70% of 64.0 KiB" in told.value


def wide() -> nn.Module:
    """Six blocks of 12 MiB, and one of what lies in none."""
    torch.manual_seed(0)
    return VisionTransformer(28, patch_size=14, in_chans=1, embed_dim=512, depth=6, num_heads=8, num_classes=10)


@pytest.mark.slow
def test_a_process_never_holds_what_the_whole_would_take(tmp_path: Path) -> None:
    """At its peak, of batch sizes tried, steps, a checkpoint and the last evaluation together."""
    settings = ("train.max_steps=2", "train.batch_size=auto", "train.select=last")

    def peak(strategy: str) -> float:
        recipe = make_recipe(tmp_path, "data.val.limit=50", *settings, f"launch.strategy={strategy}")

        def work(group: Group) -> int:
            # What is freed goes back at once: what glibc keeps of it is no part of the model.
            ctypes.CDLL(None).mallopt(-3, 2**20)  # M_MMAP_THRESHOLD
            context = replace(make_context(tmp_path / strategy, recipe), group=group)
            base = memory.resident_bytes()
            memory.reset_peak()
            fit(context, wide())
            return memory.peak_bytes() - base

        return max(told.value for told in on_ranks(2, work, timeout_s=200)) / 2**20

    whole, part = peak("ddp"), peak("fsdp")
    print(f"peak of a process: ddp {whole:.0f} MiB, fsdp {part:.0f} MiB")
    assert part < 0.8 * whole


# -- pruned weights ---------------------------------------------------------------------------------


def pruned() -> nn.Module:
    model = vit().eval()
    look = MethodContext(example={}, calibration=lambda: iter(()), calibration_record={})
    magnitude.apply(model, magnitude.Config(sparsity=0.5), look)
    return model


@pytest.mark.parametrize(
    "optimizer",
    [
        "{name: sgd, lr: 0.05, momentum: 0.9, nesterov: true, weight_decay: 0.05}",
        pytest.param("{name: adamw, weight_decay: 0.5}", marks=pytest.mark.slow),
        pytest.param("{name: adafactor}", marks=pytest.mark.slow),
    ],
)
def test_pruned_weights_stay_zero_in_parts(tmp_path: Path, optimizer: str) -> None:
    given = ("train.epochs=1", f"train.optimizer={optimizer}")
    trained(tmp_path / "alone", *given, world=1, build=pruned)
    trained(tmp_path / "run", *given, build=pruned, stop_at=4)
    trained(tmp_path / "run", *given, build=pruned, resume=True)
    model, found = pruned(), kept(tmp_path / "run")
    layers = masks.masked_layers(model)
    assert any(name.startswith("blocks.") for name in layers), "in a part that is gathered by itself"
    assert not all(name.startswith("blocks.") for name in layers), "and in what is gathered with the rest"
    for name, layer in layers.items():
        mask = masks.get_mask(layer)
        assert torch.equal(found[f"{name}.weight_mask"], layer.weight_mask)
        assert bool((found[f"{name}.weight"][~mask] == 0).all()), name
        assert bool((found[f"{name}.weight"][mask] != layer.weight[mask]).any()), f"{name} was not trained"
    assert distance(kept(tmp_path / "alone"), found) < 1e-4


# -- real processes under torchrun --------------------------------------------------------------------

TEXTS = """
name: news
model: {name: "bmctl:encoder", args: {width: 24, depth: 2, heads: 2}, dropout: 0.1, stochastic_depth: 0.1}
data:
  source: {kind: table, path: news.csv, text: body, label: topic}
  input: {max_tokens: 24, tokenizer: {kind: wordpiece, vocab_size: 300}}
train: {epochs: 3, batch_size: 24, precision: fp32, checkpoint_every_steps: 4, ema: {decay: 0.9}}
launch: {device: cpu, timeout_s: 60, nproc: 2, strategy: fsdp, max_restarts: 0}
"""
WORDS = {"ships": "port cargo vessel deck tide crane", "grain": "wheat crop harvest field bushel maize"}


def texts(folder: Path, *overrides: str, name: str = "run") -> Path:
    """A run on short texts of two topics, of many lengths, as `make_run` makes one."""
    chance = random.Random(0)
    topics = [chance.choice(list(WORDS)) for _ in range(240)]
    common = ["the", "a", "of", "said", "year", "new", "more", "than"]
    told = [" ".join(chance.choices(WORDS[topic].split() + common, k=chance.randint(3, 30))) for topic in topics]
    lines = [f"{number} {text},{topic}" for number, (text, topic) in enumerate(zip(told, topics, strict=True))]
    (folder / "news.csv").write_text("\n".join(["body,topic", *lines]) + "\n")
    (folder / "news.yaml").write_text(TEXTS.replace("news.csv", str(folder / "news.csv")))
    run = folder / name
    run.mkdir()
    Logs(run).folder.mkdir()
    Logs(run).recipe.write_text(recipe_yaml(load_recipe(folder / "news.yaml", overrides=overrides)))
    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts in two processes that nothing stopped."""
    run = texts(tmp_path_factory.mktemp("whole"))
    ended = run_to_end(run)
    assert ended.code == 0, ended.stderr
    assert ended.stderr == ""
    assert "fsdp: launch.strategy is fsdp" in ended.seen.notes
    assert "2 processes: dropout and stochastic depth draw differently in each process" in ended.seen.notes
    return run


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "code"), [("SIGTERM:1:7", 75), ("kill:1:7", 10)])
def test_a_stopped_group_goes_on_bit_for_bit(tmp_path: Path, whole: Path, fault: str, code: int) -> None:
    run = texts(tmp_path)
    assert run_to_end(run, fault=fault).code == code
    assert not (run / "packages").exists()
    ended = run_to_end(run, "--resume")
    assert ended.code == 0, ended.stderr
    assert same(weights(run), weights(whole))


@pytest.mark.slow
def test_a_group_that_is_started_again_goes_on_bit_for_bit(tmp_path: Path, whole: Path) -> None:
    run = texts(tmp_path, "launch.max_restarts=1")
    ended = run_to_end(run, fault="kill:1:7", BMCTL_TEST_ONCE="1")
    assert ended.code == 0, ended.stderr
    assert same(weights(run), weights(whole))


@pytest.mark.slow
def test_a_package_holds_the_whole_model(tmp_path: Path, whole: Path) -> None:
    """Names, shapes and formats of one process's, and what a checkpoint's package holds."""
    one = texts(tmp_path, "launch.nproc=1", "launch.strategy=auto")
    assert run_to_end(one).code == 0
    layout = [{name: (each.shape, each.dtype) for name, each in weights(run).items()} for run in (whole, one)]
    assert layout[0] == layout[1]
    newest = whole / "checkpoints" / "train" / "latest"
    assert json.loads((newest / "manifest.json").read_text())["strategy"] == "fsdp"
    without_data = [flag for section in ("data", "task", "train") for flag in ("--set", f"{section}=null")]
    assert main(["import", str(newest), "-o", str(tmp_path / "taken"), *without_data]) == 0
    (taken,) = (tmp_path / "taken" / "packages").iterdir()
    assert same(load_file(taken / "weights.safetensors"), weights(whole))


@pytest.mark.slow
def test_what_was_pruned_is_trained_further_in_parts(tmp_path: Path) -> None:
    recipe, run = tmp_path / "news.yaml", tmp_path / "out"
    texts(tmp_path)
    flags = ["--recipe", str(recipe), "-o", str(run), "-q"]
    one = ["--set", "launch.nproc=1", "--set", "train.epochs=1"]
    assert main(["train", *flags, *one]) == 0
    assert main(["prune", str(run), "-q", "--method", "magnitude", "--set", "sparsity=0.5"]) == 0
    start = run / "packages" / "01-magnitude"
    further = ["--set", "train.optimizer={name: sgd, lr: 0.05, momentum: 0.9, weight_decay: 0.05}"]
    assert main(["distribute", str(start), *flags, "--set", "train.epochs=1", *further]) == 0
    (end,) = (run / "packages").glob("02-train")
    before, after = (load_file(package / "weights.safetensors") for package in (start, end))
    names = [name.removesuffix("_mask") for name in before if name.endswith("weight_mask")]
    assert names
    for name in names:
        mask = masks.unpack(before[f"{name}_mask"], before[name].shape)
        assert bool((after[name][~mask] == 0).all()), name
        assert not torch.equal(after[name], before[name])
