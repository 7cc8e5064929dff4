"""The loop: it learns, selects, stops, goes on bit for bit, and says what it does."""

from __future__ import annotations

import copy
import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine.runs import Seen, StopAt, fit, make_context, make_model, make_recipe, steps

from bmctl.engine.computing import kernels
from bmctl.engine.training import train, validation
from bmctl.engine.training.schedule import learning_rate
from bmctl.errors import DataError, DivergedError, InterruptedRunError, PackageError, PreemptedError, UsageError
from bmctl.fit import Distill
from bmctl.tasks import classify


@pytest.fixture(params=["adamw", "sgd", "adam", "rmsprop"])
def optimizer(request) -> str:
    return request.param


def test_every_optimizer_learns(tmp_path: Path, optimizer: str) -> None:
    rate = {"sgd": 0.05}.get(optimizer, 1e-3)
    recipe = make_recipe(tmp_path, f"train.optimizer={{name: {optimizer}, lr: {rate}}}", "train.epochs=2")
    seen = Seen()
    result = fit(make_context(tmp_path / "run", recipe, seen=seen), make_model(recipe))
    first, last = seen.of("evaluation")
    assert last["loss"] < first["loss"]
    assert result.val.value > 0.4 > result.val.baseline
    assert result.steps == 20
    assert seen.of("start")[0]["steps"] == 20
    assert seen.of("done")[0]["val_metric"] == result.val.value
    assert "fp32: the recipe says so" in result.notes
    assert "kernels: torch's own (bmctl's are for bf16, and steps are in fp32)" in result.notes


def test_events_go_to_tensorboard(tmp_path: Path, monkeypatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr("bmctl.engine.training.fitlog.PERIOD_S", 0.0)
    recipe = make_recipe(tmp_path, "train.epochs=2")
    seen = Seen()
    fit(make_context(tmp_path / "run", recipe, seen=seen), make_model(recipe))
    assert [event["step"] for event in seen.of("step")] == list(range(1, 21))
    assert all(event["samples_per_s"] > 0 for event in seen.of("step"))
    rates = [learning_rate(recipe.train.schedule, peak=1e-3, step=step, num_steps=20) for step in range(20)]
    assert [event["lr"] for event in seen.of("step")] == rates
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard" / "train")).Reload()
    losses = [(event.step, event.value) for event in board.Scalars("train/loss")]
    assert losses == [(event["step"], pytest.approx(event["loss"])) for event in seen.of("step")]
    assert [event.step for event in board.Scalars("val/accuracy")] == [10, 20]
    json.dumps(seen.events)


def test_short_epochs_do_not_silence_it(tmp_path: Path, monkeypatch) -> None:
    """Time to speak is counted over epochs, not within one."""
    now = iter(range(10**6))
    monkeypatch.setattr("bmctl.engine.training.fitlog.time.perf_counter", lambda: next(now) / 40)
    recipe, seen = make_recipe(tmp_path, "train.epochs=4", "data.train.limit=96"), Seen()
    fit(make_context(tmp_path / "run", recipe, seen=seen), make_model(recipe))
    assert seen.of("step")
    assert all(event["epoch"] == (event["step"] + 2) // 3 for event in seen.of("step"))


def test_max_steps_ends_within_an_epoch(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, "train.max_steps=13")
    result = fit(make_context(tmp_path / "run", recipe), make_model(recipe))
    assert result.steps == 13
    assert steps(tmp_path / "run") == ["latest", "step-00000010", "step-00000013"]


class ByLoss:
    """The task, judged by its loss first: lower is better."""

    def __init__(self) -> None:
        self.METRICS = {name: classify.METRICS[name] for name in ("loss", "accuracy", "macro_f1")}

    def __getattr__(self, name: str) -> Any:
        return getattr(classify, name)

    def evaluate(self, parts: Any, batches: Any, **known: Any) -> Any:
        found = classify.evaluate(parts, batches, **known)
        return replace(found, values={name: found.values[name] for name in self.METRICS})


def rig(monkeypatch: pytest.MonkeyPatch, *values: float) -> list[dict[str, torch.Tensor]]:
    """Let evaluations find these values of the main metric; returns the weights that they were of."""
    left, real = iter(values), validation.evaluate
    kept: list[dict[str, torch.Tensor]] = []

    def rigged(training, *, step):
        kept.append(copy.deepcopy(training.model.state_dict()))
        found = real(training, step=step)
        return replace(found, values={**found.values, found.name: next(left, found.value)})

    for module in (validation, train):
        monkeypatch.setattr(module, "evaluate", rigged)
    return kept


@pytest.mark.parametrize(
    ("task", "values"), [(classify, (0.2, 0.9, 0.4)), (ByLoss(), (2.0, 0.9, 1.4))], ids=["higher", "lower"]
)
@pytest.mark.parametrize("select", ["best", "last"])
def test_the_selected_weights_are_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, select: str, task: Any, values: tuple[float, ...]
) -> None:
    kept = rig(monkeypatch, *values)
    recipe, seen = make_recipe(tmp_path, f"train.select={select}"), Seen()
    model = make_model(recipe)
    result = fit(make_context(tmp_path / "run", recipe, seen=seen), model, task=task)
    assert [event["is_best"] for event in seen.of("evaluation")] == [True, True, False]
    main = next(iter(task.METRICS.values()))
    assert {(event["metric_name"], event["metric_unit"]) for event in seen.of("evaluation")} == {(main.name, main.unit)}
    assert result.best_step == 20
    chosen = kept[1 if select == "best" else 2]
    assert all(torch.equal(tensor, chosen[name]) for name, tensor in model.state_dict().items())
    assert not model.training
    assert result.val.value == 0.9 if select == "best" else result.val.value not in values[:2]


def test_progress_of_what_is_better_when_lower_is_measured_downwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig(monkeypatch, 3.0, 2.0, 1.9, 1.0)
    recipe = make_recipe(tmp_path, "train.epochs=5", "train.early_stop={patience: 1, min_delta: 0.5}")
    result = fit(make_context(tmp_path / "run", recipe), make_model(recipe), task=ByLoss())
    assert (result.steps, result.best_step) == (30, 30)


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, "train.optimizer={name: sgd, lr: 1e30}")
    with pytest.raises(DivergedError, match="no longer finite") as caught:
        fit(make_context(tmp_path / "run", recipe), make_model(recipe))
    assert caught.value.exit_code == 9
    assert "lr" in caught.value.hint
    assert not list((tmp_path / "run").glob("checkpoints/train/step-*"))


def test_fewer_samples_than_a_batch(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, "train.batch_size=321")
    with pytest.raises(DataError, match="320 samples, fewer than one batch of 321"):
        fit(make_context(tmp_path / "run", recipe), make_model(recipe))


class Stubborn(torch.nn.Module):
    """Says class 3 to everything, in training mode class 4."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(torch.zeros(10))

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        favourite = torch.nn.functional.one_hot(torch.tensor(4 if self.training else 3), 10)
        return (self.logits + 10.0 * favourite).expand(len(x_BCHW), 10)


@pytest.mark.parametrize(("weight", "share_of_3"), [(0.0, (0.0, 0.3)), (1.0, (0.99, 1.0))])
def test_a_teacher_is_followed_as_far_as_asked(tmp_path: Path, weight: float, share_of_3: tuple[float, float]) -> None:
    recipe = make_recipe(tmp_path, "train.epochs=2", "train.select=last")
    student, teacher = make_model(recipe), Stubborn()
    context = make_context(tmp_path / "run", recipe)
    fit(context, student, teacher=teacher, distill=Distill(weight=weight, temperature=2.0))
    with torch.no_grad():
        says_3 = float((student(torch.randn(200, 1, 28, 28)).argmax(1) == 3).float().mean())
    assert share_of_3[0] <= says_3 <= share_of_3[1]
    assert teacher.logits.grad is None
    assert not teacher.training


def test_the_same_seed_gives_the_same_weights(tmp_path: Path) -> None:
    found = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        recipe = make_recipe(tmp_path, "train.epochs=1", "data.input.augment.shift=2")
        model = make_model(recipe)
        fit(make_context(tmp_path / name, recipe), model, seed=seed)
        found.append(model.state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert not all(torch.equal(found[0][name], found[2][name]) for name in found[0])


# -- stopping and going on ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> dict[str, torch.Tensor]:
    """Weights of a training that nothing stopped."""
    folder = tmp_path_factory.mktemp("reference")
    recipe = make_recipe(folder, "data.input.augment.shift=2")
    model = make_model(recipe)
    fit(make_context(folder / "run", recipe), model)
    return model.state_dict()


# 10 steps an epoch, each looks once; then 4 batches of validation look once each.
@pytest.mark.parametrize("looks", [0, 4, 9, 10, 12, 13, 20, 39, 41])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path: Path, reference, looks: int) -> None:
    recipe = make_recipe(tmp_path, "data.input.augment.shift=2")
    with pytest.raises(PreemptedError, match="stopped at step") as caught:
        fit(make_context(tmp_path / "run", recipe, stop=StopAt(looks)), make_model(recipe))
    assert caught.value.exit_code == 75
    assert "--resume" in caught.value.hint
    seen = Seen()
    model = make_model(recipe)
    torch.manual_seed(99)
    fit(make_context(tmp_path / "run", recipe, seen=seen, resume=True), model)
    assert all(torch.equal(tensor, reference[name]) for name, tensor in model.state_dict().items())
    assert "going on from step" in seen.notes
    assert [event["step"] for event in seen.of("evaluation")][-1] == 30


def test_dropout_goes_on_bit_for_bit(tmp_path: Path) -> None:
    def make() -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Dropout(0.5), make_model(recipe))

    recipe = make_recipe(tmp_path)
    whole, half = make(), make()
    fit(make_context(tmp_path / "whole", recipe), whole)
    with pytest.raises(PreemptedError):
        fit(make_context(tmp_path / "half", recipe, stop=StopAt(16)), half)
    torch.manual_seed(99)
    again = make()
    fit(make_context(tmp_path / "half", recipe, resume=True), again)
    assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in again.state_dict().items())


def test_control_c_is_told_apart(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path)
    with pytest.raises(InterruptedRunError, match="saved in") as caught:
        fit(make_context(tmp_path / "run", recipe, stop=StopAt(3, signal.SIGINT)), make_model(recipe))
    assert caught.value.exit_code == 130
    assert steps(tmp_path / "run") == ["latest", "step-00000004"]


def test_checkpoints_between_epochs(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, "train.checkpoint_every_steps=4", "train.keep_checkpoints=9", "train.epochs=2")
    fit(make_context(tmp_path / "run", recipe), make_model(recipe))
    names = [f"step-{step:08d}" for step in (4, 8, 12, 16, 20)]
    assert steps(tmp_path / "run") == ["latest", *names]


def test_an_earlier_attempt_is_not_overwritten(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, "train.epochs=1")
    fit(make_context(tmp_path / "run", recipe), make_model(recipe))
    with pytest.raises(UsageError, match="up to step 10") as caught:
        fit(make_context(tmp_path / "run", recipe), make_model(recipe))
    assert "--resume" in caught.value.hint
    other = make_recipe(tmp_path, "train.epochs=2")
    fit(make_context(tmp_path / "run", other, overwrite=True), make_model(recipe))
    assert steps(tmp_path / "run") == ["latest", "step-00000010", "step-00000020"]


@pytest.mark.parametrize(
    ("override", "kind", "says"),
    [
        ("train.optimizer.lr=0.5", PackageError, r"fit.optimizer.lr was 0.001, is 0.5"),
        ("train.optimizer={name: sgd}", PackageError, "state of adamw; the recipe says sgd"),
        ("train.kernels=torch", PackageError, "fit.kernels was auto, is torch"),
        ("data.train.limit=330", DataError, "the data set changed"),
        ("data.input.augment.flip=true", PackageError, "data.input.augment.flip was False, is True"),
    ],
)
def test_another_training_does_not_go_on(tmp_path: Path, override: str, kind: type, says: str) -> None:
    recipe = make_recipe(tmp_path, "train.epochs=1")
    fit(make_context(tmp_path / "run", recipe), make_model(recipe))
    changed = make_recipe(tmp_path, "train.epochs=1", override)
    with pytest.raises(kind, match=says):
        fit(make_context(tmp_path / "run", changed, resume=True), make_model(changed))


def test_what_does_not_matter_may_change(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, "train.epochs=1")
    fit(make_context(tmp_path / "run", recipe), make_model(recipe))
    changed = make_recipe(tmp_path, "train.epochs=1", "train.keep_checkpoints=5", "data.num_workers=1")
    assert fit(make_context(tmp_path / "run", changed, resume=True), make_model(changed)).steps == 10


def test_a_corrupt_checkpoint_is_passed_over(tmp_path: Path, reference) -> None:
    recipe = make_recipe(tmp_path, "data.input.augment.shift=2")
    with pytest.raises(PreemptedError):
        fit(make_context(tmp_path / "run", recipe, stop=StopAt(34)), make_model(recipe))
    newest = tmp_path / "run" / "checkpoints" / "train" / "latest" / "model-rank-0.safetensors"
    newest.write_bytes(newest.read_bytes()[:-4])
    seen, model = Seen(), make_model(recipe)
    fit(make_context(tmp_path / "run", recipe, seen=seen, resume=True), model)
    assert "corrupt" in seen.notes
    assert any(name.endswith(".corrupt") for name in steps(tmp_path / "run"))
    assert all(torch.equal(tensor, reference[name]) for name, tensor in model.state_dict().items())


def test_resume_with_nothing_there_starts(tmp_path: Path) -> None:
    recipe, seen = make_recipe(tmp_path, "train.epochs=1"), Seen()
    assert fit(make_context(tmp_path / "run", recipe, seen=seen, resume=True), make_model(recipe)).steps == 10
    assert "no checkpoint to go on from" in seen.notes


def test_other_threads_are_said(tmp_path: Path) -> None:
    recipe, seen = make_recipe(tmp_path, "train.epochs=1"), Seen()
    fit(make_context(tmp_path / "run", recipe), make_model(recipe))
    context = make_context(tmp_path / "run", recipe, seen=seen, resume=True)
    fit(replace(context, group=replace(context.group, threads=3)), make_model(recipe))
    assert "not the same weights bit for bit" in seen.notes


@pytest.mark.parametrize("before", [True, False])
def test_other_kernels_are_said(tmp_path: Path, monkeypatch, before: bool) -> None:
    """Begun on a CPU with AMX and going on on one without, or the other way."""
    monkeypatch.setattr(kernels, "has_tiles", lambda: before)
    recipe, seen = make_recipe(tmp_path, "train.epochs=1", "train.precision=bf16"), Seen()
    first = fit(make_context(tmp_path / "run", recipe), make_model(recipe))
    assert any(note.startswith("kernels: attention, convolution, linear by bmctl") for note in first.notes) is before
    monkeypatch.setattr(kernels, "has_tiles", lambda: not before)
    fit(make_context(tmp_path / "run", recipe, seen=seen, resume=True), make_model(recipe))
    crews = ["torch's kernels", "bmctl's kernels (attention, convolution, linear)"]
    then, now = (f"1 process with 1 thread on cpu and {crews[tiles]}" for tiles in (before, not before))
    assert f"begun by {then}, going on by {now}: " in seen.notes
