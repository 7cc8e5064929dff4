"""Learning rates over the steps, against torch's own schedulers where it has them."""

from __future__ import annotations

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, MultiStepLR, OneCycleLR

from bmctl.engine.training.schedule import learning_rate
from bmctl.fit import Constant, Cosine, Linear, OneCycle, Schedule, StepDecay

PEAK = 2.0


def ours(schedule: Schedule, num_steps: int) -> list[float]:
    return [learning_rate(schedule, peak=PEAK, step=step, num_steps=num_steps) for step in range(num_steps)]


def torchs(make: type[LRScheduler], num_steps: int, **arguments: object) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler = make(optimizer, **arguments)
    rates = []
    for _ in range(num_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step() if len(rates) < num_steps else None
    return rates


@pytest.mark.parametrize(("rise", "num_steps"), [(0.3, 100), (0.3, 7), (0.25, 33), (0.0, 10), (1.0, 10), (0.99, 1000)])
@pytest.mark.parametrize("final", [4e-6, 0.01])
def test_one_cycle_is_torchs(rise: float, num_steps: int, final: float) -> None:
    schedule = OneCycle(name="one_cycle", rise=rise, start=0.04, final=final)
    expected = torchs(
        OneCycleLR,
        num_steps,
        max_lr=PEAK,
        total_steps=num_steps,
        pct_start=rise,
        anneal_strategy="cos",
        cycle_momentum=False,
        div_factor=1 / 0.04,
        final_div_factor=0.04 / final,
    )
    assert ours(schedule, num_steps) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_the_defaults_of_one_cycle_are_torchs() -> None:
    expected = torchs(OneCycleLR, 50, max_lr=PEAK, total_steps=50, cycle_momentum=False)
    assert ours(OneCycle(name="one_cycle"), 50) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("final", [0.0, 0.1])
def test_cosine_and_linear_are_torchs_after_the_warm_up(final: float) -> None:
    cosine = torchs(CosineAnnealingLR, 90, T_max=90, eta_min=PEAK * final)
    assert ours(Cosine(warmup=0.1, final=final), 100)[10:] == pytest.approx(cosine, rel=1e-9, abs=1e-12)
    line = torchs(LinearLR, 90, start_factor=1.0, end_factor=final, total_iters=90)
    assert ours(Linear(name="linear", warmup=0.1, final=final), 100)[10:] == pytest.approx(line, rel=1e-9, abs=1e-12)


def test_steps_are_torchs() -> None:
    expected = torchs(MultiStepLR, 60, milestones=[30, 45], gamma=0.1)
    assert ours(StepDecay(name="step", warmup=0.0), 60) == pytest.approx(expected, rel=1e-9)
    # A milestone of 0 is behind at the first step, one of 1 is never reached.
    assert ours(StepDecay(name="step", warmup=0.0, at=(0.0, 1.0), factor=0.5), 4) == [PEAK / 2] * 4


@pytest.mark.parametrize(
    "schedule",
    [
        Cosine(warmup=0.2),
        Linear(name="linear", warmup=0.2),
        StepDecay(name="step", warmup=0.2),
        Constant(name="constant", warmup=0.2),
    ],
    ids=lambda schedule: schedule.name,
)
def test_the_warm_up_is_a_line_from_zero_to_the_peak(schedule: Schedule) -> None:
    rates = ours(schedule, 50)
    assert rates[:10] == pytest.approx([PEAK * (step + 1) / 10 for step in range(10)])
    assert rates[9] == rates[10] == max(rates) == PEAK
    assert rates[9:] == sorted(rates[9:], reverse=True)


@pytest.mark.parametrize("num_steps", [1, 2, 3])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_short_trainings_have_a_rate(num_steps: int, share: float) -> None:
    for schedule in (
        Cosine(warmup=share),
        Linear(name="linear", warmup=share),
        StepDecay(name="step", warmup=share, at=(share,)),
        Constant(name="constant", warmup=share),
        OneCycle(name="one_cycle", rise=share, start=share, final=share),
        OneCycle(name="one_cycle", rise=1 / num_steps),
    ):
        assert all(0 <= rate <= PEAK for rate in ours(schedule, num_steps)), schedule


def test_a_constant_rate_is_constant() -> None:
    assert set(ours(Constant(name="constant", warmup=0.0), 5)) == {PEAK}
