"""What checkpoints cost a run that saves them while it goes on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.benchmarks.rounds import ROUNDS, contenders, difference, interleave, needs_bf16, shown, table

EVERY = 50
COST = 0.02
"""Of the time of EVERY steps: with two per cent nobody has a reason to save more seldom."""
TURN = 20


@pytest.mark.bench
@needs_bf16
@pytest.mark.timeout(1500)
def test_a_checkpoint_every_fifty_steps_costs_little(tmp_path: Path) -> None:
    """What one checkpoint takes, over what fifty steps take, both in processor time of all threads.

    Steps keep every core busy, so that is what saving takes from them; waiting for the disk holds up nobody. Fifty
    steps wander by more than a checkpoint takes, so it is measured on batches of one: the same model, the same
    optimizer, and turns of steps that one checkpoint falls into. What is still being written when a turn ends is
    written at the closed gate, and counted with the next turn. One thread each: several wait for each other by
    spinning, and on a busy machine that takes more processor time than all else.
    """
    full = {"name": "bmctl", "workload": "transformer", "threads": 1}
    small = {**full, "batch_size": 1}
    made = {"saving": {**small, "train.checkpoint_every_steps": TURN}, "not saving": small, "full batches": full}
    with contenders(made, folder=tmp_path) as them:
        turns = dict.fromkeys(made, TURN) | {"full batches": 2}
        seconds = interleave(them, steps=turns, warm_up=TURN - 2, clock="cpu_seconds_in_all")
    saved = sorted(path.name for path in (tmp_path / "saving-run" / "checkpoints" / "train").glob("step-*"))
    one, (low, high) = (TURN * np.array(each) for each in difference(seconds["saving"], seconds["not saving"]))
    fifty = EVERY * float(np.median(seconds["full batches"]))
    print(f"\ntransformer, a checkpoint every {EVERY} steps, {ROUNDS} rounds; kept at the end: {', '.join(saved)}")
    cost = shown(100 * one / fifty, (100 * low / fifty, 100 * high / fifty), unit=" %", digits=2)
    rows = [
        ("a checkpoint", shown(float(one), (float(low), float(high)), unit=" s of processor time")),
        (f"{EVERY} steps", f"{fifty:.1f} s"),
        ("cost", f"{cost} of the run (at most {COST:.0%})"),
    ]
    print(table(rows))
    assert saved, "nothing was saved"
    assert not list((tmp_path / "not saving-run" / "checkpoints" / "train").glob("step-*"))
    assert low > 0, "a checkpoint that costs nothing was not measured"
    assert high / fifty <= COST
