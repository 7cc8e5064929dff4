"""What a second process brings: samples per second under DDP, and room under FSDP2."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tests.benchmarks.rounds import ROOT, ROUNDS, contenders, environments, interleave, needs_bf16, ratio, shown, table
from tests.benchmarks.workloads import WORKLOADS

EFFICIENCY = 0.90
"""What bmctl leaves of the machine's own: exchanging gradients costs a tenth of a step at most.

The machine's own efficiency is nobody's merit or fault: two virtual cores may be one real one.
"""
FSDP_SHARE = 0.55
"""A half each, and what lies in no block, or does not divide, on top."""


@pytest.mark.bench
@needs_bf16
@pytest.mark.timeout(1500)
def test_two_processes_do_nearly_twice_the_work_of_one(tmp_path: Path) -> None:
    """One thread each and the same batch per process; efficiency is the time of a step alone over that in the pair.

    Two processes that exchange nothing show what the machine itself gives to a second one: virtual cores may share a
    matrix unit, and a cache.
    """
    each = WORKLOADS["transformer"].batch_size
    common = {"name": "bmctl", "workload": "transformer", "threads": 1}
    made = {
        "1 process": {**common, "batch_size": each},
        "2 that exchange nothing": {**common, "batch_size": each, "world": 2, "apart": True},
        "2 under DDP": {**common, "batch_size": each * 2, "world": 2},
    }
    with contenders(made, folder=tmp_path) as them:
        seconds = interleave(them, steps=1, warm_up=4)
    machine = ratio(seconds["1 process"], seconds["2 that exchange nothing"])
    efficiency = ratio(seconds["1 process"], seconds["2 under DDP"])
    kept = ratio(seconds["2 that exchange nothing"], seconds["2 under DDP"])
    print(f"\ntransformer, DDP over gloo, batch {each} per process of one thread, {ROUNDS} rounds")
    rates = {label: each * (1 + (label != "1 process")) / took for label, took in seconds.items()}
    rows = [(label, f"{float(np.median(rate)):.2f} images/s in all") for label, rate in rates.items()]
    rows += [
        ("efficiency of the machine", shown(*machine)),
        ("efficiency under DDP", shown(*efficiency)),
        ("what DDP leaves of the machine's", f"{shown(*kept)} (at least {EFFICIENCY})"),
    ]
    print(table(rows))
    assert kept[0] >= EFFICIENCY


@pytest.mark.bench
@needs_bf16
def test_fsdp_holds_little_more_than_half() -> None:
    held = {strategy: held_bytes(strategy) for strategy in ("ddp", "fsdp")}
    share = {strategy: max(sum(rank.values()) for rank in ranks) for strategy, ranks in held.items()}
    print("\ntransformer, AdamW, 2 processes: bytes of the rank that holds the most")
    rows = [
        (strategy, " + ".join(f"{ranks[0][kind] / 1e6:.1f} MB {kind}" for kind in ranks[0]))
        for strategy, ranks in held.items()
    ]
    print(table([*rows, ("fsdp / ddp", f"{share['fsdp'] / share['ddp']:.3f} (at most {FSDP_SHARE})")]))
    assert share["fsdp"] / share["ddp"] <= FSDP_SHARE


def held_bytes(strategy: str, *, world: int = 2) -> list[dict[str, int]]:
    """Of each rank."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.benchmarks.held_bytes", strategy],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        for environment in environments(world)
    ]
    try:
        return [json.loads(process.communicate(timeout=200)[0].splitlines()[-1]) for process in processes]
    finally:
        for process in processes:
            process.kill()
