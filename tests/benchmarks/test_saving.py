"""What checkpoints cost a run that saves them while it goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.benchmarks.rounds import ROUNDS, contenders, interleave, ratio, shown, table

EVERY = 50
ROUNDS_HERE = max(3, ROUNDS // 4)
"""A turn is a whole period of saving."""
COST = 0.02


@pytest.mark.bench
@pytest.mark.timeout(1500)
def test_a_checkpoint_every_fifty_steps_costs_little(tmp_path: Path) -> None:
    """Turns of 50 steps that begin between two checkpoints: copying, writing and publishing one falls into each.

    In processor time of all threads: steps keep every core busy, so that is what saving takes from them. Waiting for
    the disk holds up nobody, and the wall's clock wanders by more than what is to be seen.
    """
    quiet = {"name": "bmctl", "workload": "transformer"}
    made = {"saving": {**quiet, "train.checkpoint_every_steps": EVERY}, "not saving": quiet}
    with contenders(made, folder=tmp_path) as them:
        seconds = interleave(them, steps=EVERY, warm_up=EVERY // 2, rounds=ROUNDS_HERE, clock="cpu_seconds")
    saved = sorted(path.name for path in (tmp_path / "saving-run" / "checkpoints" / "train").glob("step-*"))
    over, (low, high) = ratio(seconds["saving"], seconds["not saving"])
    print(f"\ntransformer, a checkpoint every {EVERY} steps, {ROUNDS_HERE} rounds; kept at the end: {', '.join(saved)}")
    rows = [(label, f"{1000 * float(took.mean()):.1f} ms of processor time a step") for label, took in seconds.items()]
    cost = shown(100 * (over - 1), (100 * (low - 1), 100 * (high - 1)), unit=" %", digits=2)
    print(table([*rows, ("cost", f"{cost} of the run (at most {COST:.0%})")]))
    assert saved, "nothing was saved"
    assert not list((tmp_path / "not saving-run" / "checkpoints" / "train").glob("step-*"))
    assert over - 1 <= COST
