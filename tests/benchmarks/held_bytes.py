"""What one process of a group holds: ``python -m tests.benchmarks.held_bytes STRATEGY`` in torchrun's environment."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable

import torch
from tests.benchmarks.workloads import NUM_CLASSES, WORKLOADS
from torch import nn
from torch.distributed.tensor import DTensor

from bmctl.engine.computing.precision import choose_precision
from bmctl.engine.parallel import join, leave
from bmctl.engine.sharding.plan import plan
from bmctl.engine.sharding.shared import share
from bmctl.engine.training.optim import build_optimizer
from bmctl.recipe import LaunchConfig
from bmctl.schema import BATCH, TensorSpec


def num_bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum((each.to_local() if isinstance(each, DTensor) else each).nbytes for each in tensors)


def main(strategy: str) -> None:
    """One training step, then what is there of parameters and of optimizer state, on stdout."""
    workload = WORKLOADS["transformer"]
    launch = LaunchConfig(device="cpu", threads=1, strategy=strategy)
    group = join(launch)
    precision = choose_precision("bf16", group.device)
    given = [TensorSpec(name="input", dtype="float32", shape=(BATCH, 3, workload.size, workload.size))]
    model, gives = workload.model(), ["logits"]
    decided = plan(model, group=group, launch=launch, precision=precision, given=given, gives=gives)
    shared = share(model, decided, group=group, precision=precision, takes=["input"], gives=gives)
    optimizer = build_optimizer(shared.model, workload.optimizer)
    x_BCHW, y_B = torch.randn(2, 3, workload.size, workload.size), torch.arange(2) % NUM_CLASSES
    with shared.exchange(True), precision.autocast(group.device):
        loss = nn.functional.cross_entropy(shared.forward(x_BCHW).float(), y_B)
    loss.backward()
    optimizer.step()
    held = {
        "parameters": num_bytes(shared.model.parameters()),
        "optimizer": num_bytes(optimizer.tensors(shared.model).values()),
    }
    sys.stdout.write(json.dumps(held) + "\n")
    leave(group)


if __name__ == "__main__":
    main(sys.argv[1])
