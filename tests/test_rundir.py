"""Who may write to a run: one process, or the machines of one job, which brought the same recipe."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest

from bmctl import rundir
from bmctl.errors import RecipeError, ResourceError, UsageError
from bmctl.recipe import Recipe, load_recipe

RECIPE = """
name: small
model: {name: "bmctl:mlp"}
data: {source: {kind: bundled}}
train: {epochs: 3}
"""
MANY = ("launch.nodes={min: 1, max: 2}", "launch.rendezvous=127.0.0.1:1234")


def recipe(folder: Path, *overrides: str) -> Recipe:
    path = folder / "r.yaml"
    path.write_text(RECIPE)
    return load_recipe(path, overrides=overrides)


def test_one_machine_has_the_run_alone(tmp_path: Path) -> None:
    run, mine = tmp_path / "run", recipe(tmp_path)
    with rundir.opened(run, mine) as owns:
        assert owns
        assert rundir.is_run(run)
        with pytest.raises(ResourceError, match="in use by another bmctl"), rundir.opened(run, mine):
            pass


def test_machines_of_one_job_share_it(tmp_path: Path) -> None:
    run, mine = tmp_path / "run", recipe(tmp_path, *MANY)
    with rundir.opened(run, mine) as first, rundir.opened(run, mine) as second:
        assert first
        assert not second
    with rundir.opened(run, recipe(tmp_path, *MANY, "train.epochs=5")) as owns:
        assert owns, "the next job may say something else"


def test_another_recipe_may_not_join(tmp_path: Path) -> None:
    run, other = tmp_path / "run", recipe(tmp_path, *MANY, "seed=7")
    with (
        rundir.opened(run, recipe(tmp_path, *MANY)),
        pytest.raises(RecipeError, match="it says seed: 0, this one seed: 7") as caught,
        rundir.opened(run, other),
    ):
        pass
    assert caught.value.exit_code == 3
    assert "seed: 0" in (run / "recipe.yaml").read_text()


def test_a_command_of_one_machine_may_not_join(tmp_path: Path, monkeypatch) -> None:
    run = tmp_path / "run"
    with (
        rundir.opened(run, recipe(tmp_path, *MANY)),
        pytest.raises(ResourceError, match="in use"),
        rundir.opened(run, recipe(tmp_path)),
    ):
        pass
    monkeypatch.setattr(rundir, "BEGIN_S", 0.2)
    with (
        rundir.opened(run, recipe(tmp_path)),
        pytest.raises(ResourceError, match="in use"),
        rundir.opened(run, recipe(tmp_path, *MANY)),
    ):
        pass


def test_what_another_machine_has_just_begun_is_no_strange_directory(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / ".lock").touch()
    with rundir.opened(run, recipe(tmp_path, *MANY)) as owns:
        assert owns
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "thesis.tex").touch()
    for overrides in ((), MANY):
        with pytest.raises(UsageError, match="is not a run"), rundir.opened(strange, recipe(tmp_path, *overrides)):
            pass


def test_a_lock_of_the_dead_counts_for_nothing(tmp_path: Path) -> None:
    run, mine = tmp_path / "run", recipe(tmp_path, *MANY)
    with rundir.opened(run, mine):
        pass
    with (run / ".lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
