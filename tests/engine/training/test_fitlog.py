"""What a loop tells of itself: its events, and the same in TensorBoard's files."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bmctl.core.evaluation import Metric
from bmctl.engine.training.fitlog import FitLog
from bmctl.engine.training.stopwatch import PARTS


def make_log(run: Path, events: list[dict[str, Any]], *, leads: bool = True, every: int | None = None) -> FitLog:
    context = SimpleNamespace(
        group=SimpleNamespace(leads=leads), run=run, emit=lambda event: events.append(dict(event))
    )
    return FitLog(
        context,  # type: ignore[arg-type]
        stage="train",
        metric=Metric("accuracy", unit="share"),
        scored=Metric("accuracy", unit="share"),
        batch_size=8,
        steps_per_epoch=10,
        num_steps=35,
        eval_every_steps=every,
    )


def test_the_parts_of_a_step_are_told_and_drawn(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    log = make_log(tmp_path, events)
    log.open(step=0)
    parts = dict(zip(PARTS, (1.0, 2.0, 3.0, 4.0, 5.0), strict=True))
    log.step(7, loss=0.5, metric=0.8, lr=0.1, parts=parts)
    log.done(7, best_step=7, val_metric=0.8, parts=parts)
    assert [event["parts"] for event in events] == [parts, parts]
    board = EventAccumulator(str(tmp_path / "tensorboard" / "train")).Reload()
    drawn = {tag: board.Scalars(tag)[0] for tag in board.Tags()["scalars"] if tag.startswith("time/")}
    assert {tag: one.value for tag, one in drawn.items()} == {
        **{f"time/{part}_ms": ms for part, ms in parts.items()},
        "time/step_ms": 15.0,
    }
    assert {one.step for one in drawn.values()} == {7}


def test_steps_are_told_with_the_epoch_they_belong_to(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    log = make_log(tmp_path, events)
    for step in (1, 10, 11, 35):
        log.step(step, loss=0.5, metric=0.8, lr=0.1)
    assert [(event["epoch"], event["epochs"], event["steps"]) for event in events] == [
        (epoch, 4, 35) for epoch in (1, 1, 2, 4)
    ]


@pytest.mark.parametrize("every", [None, 5])
def test_evaluations_are_of_epochs_unless_they_come_every_so_many_steps(tmp_path: Path, every: int | None) -> None:
    events: list[dict[str, Any]] = []
    log = make_log(tmp_path, events, every=every)
    log.evaluation(20, loss=0.5, metric=0.8, val_metric=0.7, val_loss=None, is_best=True)
    (event,) = events
    assert (event["step"], event["steps"], event["is_best"]) == (20, 35, True)
    assert (event.get("epoch"), event.get("epochs")) == ((2, 4) if every is None else (None, None))


def test_what_is_left_is_never_more_than_the_time_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(10**6))
    monkeypatch.setattr("bmctl.engine.training.fitlog.time.perf_counter", lambda: float(next(now)))
    events: list[dict[str, Any]] = []
    log = make_log(tmp_path, events)
    for left in (None, 1e9, 3.0, -1.0):
        log.begin()
        log.tick()
        log.step(1, loss=0.5, metric=0.8, lr=0.1, time_left_s=left)
    free, loose, tight, over = (event["eta_s"] for event in events)
    assert free > 30 and loose > 30
    assert (tight, over) == (3.0, 0.0)


def test_what_comes_before_the_first_step_is_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models are compared with fp32, and compiled, between the making of the log and its opening."""
    now = [0.0]
    monkeypatch.setattr("bmctl.engine.training.fitlog.time.perf_counter", lambda: now[0])
    log = make_log(tmp_path, [], leads=False)
    now[0] = 100.0
    log.open(step=0)
    now[0] = 102.0
    log.tick()
    log.pause()
    assert (log.train_s, log.num_steps_here) == (2.0, 1)


def test_only_the_first_rank_speaks_and_draws(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    log = make_log(tmp_path, events, leads=False)
    log.open(step=0)
    log.step(1, loss=0.5, metric=0.8, lr=0.1, parts=dict.fromkeys(PARTS, 1.0))
    log.evaluation(10, loss=0.5, metric=0.8, val_metric=0.7, val_loss=0.3)
    assert not events
    assert not list(tmp_path.iterdir())
