"""One way to train one workload, in a process of its own: ``python -m tests.benchmarks.contender NAME WORKLOAD``.

Further arguments are ``key=value``: threads, batch_size, for bmctl what its recipe's `train` section says, and else
those of the function that has the name in PEERS.

x_BCHW: a batch of normalised images; y_B: their classes.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TextIO

import torch
from tests.benchmarks import handtuned
from tests.benchmarks.gate import Batches, Gate
from tests.benchmarks.workloads import BATCHES, WORKLOADS, Workload, batches_of, split_of
from torch import nn

from bmctl.engine.context import StageContext
from bmctl.engine.loading.order import Plan
from bmctl.engine.loading.split import Encoded, Split
from bmctl.engine.parallel import join
from bmctl.engine.training import fitlog, train
from bmctl.processes.signals import Stop
from bmctl.recipe import load_recipe
from bmctl.tasks import TASKS

NEVER = 10**6
SQUARE = (4096, 4096, 4096)
SHAPES = [SQUARE, (1024, 1024, 1024), (2048, 2048, 2048), (8192, 2048, 2048), (8192, 1024, 1024), (2048, 4096, 1024)]
RECIPE = """
name: benchmark
model: {name: "bmctl:mlp"}
task: {kind: classify}
data: {source: {kind: bundled}, num_workers: 0}
launch: {device: cpu}
train: {precision: bf16, select: last, schedule: {name: constant}}
"""
# Nothing but steps, unless a benchmark says otherwise.
QUIET = [f"train.{key}={NEVER}" for key in ("epochs", "eval_every_steps", "checkpoint_every_steps")]


# -- peers ------------------------------------------------------------------------------------------


def tutorial(workload: Workload, gate: Gate) -> None:
    """What a first example shows: fp32, the default layout, the optimizer's defaults."""
    model = workload.model()
    config = workload.optimizer
    if config.name == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=config.lr, momentum=config.momentum)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr)
    loss_fn = nn.CrossEntropyLoss()
    for x_BCHW, y_B in Batches(gate, batches_of(workload, channels_last=False)):
        optimizer.zero_grad()
        loss = loss_fn(model(x_BCHW), y_B)
        loss.backward()
        optimizer.step()


def hand_tuned(workload: Workload, gate: Gate, *, mode: str = "eager") -> None:
    handtuned.keep_freed_memory()
    model = workload.model().to(memory_format=torch.channels_last)
    batches = batches_of(workload, channels_last=True)
    handtuned.train(model, Batches(gate, batches), handtuned.make_optimizer(model, workload.optimizer), mode=mode)


def accelerate(workload: Workload, gate: Gate) -> None:
    from accelerate import Accelerator

    handtuned.keep_freed_memory()
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    model = workload.model().to(memory_format=torch.channels_last)
    batches = batches_of(workload, channels_last=True)
    model, optimizer = accelerator.prepare(model, handtuned.make_optimizer(model, workload.optimizer))
    for x_BCHW, y_B in Batches(gate, batches):
        loss = nn.functional.cross_entropy(model(x_BCHW), y_B)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()


def lightning(workload: Workload, gate: Gate) -> None:
    import lightning

    handtuned.keep_freed_memory()

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = workload.model()

        def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], index: int) -> torch.Tensor:
            x_BCHW, y_B = batch
            return nn.functional.cross_entropy(self.model(x_BCHW), y_B)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return handtuned.make_optimizer(self.model, workload.optimizer)

    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        precision="bf16-mixed",
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batches = batches_of(workload, channels_last=True)
    trainer.fit(Module().to(memory_format=torch.channels_last), train_dataloaders=Batches(gate, batches))


def matmul(workload: Workload, gate: Gate, *, shape: str) -> None:
    """The most that this machine multiplies in bf16: 4096 cubed, or the best of a few shapes; one product is a step.

    Tells the controller how many FLOPs that is.
    """
    handtuned.keep_freed_memory()
    gate.step()  # the others may still be starting
    chosen = SQUARE if shape == "square" else max(SHAPES, key=flops_per_s)
    a_MK, b_KN, out_MN = operands(chosen)
    gate.about = json.dumps({"shape": chosen, "flops": flops_of(chosen)})
    while True:
        gate.step()
        torch.mm(a_MK, b_KN, out=out_MN)


def operands(shape: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    m, k, n = shape
    return (
        torch.randn(m, k).bfloat16(),
        torch.randn(k, n).bfloat16(),
        torch.empty(m, n, dtype=torch.bfloat16),
    )


def flops_of(shape: tuple[int, int, int]) -> int:
    return 2 * shape[0] * shape[1] * shape[2]


def flops_per_s(shape: tuple[int, int, int]) -> float:
    """The best of a few tries."""
    a_MK, b_KN, out_MN = operands(shape)
    took = []
    for _ in range(5):
        began = time.perf_counter()
        torch.mm(a_MK, b_KN, out=out_MN)
        took.append(time.perf_counter() - began)
    return flops_of(shape) / min(took)


# -- bmctl ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gated(Split):
    """A split whose batches go through the gate."""

    gate: Gate | None = None

    def encoded(self, plan: Plan, *, first: int = 0, every: int = 1) -> Iterator[Encoded]:
        assert self.gate is not None
        for batch in super().encoded(plan, first=first, every=every):
            self.gate.step()
            yield batch


def bmctl(workload: Workload, gate: Gate, *, run: Path, speaks: str, overrides: Sequence[str]) -> None:
    """The engine that every command trains with; only its data waits at the gate.

    Args:
        speaks: `always` reports at every step, as it does where a step takes half a second.
    """
    if speaks == "always":
        fitlog.PERIOD_S = 0.0
    source = run.with_suffix(f".{os.getpid()}.yaml")
    source.write_text(RECIPE)
    recipe = load_recipe(source, overrides=[*QUIET, f"train.batch_size={workload.batch_size}", *overrides])
    fit = recipe.train
    assert fit is not None and recipe.task is not None
    group = join(recipe.launch)
    run.mkdir(exist_ok=True)
    split = split_of(workload, num_samples=BATCHES * workload.batch_size)
    with (run / "metrics.jsonl").open("a") as file:
        train.fit(
            workload.model(),
            fit=fit.model_copy(update={"optimizer": workload.optimizer}),
            train=Gated(**{field.name: getattr(split, field.name) for field in fields(split)}, gate=gate),
            val=split,
            task=TASKS["classify"],
            task_config=recipe.task,
            context=StageContext(
                run=run, recipe=recipe, group=group, stop=Stop(), emit=lambda event: _append(file, event)
            ),
            stage="train",
            seed=0,
        )


def _append(file: TextIO, event: Mapping[str, object]) -> None:
    file.write(json.dumps(event) + "\n")
    file.flush()


PEERS: Mapping[str, Callable[..., None]] = {
    "tutorial": tutorial,
    "hand-tuned": hand_tuned,
    "accelerate": accelerate,
    "lightning": lightning,
    "matmul": matmul,
}


def main(argv: Sequence[str]) -> None:
    """Train until the controller hangs up."""
    name, workload_name, *rest = argv
    given = dict(word.split("=", 1) for word in rest)
    gate = Gate()
    workload = WORKLOADS[workload_name]
    if "batch_size" in given:
        workload = replace(workload, batch_size=int(given.pop("batch_size")))
    if name == "bmctl":
        run, speaks = Path(given.pop("run")), given.pop("speaks", "twice a second")
        threads = given.pop("threads")
        overrides = [f"launch.threads={threads}", *(f"{key}={value}" for key, value in given.items())]
        bmctl(workload, gate, run=run, speaks=speaks, overrides=overrides)
        return
    torch.set_num_threads(int(given.pop("threads")))
    PEERS[name](workload, gate, **given)


if __name__ == "__main__":
    main(sys.argv[1:])
