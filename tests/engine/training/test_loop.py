"""What a step and its borders do: parts of a batch, clipping, averages, budgets, steps that are left out."""

from __future__ import annotations

import itertools
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.engine.runs import Seen, fit, make_context, make_model, make_recipe, steps

from bmctl.engine.checkpoints.checkpoint import open_checkpoint
from bmctl.engine.computing import kernels
from bmctl.engine.computing.precision import Precision
from bmctl.engine.training import setup, validation
from bmctl.errors import DivergedError


def trained(
    tmp_path: Path, *overrides: str, name: str = "run", seen: Seen | None = None, resume: bool = False, **given
):
    recipe = make_recipe(tmp_path, *overrides)
    return fit(make_context(tmp_path / name, recipe, seen=seen, resume=resume), make_model(recipe), **given)


def weights_of(result) -> dict[str, torch.Tensor]:
    return result.model.state_dict()


def far(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in a)


# -- a step -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [2, 8])
def test_parts_of_a_batch_add_up_to_it(tmp_path: Path, parts: int) -> None:
    whole = trained(tmp_path, "train.max_steps=10", "train.optimizer=sgd")
    cut = trained(tmp_path, "train.max_steps=10", "train.optimizer=sgd", f"train.accumulate={parts}", name="cut")
    assert 0 < far(weights_of(whole), weights_of(cut)) < 1e-6
    assert whole.val.values["loss"] == pytest.approx(cut.val.values["loss"], rel=1e-5)


@pytest.mark.parametrize("parts", [1, 4])
def test_the_batch_size_is_found_by_trial_and_kept(tmp_path: Path, parts: int) -> None:
    """So that an epoch of 320 samples has ten steps; what is tried is a part of a batch."""
    seen, again = Seen(), Seen()
    settings = ("train.batch_size=auto", f"train.accumulate={parts}", "train.select=last")
    result = trained(tmp_path, *settings, "train.max_steps=12", seen=seen)
    assert f"batch size, {32 // parts} at a time: takes" in seen.notes
    assert f"batch size, {64 // parts} at a time" not in seen.notes
    assert open_checkpoint(tmp_path / "run" / "checkpoints" / "train" / "latest").state.batch_size == 32
    given = trained(tmp_path, "train.batch_size=32", *settings[1:], "train.max_steps=12", name="given")
    assert far(weights_of(result), weights_of(given)) == 0, "trying leaves no trace"
    recipe = make_recipe(tmp_path, *settings, "train.max_steps=12")
    resumed = fit(make_context(tmp_path / "run", recipe, seen=again, resume=True), make_model(recipe))
    assert resumed.steps == 12
    assert "at a time" not in again.notes, "a size that was found once is not tried again"


def test_every_part_of_a_step_is_timed(tmp_path: Path) -> None:
    seen = Seen()
    trained(tmp_path, "train.max_steps=5", seen=seen)
    parts = seen.of("done")[-1]["parts"]
    assert all(parts[part] > 0 for part in ("data", "forward", "backward", "optimizer")), parts


def test_gradients_are_clipped(tmp_path: Path) -> None:
    optimizer = "train.optimizer={name: sgd, lr: 1, momentum: 0, weight_decay: 0}"
    schedule = "train.schedule={name: constant, warmup: 0}"
    recipe = make_recipe(
        tmp_path, "train.max_steps=1", "train.clip_norm=0.01", "train.select=last", optimizer, schedule
    )
    model = make_model(recipe)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    after = weights_of(fit(make_context(tmp_path / "run", recipe), model))
    moved = sum(float((after[name] - before[name]).square().sum()) for name in before) ** 0.5
    assert moved == pytest.approx(0.01, rel=1e-4), "one step of rate 1 moves the weights by the gradient's norm"


def test_an_average_is_what_is_judged_and_kept(tmp_path: Path) -> None:
    plain = trained(tmp_path, "train.select=last")
    seen = Seen()
    averaged = trained(tmp_path, "train.select=last", "train.ema={decay: 0.99}", name="averaged", seen=seen)
    assert far(weights_of(plain), weights_of(averaged)) > 1e-4
    folder = tmp_path / "averaged" / "checkpoints" / "train" / "latest"
    saved = open_checkpoint(folder)
    assert all(torch.equal(saved.read("ema", name), tensor) for name, tensor in weights_of(averaged).items())
    live = {name: saved.read("model", name) for name in saved.names("model")}
    assert far(live, weights_of(plain)) == 0, "the average does not change the steps"
    assert seen.of("evaluation")[-1]["val_metric"] == averaged.val.value


def test_the_average_is_of_all_steps(tmp_path: Path) -> None:
    settings = ("train.select=last", "train.schedule={name: constant, warmup: 0}")
    recipe = make_recipe(tmp_path, *settings)
    mean = {name: tensor.clone() for name, tensor in make_model(recipe).state_dict().items()}
    for step in range(3):
        live = weights_of(trained(tmp_path, *settings, f"train.max_steps={step + 1}", name=f"to-{step}"))
        decay = (1 + step) / (10 + step)  # less than 0.99 as long as there are few
        mean = {name: decay * mean[name] + (1 - decay) * live[name] for name in mean}
    averaged = trained(tmp_path, *settings, "train.max_steps=3", "train.ema={decay: 0.99}", name="averaged")
    assert far(weights_of(averaged), mean) < 1e-6 < 1e-4 < far(mean, live)


def test_the_best_average_is_what_is_judged_after_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The average moves on after its best evaluation: what the result is worth must be of the one that is kept."""
    evaluate = validation.evaluate

    def falling(training, *, step):
        found = evaluate(training, step=step)
        monkeypatch.setattr(type(found), "value", -float(step))
        return found

    monkeypatch.setattr(validation, "evaluate", falling)
    settings = (
        "train.max_steps=15",
        "train.ema={decay: 0.9}",
        "train.eval_every_steps=5",
        "train.checkpoint_every_steps=5",
    )
    whole = trained(tmp_path, *settings, name="run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "train" / "step-00000015")
    resumed = trained(tmp_path, *settings, name="run", resume=True)
    assert whole.best_step == resumed.best_step == 5 < resumed.steps
    assert far(weights_of(resumed), weights_of(whole)) == 0
    assert resumed.val.values == whole.val.values


def test_a_run_that_fell_back_to_fp32_stays_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the first batches showed is not asked again of others, which might show something else."""
    bf16, fp32 = Precision("bf16", "the CPU has some"), Precision("fp32", "bf16 does not hold here")
    asked: list[str] = []

    def choose(name: str, device: torch.device) -> Precision:
        asked.append(name)
        return replace(fp32, reason="") if name == "fp32" else bf16

    monkeypatch.setattr(setup, "choose_precision", choose)
    monkeypatch.setattr(setup.selfcheck, "check", lambda precision, **given: (fp32, "bf16 does not hold here"))
    settings = ("train.precision=auto", "train.max_steps=15", "train.checkpoint_every_steps=5")
    whole = trained(tmp_path, *settings, name="whole")
    folder = tmp_path / "whole" / "checkpoints" / "train"
    assert (asked, open_checkpoint(folder / "latest").state.precision) == (["auto"], "fp32")
    for later in sorted(folder.glob("step-*"))[1:]:
        shutil.rmtree(later)
    recipe = make_recipe(tmp_path, *settings)
    resumed = fit(make_context(tmp_path / "whole", recipe, resume=True), make_model(recipe))
    assert asked == ["auto", "fp32"]
    assert resumed.steps == 15 and far(weights_of(resumed), weights_of(whole)) == 0


@pytest.mark.parametrize(
    ("precision", "tiles", "compiles", "faster"),
    [
        ("bf16", True, False, True),
        ("bf16", False, False, False),
        ("bf16", True, True, False),
        ("fp32", True, False, False),
    ],
)
def test_the_faster_kernels_compute_bf16_on_tiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, tiles: bool, compiles: bool, faster: bool
) -> None:
    monkeypatch.setattr(kernels, "has_tiles", lambda: tiles)
    monkeypatch.setattr(setup, "choose_precision", lambda name, device: Precision(precision, ""))
    monkeypatch.setattr(setup, "compiled", lambda forward, **given: forward)
    recipe = make_recipe(tmp_path, "train.max_steps=1", f"train.compile={compiles}", "train.batch_size=auto")
    model, seen = make_model(recipe), set[tuple[bool, ...]]()
    F, Conv2d = torch.nn.functional, torch.nn.Conv2d
    natives = F.linear, F.scaled_dot_product_attention, Conv2d._conv_forward

    def look() -> tuple[bool, ...]:
        now = F.linear, F.scaled_dot_product_attention, Conv2d._conv_forward
        return tuple(one is not other for one, other in zip(now, natives, strict=True))

    model.register_forward_hook(lambda module, *_: seen.add(look()) if module.training else None)
    fit(make_context(tmp_path / "run", recipe), model)
    assert seen == {(faster,) * 3}, "while the batch size is tried, the numbers are compared, and in every step"
    assert look() == (False, False, False)


# -- what ends a training ---------------------------------------------------------------------------


def test_it_stops_when_nothing_gets_better(tmp_path: Path) -> None:
    seen = Seen()
    rate = "train.optimizer={name: sgd, lr: 1e-9, momentum: 0}"
    result = trained(tmp_path, rate, "train.epochs=9", "train.early_stop={patience: 2}", seen=seen)
    assert (result.steps, result.best_step) == (30, 10)
    assert "2 evaluations without progress" in seen.notes
    assert "2 evaluations without progress" in result.notes[-1]


def test_progress_must_be_as_large_as_asked(tmp_path: Path) -> None:
    patient = trained(tmp_path, "train.early_stop={patience: 1}")
    strict = trained(tmp_path, "train.early_stop={patience: 1, min_delta: 0.9}", name="strict")
    assert patient.steps == 30
    assert strict.steps == 20


def test_it_stops_when_the_time_is_up(tmp_path: Path, monkeypatch) -> None:
    clock = itertools.count()
    monkeypatch.setattr("bmctl.engine.training.loop.time.perf_counter", lambda: float(next(clock)))
    seen = Seen()
    result = trained(tmp_path, "train.max_time_s=120", seen=seen)
    assert 1 < result.steps < 30
    assert "max_time_s" in result.notes[-1]
    saved = open_checkpoint(tmp_path / "run" / "checkpoints" / "train" / "latest")
    assert saved.state.step == result.steps
    assert saved.state.elapsed_s >= 120


def test_evaluations_may_come_every_so_many_steps(tmp_path: Path) -> None:
    seen = Seen()
    result = trained(tmp_path, "train.epochs=2", "train.eval_every_steps=6", seen=seen)
    events = seen.of("evaluation")
    assert [event["step"] for event in events] == [6, 12, 18, 20]
    assert result.best_step == max(events, key=lambda event: event["val_metric"])["step"]
    assert {"step-00000010", "step-00000020"} <= set(steps(tmp_path / "run")), "checkpoints come once an epoch"


def test_evaluating_more_often_changes_nothing_else(tmp_path: Path) -> None:
    seldom = trained(tmp_path, "train.select=last")
    often = trained(tmp_path, "train.select=last", "train.eval_every_steps=3", name="often")
    assert far(weights_of(seldom), weights_of(often)) == 0


# -- what is not finite -----------------------------------------------------------------------------


class Spoiled:
    """A task whose loss is nan in some steps."""

    def __init__(self, task, *, at: set[int]) -> None:
        self._task, self._at, self._calls = task, at, 0

    def __getattr__(self, name: str):
        return getattr(self._task, name)

    def loss(self, outputs, batch, **known):
        self._calls += 1
        loss = self._task.loss(outputs, batch, **known)
        return loss * float("nan") if self._calls in self._at else loss


def spoil(tmp_path: Path, at: set[int], *overrides: str, seen: Seen | None = None):
    from bmctl.tasks import TASKS

    task = Spoiled(TASKS["classify"], at=at)
    return trained(tmp_path, "train.check_precision=false", *overrides, seen=seen, task=task)


def test_a_step_may_be_left_out(tmp_path: Path) -> None:
    seen = Seen()
    result = spoil(tmp_path, {4, 5, 14}, "train.skip_non_finite=2", seen=seen)
    assert result.steps == 30
    assert all(bool(tensor.isfinite().all()) for tensor in weights_of(result).values())
    assert [note.split(" was")[0] for note in seen.notes.splitlines() if "left out" in note] == [
        "step 4", "step 5", "step 14",
    ]  # fmt: skip
    assert all(event["loss"] == event["loss"] for event in seen.of("evaluation")), "left-out steps are not in the means"


def test_too_many_in_a_row_end_it(tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match="at step 6 of 30"):
        spoil(tmp_path, {4, 5, 6}, "train.skip_non_finite=2")


def test_without_leave_the_first_ends_it(tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match="at step 14 of 30"):
        spoil(tmp_path, {14})
    assert open_checkpoint(tmp_path / "run" / "checkpoints" / "train" / "latest").state.step == 10
