"""Batches for Q-learning: the model plays, a memory keeps what happened, a target network says what it led to.

What decides the next batch is all in `tensors`: memory, target network, generator, and where each episode stands.

n: transitions of a batch. E: environments. F: numbers of an observation. A: actions.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from torch import nn

from bmctl.core.calling import call
from bmctl.core.chance import hash_integers
from bmctl.core.environments import Episodes
from bmctl.core.layers import evaluating
from bmctl.errors import UnsupportedError
from bmctl.tasks.dqn.memory import Memory, goals, weights
from bmctl.tasks.dqn.play import column_of
from bmctl.tasks.dqn.spec import GIVES, Config, Facts

TRAINING_SEEDS = 2**30
"""Episodes of training begin with seeds below; validation and test have those above (sources/gymnasium.py)."""
_FEED = 12
"""Tells the generator's seed from others."""


@contextmanager
def open_playing(
    facts: Facts,
    *,
    config: Config,
    model: nn.Module,
    is_new: bool,
    seed: int,
    num: int,
    rank: int,
    device: torch.device,
) -> Iterator[Playing]:
    """Args:
        facts: The environment.
        config: The task's.
        model: Plays as it is at each step.
        is_new: Whether it has yet to learn: else it explores no more than at the end.
        seed: Of episodes, exploration and what is drawn.
        num: n, of this process.
        rank: Of this process, which plays episodes of its own.
        device: Where the model is.

    Raises:
        UnsupportedError: The model is in parts.
    """
    if any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
        raise UnsupportedError(
            "dqn plays in each process with the whole model, and here each holds a part of it (fsdp)",
            hint="--set launch.strategy=ddp",
        )
    with Episodes(column_of(facts), num=config.num_envs) as episodes:
        yield Playing(
            episodes,
            config=config,
            model=model,
            is_new=is_new,
            num_actions=facts.num_actions,
            seed=int(hash_integers(np.array([rank]), keys=(_FEED, seed))[0] >> np.uint64(1)),
            num=num,
            device=device,
        )


class Playing:
    """See tasks.Feed."""

    def __init__(
        self,
        episodes: Episodes,
        *,
        config: Config,
        model: nn.Module,
        is_new: bool,
        num_actions: int,
        seed: int,
        num: int,
        device: torch.device,
    ) -> None:
        self._episodes, self._config, self._model, self._device = episodes, config, model, device
        self._is_new, self._num_actions, self._num = is_new, num_actions, num
        self._target = copy.deepcopy(model).eval().requires_grad_(False)
        theirs = model.state_dict()
        self._pairs = [(tensor, theirs[name]) for name, tensor in self._target.state_dict().items()]
        self._generator = torch.Generator().manual_seed(seed)
        self._num_steps = torch.tensor(0)
        num_envs, size = episodes.observations.shape
        self.memory = Memory(max(config.memory, num_envs), size)
        for place in range(num_envs):
            self._begin(place)

    # -- the feed --

    def batches(self, *, epoch: int, start_step: int) -> Iterator[dict[str, torch.Tensor]]:
        for _ in range(start_step, self._config.epoch_steps):
            while int(self.memory.num_added) < max(self._config.warmup, 1):
                self._play()
            for _ in range(self._config.play_steps):
                self._play()
            yield {name: tensor.to(self._device) for name, tensor in self._draw().items()}

    def after(self, step: int) -> None:
        self._num_steps.fill_(step)
        if step % self._config.target_every == 0:
            self._follow()

    def tensors(self) -> dict[str, torch.Tensor]:
        parts = {"memory": self.memory.tensors(), "episodes": self._standing(), "target": self._target.state_dict()}
        named = {f"{part}/{name}": tensor for part, found in parts.items() for name, tensor in found.items()}
        return named | {"generator": self._generator.get_state(), "num_steps": self._num_steps}

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        mine = self.tensors()
        if mine.keys() != tensors.keys():
            raise ValueError(f"expected {', '.join(sorted(mine.keys() ^ tensors.keys()))} in both or in none")
        for name, tensor in mine.items():
            if tensor.shape != tensors[name].shape:
                raise ValueError(f"{name} is {list(tensors[name].shape)}, expected {list(tensor.shape)}")
        for name in self._standing():
            del mine[f"episodes/{name}"]
        self._generator.set_state(tensors["generator"])
        del mine["generator"]
        for name, tensor in mine.items():
            tensor.copy_(tensors[name])
        self._episodes.replay(**{name: tensors[f"episodes/{name}"].numpy() for name in self._standing()})

    def _standing(self) -> dict[str, torch.Tensor]:
        """Where each episode stands: what `Episodes.replay` asks for."""
        names = ("seeds", "lengths", "actions", "observations")
        return {name: torch.from_numpy(getattr(self._episodes, name)) for name in names}

    # -- playing --

    def _begin(self, place: int) -> None:
        self._episodes.begin(place, int(torch.randint(TRAINING_SEEDS, (), generator=self._generator)))

    def _play(self) -> None:
        """One step of every environment."""
        before = torch.from_numpy(self._episodes.observations.copy())
        actions = self._act(before)
        outcome = self._episodes.step(np.arange(len(before)), actions.numpy())
        self.memory.add(
            before,
            actions,
            torch.from_numpy(outcome.rewards),
            torch.from_numpy(self._episodes.observations),
            torch.from_numpy(~outcome.terminated),
            torch.from_numpy(outcome.over),
        )
        for place in np.flatnonzero(outcome.over).tolist():
            self._begin(place)

    def _act(self, observations: torch.Tensor) -> torch.Tensor:
        """int64 [E]: the best actions, some of them drawn at random instead."""
        num = len(observations)
        best = self._values(self._model, observations).argmax(dim=1).cpu()
        explores = torch.rand(num, generator=self._generator) < self._exploration()
        return torch.where(explores, torch.randint(self._num_actions, (num,), generator=self._generator), best)

    def _exploration(self) -> float:
        """Share of actions that are drawn at random, now."""
        plan = self._config.exploration
        return _line(plan.start, plan.end, step=int(self._num_steps), steps=plan.steps) if self._is_new else plan.end

    def _values(self, model: nn.Module, observations: torch.Tensor) -> torch.Tensor:
        """float32 [n, A], on the device."""
        with torch.no_grad(), evaluating(model) if model.training else nullcontext():
            return call(model, [observations.to(self._device)], gives=GIVES)[GIVES[0]].float()

    # -- learning --

    def _draw(self) -> dict[str, torch.Tensor]:
        """``observation`` [n, F], ``action``, ``goal`` and ``weight`` [n]; what was drawn gets its new priority."""
        config, memory, asked = self._config, self.memory, self._config.prioritised
        if asked is None:
            places, weight = memory.draw(self._num, generator=self._generator), torch.ones(self._num)
        else:
            places, probabilities = memory.draw_by_priority(self._num, generator=self._generator)
            beta = _line(asked.beta, 1.0, step=int(self._num_steps), steps=asked.steps)
            weight = weights(probabilities, num=len(memory), beta=beta)
        rewards, worth, ends = memory.ahead(places, steps=config.n_step, num_envs=config.num_envs, gamma=config.gamma)
        after, actions = memory.next_observations[ends], memory.actions[places]
        judged = self._values(self._target, after)
        goal = goals(
            rewards.to(self._device),
            worth.to(self._device),
            judged=judged,
            chosen_by=self._values(self._model, after) if config.double else judged,
        )
        if asked is not None:
            values = self._values(self._model, memory.observations[places])
            errors = (goal - values.gather(1, actions[:, None].to(self._device))[:, 0]).cpu()
            memory.set_priorities(places, errors, alpha=asked.alpha)
        return {"observation": memory.observations[places], "action": actions, "goal": goal, "weight": weight}

    def _follow(self) -> None:
        """The target network goes its part of the way to the model."""
        for mine, theirs in self._pairs:
            if mine.is_floating_point():
                mine.lerp_(theirs, self._config.tau)
            else:
                mine.copy_(theirs)


def _line(start: float, end: float, *, step: int, steps: int) -> float:
    """From `start` to `end` in so many steps, and no further."""
    return end + (start - end) * max(0.0, 1 - step / steps) if steps else end
