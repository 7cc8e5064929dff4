"""A replay memory: a ring of transitions, drawn alike or by how much they surprised.

M: places. n: transitions. F: numbers of an observation. A: actions.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

LEAST_ERROR = 1e-3
"""So that what was expected exactly is drawn again now and then."""


@dataclass
class Memory:
    """Transitions on the CPU; past the last place the oldest give way.

    Attributes:
        num_places: M.
        size: F.
        observations: float32 [M, F], before the action.
        next_observations: float32 [M, F], after it.
        actions: int64 [M].
        rewards: float32 [M].
        goes_on: float32 [M]: 0 where the episode ended there for good, so that nothing is to be had beyond.
        is_last: bool [M]: of its episode, ended or cut off.
        priorities: float64 [M], 0 where there is nothing yet.
        num_added: int64 [], ever.
    """

    num_places: int
    size: int
    observations: torch.Tensor = field(init=False)
    next_observations: torch.Tensor = field(init=False)
    actions: torch.Tensor = field(init=False)
    rewards: torch.Tensor = field(init=False)
    goes_on: torch.Tensor = field(init=False)
    is_last: torch.Tensor = field(init=False)
    priorities: torch.Tensor = field(init=False)
    num_added: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.observations = torch.zeros(self.num_places, self.size)
        self.next_observations = torch.zeros(self.num_places, self.size)
        self.actions = torch.zeros(self.num_places, dtype=torch.int64)
        self.rewards, self.goes_on = torch.zeros(self.num_places), torch.zeros(self.num_places)
        self.is_last = torch.ones(self.num_places, dtype=torch.bool)
        self.priorities = torch.zeros(self.num_places, dtype=torch.float64)
        self.num_added = torch.tensor(0)

    def __len__(self) -> int:
        """Transitions that are remembered."""
        return min(int(self.num_added), self.num_places)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that it holds, by name: the very tensors."""
        names = (
            "observations", "next_observations", "actions", "rewards", "goes_on", "is_last", "priorities", "num_added",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}

    def add(
        self,
        observations: torch.Tensor,
        actions: torch.Tensor,
        rewards: torch.Tensor,
        next_observations: torch.Tensor,
        goes_on: torch.Tensor,
        is_last: torch.Tensor,
    ) -> None:
        """n transitions, n at most M; as likely to be drawn as the likeliest one so far.

        Of environments side by side it is always as many, in the same order: so later steps of one are found.
        """
        places = (int(self.num_added) + torch.arange(len(actions))) % self.num_places
        self.observations[places], self.next_observations[places] = observations, next_observations
        self.actions[places], self.rewards[places] = actions, rewards.float()
        self.goes_on[places], self.is_last[places] = goes_on.float(), is_last
        self.priorities[places] = float(self.priorities.max()) or 1.0
        self.num_added += len(actions)

    def draw(self, num: int, *, generator: torch.Generator) -> torch.Tensor:
        """int64 [num]: places, each of what is remembered as likely as the other."""
        return torch.randint(len(self), (num,), generator=generator)

    def draw_by_priority(self, num: int, *, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """int64 [num] places, and float64 [num] with what probability each of them was drawn.

        The range of all priorities is cut into `num` equal parts, and one number drawn from each.
        """
        ends = self.priorities[: len(self)].cumsum(0)
        drawn = (torch.arange(num) + torch.rand(num, generator=generator, dtype=torch.float64)) / num * ends[-1]
        places = torch.searchsorted(ends, drawn, right=True).clamp_(max=len(self) - 1)
        return places, self.priorities[places] / ends[-1]

    def ahead(
        self, places: torch.Tensor, *, steps: int, num_envs: int, gamma: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Up to so many steps from each place on, fewer where the episode or the memory ends before.

        Args:
            places: int64 [n].
            steps: At least 1.
            num_envs: Transitions that lie between a step of an episode and its next one.
            gamma: What a reward is worth one step later.

        Returns:
            Sum of the rewards as of the first step, float32 [n]; what a return from beyond the last step is worth,
            0 where there is none, float32 [n]; the places of these last steps, int64 [n].
        """
        rewards, worth = self.rewards[places].clone(), torch.full((len(places),), gamma)
        newest = (int(self.num_added) - 1 - places) % self.num_places < num_envs
        for _ in range(steps - 1):
            goes = ~(self.is_last[places] | newest)
            places = torch.where(goes, (places + num_envs) % self.num_places, places)
            newest = (int(self.num_added) - 1 - places) % self.num_places < num_envs
            rewards += torch.where(goes, worth * self.rewards[places], 0.0)
            worth = torch.where(goes, worth * gamma, worth)
        return rewards, worth * self.goes_on[places], places

    def set_priorities(self, places: torch.Tensor, errors: torch.Tensor, *, alpha: float) -> None:
        """By the TD errors [n] of transitions that were drawn."""
        self.priorities[places] = (errors.double().abs() + LEAST_ERROR) ** alpha


def weights(probabilities: torch.Tensor, *, num: int, beta: float) -> torch.Tensor:
    """float32 [n]: what makes up for drawing some more often than others, the largest 1.

    Args:
        probabilities: float64 [n].
        num: Of transitions that could be drawn.
        beta: 1 makes up for all of it, 0 for nothing.
    """
    found = (num * probabilities) ** -beta
    return (found / found.max()).float()


def goals(rewards: torch.Tensor, worth: torch.Tensor, *, judged: torch.Tensor, chosen_by: torch.Tensor) -> torch.Tensor:
    """[n]: the rewards, and what the best action after them is worth.

    Args:
        rewards: [n].
        worth: [n], what a return from there on is worth now; 0 where nothing comes after.
        judged: [n, A], the target network's values of the observations after them.
        chosen_by: [n, A], values whose best action is taken: the model's (double) or the target network's own.
    """
    best = judged.gather(1, chosen_by.argmax(dim=1, keepdim=True))[:, 0]
    return rewards + worth * best
