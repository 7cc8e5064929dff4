"""Environments by name, and where an episode stands, by its seed and its actions alone."""

from __future__ import annotations

import sys

import gymnasium
import numpy as np
import pytest
from tests.environments import CARTPOLE, CORRIDOR

from bmctl.core.columns import Episode
from bmctl.core.environments import Episodes, first_observations, frames, longest, num_actions, num_observed
from bmctl.errors import BmctlError, DataError, DependencyError, RecipeError

RNG = np.random.default_rng(0)
OTHERS = (Episode("Acrobot-v1", 500), Episode("MountainCar-v0", 200))
NAMES = ("seeds", "lengths", "actions", "observations")


def play(episodes: Episodes, *, steps: int, seed: int) -> list[np.ndarray]:
    """At random; what is over begins anew. Returns all that was seen."""
    rng, seen = np.random.default_rng(seed), []
    places = np.arange(len(episodes.seeds))
    for _ in range(steps):
        outcome = episodes.step(places, rng.integers(0, 2, len(places)))
        seen += [episodes.observations.copy(), outcome.rewards, outcome.terminated, outcome.truncated]
        for place in np.flatnonzero(outcome.over).tolist():
            episodes.begin(place, int(rng.integers(0, 1000)))
    return seen


@pytest.mark.parametrize("column", [CARTPOLE, CORRIDOR, *OTHERS], ids=lambda column: column.env)
def test_an_episode_goes_on_from_its_seed_and_its_actions(column: Episode) -> None:
    with Episodes(column, num=3) as whole, Episodes(column, num=3) as again:
        for place in range(3):
            whole.begin(place, 10 + place)
        play(whole, steps=37, seed=1)
        again.replay(**{name: getattr(whole, name).copy() for name in NAMES})
        assert all(np.array_equal(getattr(again, name), getattr(whole, name)) for name in NAMES)
        assert whole.lengths.max() > 0
        first, second = (play(each, steps=40, seed=2) for each in (whole, again))
    assert all(np.array_equal(one, other) for one, other in zip(first, second, strict=True))


def test_an_environment_with_luck_of_its_own_cannot_be_gone_on_with() -> None:
    column = Episode("Moody-v0", 30)
    with Episodes(column, num=1) as whole, Episodes(column, num=1) as again:
        whole.begin(0, 1)
        with pytest.raises(ValueError, match="does not go the same way"):
            again.replay(**{name: getattr(whole, name) for name in NAMES})


def test_it_is_gymnasiums_own_environment() -> None:
    env = gymnasium.make("CartPole-v1")
    expected = [env.reset(seed=seed)[0] for seed in (7, 2**31 - 1)]
    assert np.array_equal(first_observations(CARTPOLE, [7, 2**31 - 1]), expected)
    assert (num_observed(CARTPOLE), num_actions(CARTPOLE), longest("CartPole-v1")) == (4, 2, 500)
    with Episodes(CARTPOLE, num=1) as episodes:
        episodes.begin(0, 7)
        env.reset(seed=7)
        for action in (1, 1, 0, 1):
            outcome = episodes.step(np.array([0]), np.array([action]))
            observation, reward, *ended, _ = env.step(action)
            assert np.array_equal(episodes.observations[0], observation)
            assert [outcome.rewards[0], outcome.terminated[0], outcome.truncated[0]] == [reward, *ended]


def test_a_limit_cuts_off_and_does_not_end() -> None:
    with Episodes(Episode("CartPole-v1", 3), num=1) as episodes:
        episodes.begin(0, 0)
        found = [episodes.step(np.array([0]), np.array([action])) for action in (0, 1, 0)]
    assert [bool(one.over[0]) for one in found] == [False, False, True]
    assert found[-1].truncated[0] and not found[-1].terminated[0]


@pytest.mark.parametrize(
    ("env", "ask", "error", "said"),
    [
        ("CartPole-v7", longest, RecipeError, "no environment 'CartPole-v7'"),
        ("this:CartPole-v1", num_actions, RecipeError, "no environment 'this:CartPole-v1'"),
        ("MountainCarContinuous-v0", num_actions, DataError, r"takes Box\(.*expected discrete"),
        ("Shifted-v0", num_actions, DataError, r"takes Discrete\(2, start=1\)"),
        ("FrozenLake-v1", num_observed, DataError, r"shows Discrete\(16\), expected a vector"),
        ("Pixels-v0", num_observed, DataError, r"shows Box\(0, 255, \(8, 8, 3\)"),
        ("Reacher-v2", num_actions, DependencyError, "Reacher-v2 needs what is not installed"),
    ],
)
def test_what_cannot_be_played_is_refused(env: str, ask, error: type[BmctlError], said: str) -> None:
    with pytest.raises(error, match=said) as caught:
        ask(env if ask is longest else Episode(env, 10))
    assert caught.value.hint


def test_a_module_in_a_name_is_never_imported() -> None:
    assert "this" not in sys.modules
    with pytest.raises(RecipeError):
        num_observed(Episode("this:CartPole-v1", 10))
    assert "this" not in sys.modules


def test_without_gymnasium(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(DependencyError) as caught:
        longest("CartPole-v1")
    assert caught.value.hint == "pip install 'bmctl[rl]'"


def test_pictures_of_an_episode() -> None:
    found, rate = frames(CORRIDOR, seed=3, actions=[1, 1, 0])
    assert (len(found), found[0].shape, rate) == (4, (4, 6, 3), 50.0)
    assert found[0][0, 0].tolist() == [255] * 3


def test_pictures_that_need_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pygame", None)
    with pytest.raises(DependencyError, match="the pictures of CartPole-v1 need") as caught:
        frames(CARTPOLE, seed=0, actions=[])
    assert "classic-control" in caught.value.hint
