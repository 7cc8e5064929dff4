"""Episodes played to their ends, side by side: greedily by whatever runs the model, or at random.

n: episodes. F: numbers of an observation. A: actions. T: steps of the longest episode.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image

from bmctl.core.chance import hash_integers
from bmctl.core.columns import Episode
from bmctl.core.environments import Episodes, frames
from bmctl.core.runner import Runner
from bmctl.errors import DivergedError
from bmctl.tasks.dqn.spec import Facts

Act = Callable[[np.ndarray, np.ndarray, int], np.ndarray]
"""Actions int64 [n] for observations float32 [n, F] of the episodes of these seeds [n], after so many steps."""

ROWS = 64
"""Of every call in an evaluation: products of other sizes may round otherwise, and one action changes all after it."""

MOST_FPS = 25
_RANDOM = 11
"""Tells these random numbers from others."""


class Played(NamedTuple):
    """Attributes:
    returns: float64 [n], sums of rewards.
    lengths: int64 [n], in steps.
    actions: int64 [n, T].
    """

    returns: np.ndarray
    lengths: np.ndarray
    actions: np.ndarray


def column_of(facts: Facts) -> Episode:
    return Episode(facts.env, facts.max_steps)


def play(act: Act, seeds: np.ndarray, *, facts: Facts) -> Played:
    """The episodes of these seeds, each to its end."""
    returns = np.zeros(len(seeds), np.float64)
    with Episodes(column_of(facts), num=len(seeds)) as episodes:
        for place, seed in enumerate(seeds.tolist()):
            episodes.begin(place, seed)
        left, time = np.arange(len(seeds)), 0
        while len(left):
            outcome = episodes.step(left, act(episodes.observations[left], seeds[left], time))
            returns[left] += outcome.rewards
            left, time = left[~outcome.over], time + 1
        return Played(returns, episodes.lengths, episodes.actions)


def values(runner: Runner, observations: np.ndarray) -> np.ndarray:
    """[n, A]: what the model says of each action.

    Raises:
        DivergedError: A value is nan or infinite.
    """
    (taken,), (given, *_) = runner.signature.inputs, runner.signature.outputs
    found = runner.run({taken.name: observations})[given.name]
    if not np.isfinite(found).all():
        raise DivergedError("the model's outputs hold nan or inf", hint="bmctl evaluate tells which stage broke it")
    return found


def greedy(runner: Runner, *, rows: int | None = None) -> Act:
    """The action that is worth most, the first of equals.

    Args:
        runner: Takes any number of samples.
        rows: Of each call, filled up where there are fewer; None makes one call as large as it has to be.
    """

    def act(observations: np.ndarray, seeds: np.ndarray, time: int) -> np.ndarray:
        num = len(observations)
        size = rows or num
        filled = np.resize(observations, (-(-num // size) * size, *observations.shape[1:]))
        calls = [values(runner, filled[start : start + size]) for start in range(0, len(filled), size)]
        return np.concatenate(calls)[:num].argmax(axis=1)

    return act


@lru_cache(maxsize=8)
def random_return(facts: Facts, seeds: tuple[int, ...]) -> float:
    """The mean return of actions drawn at random, by the seeds of the episodes."""

    def act(observations: np.ndarray, seeds: np.ndarray, time: int) -> np.ndarray:
        return (hash_integers(seeds, keys=(_RANDOM, time)) % np.uint64(facts.num_actions)).astype(np.int64)

    return float(play(act, np.array(seeds), facts=facts).returns.mean())


def film(runner: Runner, seed: int, *, facts: Facts) -> bytes:
    """An animated GIF of one episode, as fast as it is, of at most MOST_FPS pictures a second.

    Raises:
        DataError: The environment draws no pictures.
        DependencyError: It draws them with what is not installed.
    """
    played = play(greedy(runner), np.array([seed]), facts=facts)
    actions = played.actions[0, : played.lengths[0]].tolist()
    found, rate = frames(column_of(facts), seed=seed, actions=actions)
    every = max(1, round(rate / MOST_FPS))
    first, *others = [Image.fromarray(frame) for frame in found[::every]]
    file = io.BytesIO()
    first.save(file, "GIF", save_all=True, append_images=others, duration=round(1000 * every / rate), loop=0)
    return file.getvalue()
