"""What a training step costs with bmctl, with a loop tuned by hand, with two frameworks, and as tutorials write it.

The same model, images, optimizer, threads and, but for the tutorial, the same precision and malloc settings. bmctl and
the hand-tuned loop choose their settings in validation rounds of their own. Times are medians over interleaved rounds;
ratios are of the same rounds, with 95 % bootstrap intervals.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.benchmarks import handtuned
from tests.benchmarks.rounds import ROUNDS, contenders, difference, fastest, interleave, needs_bf16, ratio, shown, table
from tests.benchmarks.workloads import WORKLOADS, Workload
from torch.utils.flop_counter import FlopCounterMode

from bmctl.engine.computing.tiles import has_tiles

OVER_HAND_TUNED = 1.05 if has_tiles() else 1.10
"""Upper end of the interval: one per cent for bmctl's own Python, the rest for what a loop differs from itself by.

Without AMX bmctl has no kernels of its own: both loops are torch's, the ratio is 1, and only that they are equal shows.
"""
OWN_SHARE = 0.01
"""Of a step: what nobody would give for logs, checkpoints and resuming is more than a per cent."""
MARGIN = 0.03 if has_tiles() else 0.10
"""That rounds of a loop against itself may differ by, as above: a framework counts as faster only beyond it."""
OVER_TUTORIAL = 2.0 if has_tiles() else 1.2
"""bf16 doubles the speed on AMX's tiles; elsewhere it has vectors at best, and the rest is layout and malloc."""
FRAMEWORKS = ("accelerate", "lightning")
TRIED = {
    "bmctl": {"eager": {}, "compiled": {"train.compile": "true"}},
    "hand-tuned": {mode: {"mode": mode} for mode in handtuned.MODES},
}
"""Settings of both, of which the fastest in validation rounds takes part."""
OWN_STEPS = 100


@pytest.mark.bench
@needs_bf16
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("name", ["resnet18", "transformer"])
def test_a_step_costs_no_more_than_by_hand(name: str, tmp_path: Path) -> None:
    workload = WORKLOADS[name]
    loops = ("bmctl", "hand-tuned", *FRAMEWORKS, "tutorial")
    chosen, tried = {}, {}
    for label, settings in TRIED.items():
        them = {said: {"name": label, "workload": name, **given} for said, given in settings.items()}
        (tmp_path / f"{label} tried").mkdir()
        chosen[label], tried[label] = fastest(them, folder=tmp_path / f"{label} tried", steps=2, warm_up=5)
    made = {label: {"name": label, "workload": name} for label in loops}
    made |= {label: {**made[label], **TRIED[label][said]} for label, said in chosen.items()}
    made |= {f"matmul {shape}": {"name": "matmul", "workload": name, "shape": shape} for shape in ("square", "best")}
    turns = dict.fromkeys(made, 2) | {"tutorial": 1, "matmul best": 20}
    with contenders(made, folder=tmp_path) as them:
        seconds = interleave(them, steps=turns, warm_up=5)
        peaks = {label: json.loads(them[label].about) for label in them if label.startswith("matmul")}
    own, own_interval = own_seconds(tmp_path)
    step = float(np.median(seconds["bmctl"]))
    ratios = {label: ratio(seconds["bmctl"], seconds[label]) for label in loops[1:]}
    over_tutorial, tutorial_interval = ratio(seconds["tutorial"], seconds["bmctl"])
    print(f"\n{name}, {workload.size} px, batch {workload.batch_size}, {ROUNDS} rounds")
    rows = [
        (f"{label}, {said}, tried", milliseconds(tried[label][said], workload))
        for label in TRIED
        for said in tried[label]
    ]
    rows += [
        (f"{label}, {chosen[label]}" if label in chosen else label, milliseconds(seconds[label], workload))
        for label in loops
    ]
    rows += [(f"bmctl / {label}", shown(*ratios[label])) for label in ("hand-tuned", *FRAMEWORKS)]
    rows += [("tutorial / bmctl", shown(over_tutorial, tutorial_interval))]
    rows += [
        (
            "bmctl's own Python",
            f"{shown(1e6 * own, (1e6 * own_interval[0], 1e6 * own_interval[1]), unit=' us', digits=0)} a step, "
            f"{own / step:.2%} of it",
        )
    ]
    print(table(rows + shares_of_peak(workload, seconds, peaks)))
    assert ratios["hand-tuned"][1][1] <= OVER_HAND_TUNED
    assert own_interval[1] / step <= OWN_SHARE
    for label in FRAMEWORKS:
        assert ratios[label][1][1] <= 1 + MARGIN, f"slower than {label}"
    assert over_tutorial >= OVER_TUTORIAL


def own_seconds(folder: Path) -> tuple[float, tuple[float, float]]:
    """Processor time of bmctl itself in a step: its loop less the hand-tuned one, on a model that costs almost nothing.

    With a batch of single pixels and 62 parameters of one number each, both loops make the same calls into torch's
    model, autograd and optimizer; what is left is bmctl's: loader, schedule, score, votes, clock, and the report that
    it makes at every step, as it does where a step takes half a second.
    """
    made = {
        "own bmctl": {"name": "bmctl", "workload": "featherweight", "threads": 1, "speaks": "always"},
        "own hand-tuned": {"name": "hand-tuned", "workload": "featherweight", "threads": 1},
    }
    with contenders(made, folder=folder) as them:
        seconds = interleave(them, steps=OWN_STEPS, warm_up=OWN_STEPS, clock="cpu_seconds")
    return difference(seconds["own bmctl"], seconds["own hand-tuned"])


def shares_of_peak(
    workload: Workload, seconds: dict[str, np.ndarray], peaks: dict[str, dict[str, float]]
) -> list[tuple[str, str]]:
    """How much of what the machine multiplies at most a step does, by the FLOPs of the model's own operators."""
    flops = step_flops(workload)
    rates = {label: peak["flops"] / float(np.median(seconds[label])) for label, peak in peaks.items()}
    rows = [
        (f"{label}, bf16", f"{rates[label] / 1e12:.3f} TFLOP/s at {'x'.join(map(str, peak['shape']))}")
        for label, peak in peaks.items()
    ]
    for label in ("bmctl", "hand-tuned"):
        reached = flops / float(np.median(seconds[label]))
        shares = ", ".join(f"{reached / rate:.1%} of {peak}" for peak, rate in rates.items())
        rows.append((f"{label} reaches", f"{reached / 1e12:.3f} TFLOP/s: {shares}"))
    return rows


def step_flops(workload: Workload) -> int:
    """Of forward and backward; counted on shapes alone."""
    model = workload.model().to("meta")
    x_BCHW = torch.empty(workload.batch_size, 3, workload.size, workload.size, device="meta")
    with FlopCounterMode(display=False) as counter:
        model(x_BCHW).sum().backward()
    return counter.get_total_flops()


def milliseconds(seconds: np.ndarray, workload: Workload) -> str:
    low, middle, high = (1000 * float(value) for value in np.quantile(seconds, [0.25, 0.5, 0.75]))
    rate = 1000 * workload.batch_size / middle
    return f"{middle:8.1f} ms a step (quartiles {low:.1f} to {high:.1f}), {rate:.1f} images/s"
