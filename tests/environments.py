"""Small environments, registered for tests, and the policy of one of them."""

from __future__ import annotations

import random
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from bmctl.core.columns import Episode
from bmctl.tasks.dqn import Facts

LENGTH = 5
CARTPOLE = Episode("CartPole-v1", 500)
CORRIDOR = Episode("Corridor-v0", 30)


class Corridor(gymnasium.Env):
    """From one end to the other: 1 goes on, 0 goes back, and one step in five slips. Pictures are four pixels high."""

    observation_space = spaces.Box(-1, 1, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": 50}

    def seen(self) -> np.ndarray:
        return np.array([self.place / LENGTH, self.np_random.uniform(-1, 1)], np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.place = 0
        return self.seen(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        goes = 2 * action - 1
        self.place = max(0, self.place + (-goes if self.np_random.random() < 0.2 else goes))
        over = self.place >= LENGTH
        return self.seen(), 10.0 if over else -0.5, over, False, {}

    def render(self) -> np.ndarray:
        picture = np.zeros((4, LENGTH + 1, 3), np.uint8)
        picture[:, self.place] = 255
        return picture


class Moody(Corridor):
    """It has luck of its own, which no seed tells."""

    def seen(self) -> np.ndarray:
        return np.array([self.place / LENGTH, random.SystemRandom().uniform(-1, 1)], np.float32)


class Pixels(Corridor):
    """It shows a picture."""

    observation_space = spaces.Box(0, 255, (8, 8, 3), np.uint8)


class Shifted(Corridor):
    """Its actions are told by 1 and 2."""

    action_space = spaces.Discrete(2, start=1)


for made in (Corridor, Moody, Pixels, Shifted):
    gymnasium.register(f"{made.__name__}-v0", entry_point=made, max_episode_steps=30)


def facts_of(column: Episode) -> Facts:
    return Facts(env=column.env, max_steps=column.max_steps, num_actions=2)
