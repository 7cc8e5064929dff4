"""What a recipe may say of Q-learning, and what a manifest keeps of the environment."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from bmctl.schema import Count, Positive, Ratio, Strict

GIVES = ("values",)
SEED = "seed"

Steps = Annotated[int, Field(ge=0, le=2**31 - 1)]


class Exploration(Strict):
    """How often an action is drawn at random: from `start` down to `end` in a straight line.

    Attributes:
        steps: Optimizer steps until `end`.
    """

    start: Ratio = 1.0
    end: Ratio = 0.05
    steps: Steps = 5_000


class Prioritised(Strict):
    """What surprised more is remembered more often.

    Attributes:
        alpha: How much more: transitions are drawn in proportion to the size of their TD error to this power.
        beta: How far weights in the loss make up for that, at first.
        steps: Optimizer steps until they make up for all of it.
    """

    alpha: Ratio = 0.6
    beta: Ratio = 0.4
    steps: Steps = 20_000


class Config(Strict):
    """Attributes:
    double: The model chooses the action that the target network judges; without, that one does both.
    prioritised: None draws from all that is remembered alike.
    gamma: What a reward is worth one step later.
    n_step: Rewards that count as they came, before the target network says what is left to expect.
    huber: TD errors count by their square up to here, by their size beyond.
    num_envs: Environments that each process plays side by side.
    play_steps: Steps of each of them between two optimizer steps.
    memory: Transitions that each process remembers.
    warmup: Transitions before the first optimizer step.
    target_every: Optimizer steps after which the target network follows the model.
    tau: How far it follows: 1 is the whole way.
    epoch_steps: Optimizer steps that count as an epoch.
    """

    kind: Literal["dqn"] = "dqn"
    double: bool = True
    prioritised: Prioritised | None = None
    gamma: Ratio = 0.99
    n_step: Annotated[int, Field(ge=1, le=1000)] = 1
    huber: Positive = 1.0
    exploration: Exploration = Exploration()
    num_envs: Annotated[int, Field(ge=1, le=4096)] = 8
    play_steps: Annotated[int, Field(ge=1, le=4096)] = 1
    memory: Annotated[int, Field(ge=1, le=50_000_000)] = 50_000
    warmup: Steps = 1_000
    target_every: Count = 250
    tau: Annotated[float, Field(gt=0, le=1)] = 1.0
    epoch_steps: Count = 1_000


class Facts(Strict):
    """Attributes:
    env: Name in gymnasium's registry.
    max_steps: Of an episode.
    num_actions: A.
    """

    kind: Literal["dqn"] = "dqn"
    env: str
    max_steps: Count
    num_actions: Count
