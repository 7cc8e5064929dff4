"""Environments of gymnasium's registry: found by name, inspected, and stepped side by side.

Where an episode stands follows from the seed that it began with and the actions since: that is all that is ever kept
of one, whatever the environment holds inside.

E: episodes under way. F: numbers of an observation. T: steps of the longest episode. n: those that take a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np

from bmctl.core.columns import Episode
from bmctl.errors import DataError, DependencyError, RecipeError

if TYPE_CHECKING:
    import gymnasium

HINT = "take one with a vector of observations and discrete actions, such as CartPole-v1"


# -- one environment --------------------------------------------------------------------------------


def longest(env: str) -> int | None:
    """Steps after which its episodes end at the latest; None where there is no limit.

    Raises:
        RecipeError: The registry has no such environment.
        DependencyError: gymnasium is not installed.
    """
    steps: int | None = _registered(env).max_episode_steps
    return steps


def num_observed(column: Episode) -> int:
    """F.

    Raises:
        DataError: Its observations are no vectors.
        DependencyError: It needs what is not installed.
    """
    import gymnasium

    with _opened(column) as env:
        space = env.observation_space
        if not isinstance(space, gymnasium.spaces.Box) or len(space.shape) != 1 or space.shape[0] == 0:
            raise DataError(f"data.source.env: {column.env} shows {space}, expected a vector of numbers", hint=HINT)
        return int(space.shape[0])


def num_actions(column: Episode) -> int:
    """How many actions there are to choose from, told by 0, 1, 2, ...

    Raises:
        DataError: They are no such choice.
        DependencyError: It needs what is not installed.
    """
    import gymnasium

    with _opened(column) as env:
        space = env.action_space
        if not isinstance(space, gymnasium.spaces.Discrete) or space.start != 0:
            raise DataError(
                f"data.source.env: {column.env} takes {space}, expected discrete actions from 0 on", hint=HINT
            )
        return int(space.n)


def first_observations(column: Episode, seeds: Sequence[int] | np.ndarray) -> np.ndarray:
    """float32 [n, F]: what the episodes of these seeds begin with."""
    with Episodes(column, num=1) as episodes:
        return np.stack([episodes.begin(0, int(seed)) for seed in seeds])


def _opened(column: Episode, *, render: bool = False) -> gymnasium.Env[Any, Any]:
    """An environment of the registry, and none other: gymnasium takes ``module:Name`` as well, and imports it."""
    _registered(column.env)
    import gymnasium

    try:
        return gymnasium.make(
            column.env,
            max_episode_steps=column.max_steps,
            disable_env_checker=True,
            render_mode="rgb_array" if render else None,
        )
    except (ImportError, gymnasium.error.DependencyNotInstalled) as error:
        raise DependencyError(
            f"the environment {column.env} needs what is not installed: {error}",
            hint="install what gymnasium names for it, such as pip install 'gymnasium[box2d]'",
        ) from error


def _registered(env: str) -> gymnasium.envs.registration.EnvSpec:
    import difflib

    try:
        import gymnasium
    except ImportError as error:
        raise DependencyError(
            "environments need gymnasium, which is not installed", hint="pip install 'bmctl[rl]'"
        ) from error
    if env not in gymnasium.registry:
        close = difflib.get_close_matches(env, gymnasium.registry, n=1)
        raise RecipeError(
            f"data.source.env: gymnasium has no environment {env!r}",
            hint=f"did you mean {close[0]}?" if close else "name one of gymnasium's own, such as CartPole-v1",
        )
    return gymnasium.registry[env]


# -- episodes ---------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """What one step came to, [n] each.

    Attributes:
        rewards: float64.
        terminated: bool: the episode is over, and nothing is to be had from there on.
        truncated: bool: it was only cut off.
    """

    rewards: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray

    @property
    def over(self) -> np.ndarray:
        return self.terminated | self.truncated


class Episodes:
    """Episodes of one environment, each at its place.

    Args:
        column: Which environment, and the longest that an episode may be.
        num: E.

    Attributes:
        seeds: int64 [E], of the episodes under way.
        lengths: int64 [E], steps since they began.
        actions: int64 [E, T], taken since then.
        observations: float32 [E, F], the newest.
    """

    def __init__(self, column: Episode, *, num: int) -> None:
        self._envs = [_opened(column) for _ in range(num)]
        size = num_observed(column)
        self.seeds, self.lengths = np.zeros(num, np.int64), np.zeros(num, np.int64)
        self.actions = np.zeros((num, column.max_steps), np.int64)
        self.observations = np.zeros((num, size), np.float32)

    def begin(self, place: int, seed: int) -> np.ndarray:
        """A new episode in place of the one before; returns its first observation, float32 [F]."""
        observation, _ = self._envs[place].reset(seed=seed)
        self.seeds[place], self.lengths[place] = seed, 0
        self.actions[place] = 0
        self.observations[place] = observation
        return self.observations[place].copy()

    def step(self, places: np.ndarray, actions: np.ndarray) -> Outcome:
        """One action at each of some places; what is over is to begin anew before its next step.

        Args:
            places: int64 [n], each once.
            actions: int64 [n].
        """
        rewards = np.zeros(len(places), np.float64)
        ended = np.zeros((2, len(places)), bool)
        for i, (place, action) in enumerate(zip(places.tolist(), actions.tolist(), strict=True)):
            observation, reward, ended[0, i], ended[1, i], _ = self._envs[place].step(action)
            rewards[i] = reward
            self.observations[place] = observation
            self.actions[place, self.lengths[place]] = action
            self.lengths[place] += 1
        return Outcome(rewards, *ended)

    def replay(self, seeds: np.ndarray, lengths: np.ndarray, actions: np.ndarray, observations: np.ndarray) -> None:
        """Bring every place where another one's attributes say that it stood.

        Raises:
            ValueError: The same seed and actions lead to another observation now.
        """
        for place in range(len(self._envs)):
            self.begin(place, int(seeds[place]))
            for action in actions[place, : lengths[place]]:
                self.step(np.array([place]), np.array([action]))
        if not np.array_equal(self.observations, observations):
            raise ValueError("the environment does not go the same way again from the same seed with the same actions")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for env in self._envs:
            env.close()


def frames(column: Episode, *, seed: int, actions: Sequence[int]) -> tuple[list[np.ndarray], float]:
    """uint8 [H, W, 3] of an episode's beginning and of every step, and how many of them are a second.

    Raises:
        DataError: The environment draws no pictures.
        DependencyError: It draws them with what is not installed.
    """
    import gymnasium

    try:
        with _opened(column, render=True) as env:
            env.reset(seed=seed)
            found = [env.render()]
            for action in actions:
                env.step(action)
                found.append(env.render())
            rate = float(env.metadata.get("render_fps") or 30)
    except (ImportError, gymnasium.error.DependencyNotInstalled) as error:
        raise DependencyError(
            f"the pictures of {column.env} need what is not installed: {error}",
            hint="pip install 'gymnasium[classic-control]', or play without a film",
        ) from error
    if not all(isinstance(frame, np.ndarray) and frame.ndim == 3 for frame in found):
        raise DataError(f"{column.env} draws no pictures", hint="play without a film")
    return [np.asarray(frame, np.uint8) for frame in found], rate
