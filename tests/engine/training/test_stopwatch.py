"""The parts of a step add up to the step; a clock that the tests own says what each took."""

from __future__ import annotations

import pytest
import torch

from bmctl.engine.training import stopwatch
from bmctl.engine.training.stopwatch import PARTS, Stopwatch

CPU = torch.device("cpu")


class Clock:
    now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(stopwatch, "time", made)
    return made


def step(watch: Stopwatch, clock: Clock, **seconds: float) -> None:
    for part, took in seconds.items():
        clock.now += took
        watch.lap(part)


def test_laps_are_means_per_step_since_last_asked(clock: Clock) -> None:
    watch = Stopwatch(CPU)
    watch.start()
    step(watch, clock, data=0.001, forward=0.010, backward=0.020, optimizer=0.003)
    step(watch, clock, data=0.003, forward=0.020, backward=0.040, optimizer=0.005)
    means = watch.take()
    assert means == pytest.approx({"data": 2, "forward": 15, "backward": 30, "communication": 0, "optimizer": 4})
    step(watch, clock, data=0.0, forward=0.1, backward=0.0, optimizer=0.0)
    assert watch.take() == pytest.approx(dict.fromkeys(PARTS, 0.0) | {"forward": 100})
    assert watch.take() == dict.fromkeys(PARTS, 0.0)
    assert watch.overall() == pytest.approx(
        {"data": 4 / 3, "forward": 130 / 3, "backward": 20, "communication": 0, "optimizer": 8 / 3}
    )


def test_parts_of_an_accumulated_step_add_up(clock: Clock) -> None:
    watch = Stopwatch(CPU)
    watch.start()
    for _ in range(4):
        step(watch, clock, data=0.001, forward=0.002, backward=0.003)
    step(watch, clock, optimizer=0.004)
    means = watch.take()
    assert sum(means.values()) == pytest.approx(28)


def test_what_was_skipped_is_nobodys(clock: Clock) -> None:
    watch = Stopwatch(CPU)
    watch.start()
    step(watch, clock, data=0.001)
    clock.now += 100  # a validation
    watch.start()
    step(watch, clock, forward=0.002, optimizer=0.001)
    assert sum(watch.take().values()) == pytest.approx(4)


def test_communication_is_taken_out_of_backward_and_never_exceeds_it(clock: Clock) -> None:
    watch = Stopwatch(CPU)
    watch.start()
    step(watch, clock, backward=0.010)
    watch.add("communication", 0.004)
    step(watch, clock, optimizer=0.001)
    means = watch.take()
    assert (means["backward"], means["communication"]) == pytest.approx((6, 4))
    step(watch, clock, backward=0.010)
    watch.add("communication", 5.0)
    step(watch, clock, optimizer=0.001)
    means = watch.take()
    assert (means["backward"], means["communication"]) == pytest.approx((0, 10))
