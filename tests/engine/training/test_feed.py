"""A task may bring along where its batches come from; what that owns is part of every checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine.ranks import on_ranks
from tests.engine.runs import Seen, fit, make_context, make_model, make_recipe, same
from tests.engine.training.test_train import StopAt

from bmctl.engine.checkpoints.checkpoint import open_checkpoint
from bmctl.engine.parallel import Group
from bmctl.errors import PackageError, PreemptedError
from bmctl.tasks import TASKS

SETTINGS = ("train.checkpoint_every_steps=4", "train.eval_every_steps=6", "train.max_steps=14", "train.select=last")
NUM_KEPT = 5


class Replay:
    """Half of a batch is new, half is what it remembers of those before: nothing else says what comes next."""

    def __init__(self, *, seed: int, rank: int, num: int, num_steps: int) -> None:
        self.seed, self.rank, self.num, self.num_steps = seed, rank, num, num_steps
        self.ring, self.filled = torch.zeros(NUM_KEPT, 1, 28, 28), torch.zeros(NUM_KEPT, dtype=torch.bool)
        self.num_drawn, self.num_done, self.best = torch.tensor(0), torch.tensor(0), torch.tensor(-torch.inf)

    def batches(self, *, epoch: int, start_step: int) -> Iterator[dict[str, torch.Tensor]]:
        for _ in range(start_step, self.num_steps):
            chance = torch.Generator().manual_seed(1000 * self.seed + 100 * self.rank + int(self.num_drawn))
            x_BCHW = torch.randn(self.num, 1, 28, 28, generator=chance)
            at = int(self.num_drawn) % NUM_KEPT
            x_BCHW[:NUM_KEPT][self.filled] = self.ring[self.filled]
            self.ring[at], self.filled[at] = x_BCHW[-1] + int(self.num_done), True
            self.num_drawn += 1
            yield {"input": x_BCHW, "label": torch.randint(10, (self.num,), generator=chance)}

    def after(self, step: int) -> None:
        self.num_done.fill_(step)

    def tensors(self) -> dict[str, torch.Tensor]:
        owned = ("ring", "filled", "num_drawn", "num_done", "best")
        return {name: getattr(self, name) for name in owned}

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for name, mine in self.tensors().items():
            mine.copy_(tensors[name])


class Remembering:
    """Classification, fed by a `Replay`."""

    def __init__(self) -> None:
        self.fed: list[Replay] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(TASKS["classify"], name)

    @contextmanager
    def feed(self, train: Any, *, seed: int, batch_size: int, rank: int, world: int, **given: Any) -> Iterator[Replay]:
        assert sorted(given) == ["config", "device", "model", "teacher"]
        made = Replay(seed=seed, rank=rank, num=batch_size // world, num_steps=len(train) // batch_size)
        self.fed.append(made)
        yield made


def trained(run: Path, *overrides: str, task: Remembering | None = None, **given: Any) -> dict[str, torch.Tensor]:
    """Weights, and what the last feed owns."""
    task, recipe = task or Remembering(), make_recipe(run.parent, *SETTINGS, *overrides)
    result = fit(make_context(run, recipe, **given), make_model(recipe), task=task)
    return result.model.state_dict() | task.fed[-1].tensors()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    found = trained(tmp_path_factory.mktemp("whole") / "run")
    assert (int(found["num_drawn"]), int(found["num_done"])) == (14, 14)
    return found


@pytest.mark.parametrize("looks", [0, 2, 5, 11])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path: Path, whole: dict[str, torch.Tensor], looks: int) -> None:
    with pytest.raises(PreemptedError):
        trained(tmp_path / "run", stop=StopAt(looks))
    torch.manual_seed(99)
    assert same(trained(tmp_path / "run", resume=True), whole)


class Dying:
    """Dies when a step is done."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self, step: int, doing: str) -> None:
        if step == self.step:
            raise SystemError("a crash")


def crashed(run: Path) -> Path:
    """Where step 7 was done and step 4 is the newest checkpoint."""
    recipe = make_recipe(run.parent, *SETTINGS, "train.async_checkpoints=false")
    with pytest.raises(SystemError):
        fit(replace(make_context(run, recipe), beat=Dying(7)), make_model(recipe), task=Remembering())
    return run


def test_what_came_after_the_last_checkpoint_is_forgotten(tmp_path: Path, whole: dict[str, torch.Tensor]) -> None:
    run = crashed(tmp_path / "run")
    saved = open_checkpoint(run / "checkpoints" / "train" / "latest")
    assert saved.read("task", "rank-0/num_done").item() == saved.state.step == 4
    assert same(trained(run, resume=True), whole)


@pytest.mark.parametrize("name", ["ring", "filled", "num_drawn", "num_done"])
def test_nothing_that_it_owns_may_be_left_out(
    tmp_path: Path, whole: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    run, load = crashed(tmp_path / "run"), Replay.load
    monkeypatch.setattr(Replay, "load", lambda self, saved: load(self, saved | {name: self.tensors()[name]}))
    assert not same(trained(run, resume=True), whole)


def test_a_checkpoint_without_it_is_refused(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, *SETTINGS)
    with pytest.raises(PreemptedError):
        fit(make_context(tmp_path / "run", recipe, stop=StopAt(3)), make_model(recipe))
    with pytest.raises(PackageError, match="does not fit"):
        trained(tmp_path / "run", resume=True)


def test_what_is_tried_before_the_first_step_is_not_remembered(tmp_path: Path, whole: dict[str, torch.Tensor]) -> None:
    task, seen = Remembering(), Seen()
    assert same(trained(tmp_path / "run", "train.batch_size=auto", task=task, seen=seen), whole)
    assert "at a time: takes" in seen.notes
    assert len(task.fed) > 1, "another one fed what was tried"


def test_every_rank_goes_on_with_its_own(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, *SETTINGS, "launch.strategy=ddp")

    def work(group: Group, run: Path, **given: Any) -> dict[str, torch.Tensor]:
        task = Remembering()
        context = replace(make_context(run, recipe, **given), group=group)
        fit(context, make_model(recipe), task=task)
        return task.fed[-1].tensors()

    def both(group: Group) -> list[Any]:
        expected = work(group, tmp_path / "whole")
        with pytest.raises(PreemptedError):
            work(group, tmp_path / "half", stop=StopAt(5))
        found = work(group, tmp_path / "half", resume=True)
        return [same(found, expected), float(found["ring"].sum())]

    first, second = (each.value for each in on_ranks(2, both, timeout_s=120))
    assert first[0] is second[0] is True
    assert first[1] != second[1]
