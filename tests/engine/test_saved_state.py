"""Everything that a checkpoint holds is needed: without any one item, a run that goes on is another run."""

from __future__ import annotations

import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.engine.runs import Seen, fit, make_context, make_recipe
from torch import nn

from bmctl.engine.checkpoints import checkpoint
from bmctl.engine.checkpoints.checkpoint import Checkpoint, open_checkpoint
from bmctl.engine.checkpoints.state import KINDS, State
from bmctl.engine.computing.precision import Precision, choose_precision
from bmctl.engine.training import checkpointing
from bmctl.errors import PackageError, PreemptedError
from bmctl.processes.signals import Stop
from bmctl.tasks import TASKS

OVERRIDES = (
    "seed=3",
    "train.epochs=4",
    "train.eval_every_steps=4",
    "train.checkpoint_every_steps=4",
    "train.async_checkpoints=false",
    "train.precision=auto",
    "train.skip_non_finite=3",
    "train.ema={decay: 0.9}",
    "train.early_stop={patience: 4}",
    "train.max_time_s=100000",
    "train.optimizer={name: adamw, lr: 0.003}",
)
# A signal in the middle of everything; a crash after a checkpoint that follows an evaluation.
SIGNAL_AT, CRASH_AT, NOT_FINITE = 15, 13, {15, 16}
NOT_NEEDED = {
    "step": "the manifest has it too, and a checkpoint in which they differ is refused",
}


class Noisy(nn.Module):
    """Draws from every generator in every step."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.drop = nn.Linear(784, 10), nn.BatchNorm1d(10), nn.Dropout(0.2)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        outputs = self.norm(self.layer(self.drop(x_BCHW.flatten(1))))
        if self.training:
            outputs = outputs + 0.01 * random.random() + 0.1 * torch.from_numpy(np.random.rand(10).astype(np.float32))
        return outputs


class Scripted:
    """The task, with a metric that gets worse as the model gets better, and some losses that are not finite."""

    def __init__(self, task: Any) -> None:
        self._task, self.step = task, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def loss(self, outputs: Any, batch: Any, **known: Any) -> Any:
        loss = self._task.loss(outputs, batch, **known)
        return loss * float("nan") if self.step + 1 in NOT_FINITE else loss

    def evaluate(self, parts: Any, batches: Any, **known: Any) -> Any:
        found = self._task.evaluate(parts, batches, **known)
        return replace(found, values={**found.values, "accuracy": found.values["loss"]})


def trace(run: Path, *, resume: bool = False, signal_at: int = 0, crash_at: int = 0) -> dict[str, Any]:
    """Everything that can be seen of a training from outside."""
    recipe = make_recipe(run.parent, *OVERRIDES)
    torch.manual_seed(0)
    seen, stop, task = Seen(), Stop(), Scripted(TASKS["classify"])

    def beat(step: int, doing: str) -> None:
        task.step = step
        if step + 1 == signal_at:
            stop.request(15)
        if step == crash_at:
            raise SystemError("a crash")

    context = replace(make_context(run, recipe, seen=seen, resume=resume, stop=stop), beat=beat)
    if resume:
        task.step = open_checkpoint(run / "checkpoints" / "train" / "latest").state.step
    result = fit(context, Noisy(), task=task)
    last = open_checkpoint(run / "checkpoints" / "train" / "latest").state
    told = [(event["step"], event["loss"], event["metric"], event["val_metric"]) for event in seen.of("evaluation")]
    return {
        "weights": {name: tensor.tolist() for name, tensor in result.model.state_dict().items()},
        "kept": (result.steps, result.best_step),
        "state": last.model_dump(exclude={"elapsed_s"}),
        "elapsed_s": pytest.approx(last.elapsed_s, rel=0.1),
        "told": [one for one in told if one[0] > SIGNAL_AT],
        "left_out": [line for line in seen.notes.splitlines() if "left out" in line and "step 15" not in line],
    }


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> None:
    settle_world(monkeypatch)


def settle_world(patch: pytest.MonkeyPatch) -> None:
    """A scaler that scales on the CPU too, and a clock that counts how often it is read."""
    patch.setattr(
        Precision, "scaler", lambda self, device: torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=6)
    )
    clock = iter(range(10**9))
    patch.setattr("bmctl.engine.training.loop.time.perf_counter", lambda: float(next(clock)))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What an uninterrupted run comes to, and two that were interrupted."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        settle_world(patch)
        found: dict[str, Any] = {"whole": trace(folder / "whole")}
        with pytest.raises(PreemptedError):
            trace(folder / "signal", signal_at=SIGNAL_AT)
        with pytest.raises(SystemError):
            trace(folder / "crash", crash_at=CRASH_AT)
    saved = {
        name: open_checkpoint(folder / name / "checkpoints" / "train" / "latest").state for name in ("signal", "crash")
    }
    assert {name: state.step for name, state in saved.items()} == {"signal": SIGNAL_AT, "crash": CRASH_AT - 1}
    assert saved["signal"].skipped == 1
    assert saved["crash"].validated_step == CRASH_AT - 1
    return found | {"folder": folder}


def resumed(runs: dict[str, Any], name: str, into: Path) -> dict[str, Any]:
    shutil.copytree(runs["folder"] / name, into / name, symlinks=True)
    return trace(into / name, resume=True)


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("name", ["signal", "crash"])
def test_all_of_it_is_enough(tmp_path: Path, runs: dict[str, Any], name: str) -> None:
    assert resumed(runs, name, tmp_path) == runs["whole"]


def items() -> list[str]:
    fields = [name for name in State.model_fields if name not in NOT_NEEDED and name != "random"]
    generators = [f"random.{name}" for name in ("python", "numpy", "torch")]
    sums = [f"progress.{name}" for name in checkpointing.SUMS]
    return [*fields, *generators, *sums, *(f"kind.{kind}" for kind in KINDS if kind != "task")]


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("item", items())
def test_nothing_may_be_left_out(tmp_path: Path, runs: dict[str, Any], monkeypatch, item: str) -> None:
    if item == "precision" and choose_precision("auto", torch.device("cpu")).name != "bf16":
        pytest.skip("without bf16 every run is in fp32")
    real = checkpoint.open_checkpoint
    monkeypatch.setattr(checkpoint, "open_checkpoint", lambda path, **given: leave_out(item, real(path, **given)))
    found = []
    for name in ("signal", "crash"):
        try:
            found.append(resumed(runs, name, tmp_path))
        except PackageError as error:
            assert "checkpoint" in error.message  # that it cannot go on is as good as going on differently
            return
    assert any(one != runs["whole"] for one in found), f"{item} is saved, and nobody would miss it"


def leave_out(item: str, found: Checkpoint) -> Checkpoint:
    """The checkpoint as if `item` had never been saved."""
    name, _, part = item.partition(".")
    state = found.state
    if name == "kind":
        tensors = {kind: {} if kind == part else entries for kind, entries in found.index.tensors.items()}
        return replace(found, index=found.index.model_copy(update={"tensors": tensors}))
    if part and name == "random":
        fresh = checkpointing.effects.random_state(torch.device("cpu"))
        rest = tuple({**one, part: fresh[part]} for one in state.random)
    elif part:
        rest = tuple({**one, part: 0.0} for one in state.progress)
    else:
        rest = State.model_fields[name].get_default(call_default_factory=True)
    return replace(found, state=state.model_copy(update={name: rest}))
