"""The feed of dqn: what it owns decides every batch to come, and nothing else does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import pytest
import torch
from tests.environments import CARTPOLE, CORRIDOR, facts_of

from bmctl.core.columns import Episode
from bmctl.errors import UnsupportedError
from bmctl.models.own.networks import MLP
from bmctl.tasks import Feed
from bmctl.tasks.dqn import Config
from bmctl.tasks.dqn.playing import TRAINING_SEEDS, Playing, open_playing

PLAN = {"epoch_steps": 40, "warmup": 16, "num_envs": 3, "memory": 50, "target_every": 4, "exploration": {"steps": 30}}


def network(size: int, *, seed: int = 0) -> MLP:
    torch.manual_seed(seed)
    return MLP(num_inputs=size, num_classes=2, hidden=(8,))


@contextmanager
def opened(
    column: Episode = CORRIDOR,
    *,
    model: MLP | None = None,
    seed: int = 0,
    rank: int = 0,
    is_new: bool = True,
    **plan: Any,
) -> Iterator[Playing]:
    size = {"Corridor-v0": 2, "CartPole-v1": 4}[column.env]
    given = {"model": model or network(size), "is_new": is_new, "seed": seed, "num": 6, "rank": rank}
    config = Config.model_validate(PLAN | plan)
    with open_playing(facts_of(column), config=config, device=torch.device("cpu"), **given) as feed:
        yield feed


def learn(feed: Feed, model: MLP, *, first: int, last: int) -> list[dict[str, torch.Tensor]]:
    """Steps of which each changes the model as its batch says."""
    seen = []
    for step, batch in enumerate(islice(feed.batches(epoch=0, start_step=first), last - first), start=first + 1):
        with torch.no_grad():
            for weight in model.parameters():
                weight += 1e-3 * torch.sin(batch["goal"].sum() + batch["observation"].sum())
        feed.after(step)
        seen.append({name: tensor.clone() for name, tensor in batch.items()})
    return seen


def same(first: Any, second: Any) -> bool:
    pairs = list(zip(first, second, strict=True))
    return all(one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one) for one, two in pairs)


@pytest.mark.parametrize("plan", [{}, {"prioritised": {"steps": 30}}, {"double": False, "tau": 0.3, "n_step": 3}])
@pytest.mark.parametrize("column", [CORRIDOR, CARTPOLE], ids=lambda column: column.env)
def test_another_one_goes_on_from_what_it_owns(column: Episode, plan: Mapping[str, Any]) -> None:
    model = network(4 if column is CARTPOLE else 2)
    with opened(column, model=model, **plan) as feed:
        before = learn(feed, model, first=0, last=9)
        saved = {name: tensor.clone() for name, tensor in feed.tensors().items()}
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        after = learn(feed, model, first=9, last=30)
    again = network(4 if column is CARTPOLE else 2, seed=5)
    again.load_state_dict(weights)
    with opened(column, model=again, **plan) as feed:
        feed.load(saved)
        torch.manual_seed(77)
        assert same(learn(feed, again, first=9, last=30), after)
    assert not same(before[:1], after[:1])


OWNED = (
    "generator",
    "num_steps",
    "memory/observations",
    "memory/is_last",
    "memory/priorities",
    "episodes/seeds",
    "target/layers.1.weight",
)


@pytest.mark.parametrize("name", OWNED)
def test_all_of_it_is_needed(name: str) -> None:
    plan = {"prioritised": {"steps": 30}, "n_step": 2}
    model = network(2)
    with opened(model=model, **plan) as feed:
        learn(feed, model, first=0, last=9)
        saved = {key: tensor.clone() for key, tensor in feed.tensors().items()}
        weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        after = learn(feed, model, first=9, last=30)
    again = network(2)
    again.load_state_dict(weights)
    with opened(model=again, **plan) as feed:
        own = feed.tensors()[name].clone()
        try:
            feed.load(saved | {name: own})
        except ValueError as error:
            assert name.startswith("episodes/") and "does not go the same way" in str(error)
            return
        assert not same(learn(feed, again, first=9, last=30), after)


def test_what_does_not_fit_is_refused() -> None:
    with opened() as feed:
        saved = feed.tensors()
        with pytest.raises(ValueError, match="expected memory/actions in both"):
            feed.load({name: tensor for name, tensor in saved.items() if name != "memory/actions"})
        with pytest.raises(ValueError, match=r"memory/actions is \[7\], expected \[50\]"):
            feed.load(saved | {"memory/actions": torch.zeros(7, dtype=torch.int64)})
        with pytest.raises(ValueError):
            feed.load({})


def test_seed_and_rank_decide() -> None:
    def first(**given: int) -> list[dict[str, torch.Tensor]]:
        with opened(**given) as feed:
            return list(islice(feed.batches(epoch=0, start_step=0), 3))

    assert same(first(), first())
    assert not same(first(), first(seed=1))
    assert not same(first(), first(rank=1))


def test_an_epoch_has_as_many_steps_as_the_task_says() -> None:
    with opened() as feed:
        assert len(list(feed.batches(epoch=1, start_step=33))) == 7


def test_episodes_of_training_are_no_others() -> None:
    with opened(num_envs=64) as feed:
        seeds = feed.tensors()["episodes/seeds"]
    assert 0 <= int(seeds.min()) and int(seeds.max()) < TRAINING_SEEDS
    assert len(set(seeds.tolist())) == 64


@pytest.mark.parametrize(("tau", "follows"), [(1.0, 1.0), (0.25, 0.25)])
def test_the_target_network_follows_when_it_is_time(tau: float, follows: float) -> None:
    model = network(2)
    with opened(model=model, tau=tau) as feed:
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with torch.no_grad():
            for weight in model.parameters():
                weight += 1

        def moved() -> list[torch.Tensor]:
            return [feed.tensors()[f"target/{name}"] - before[name] for name in before]

        for step in (1, 2, 3):
            feed.after(step)
        assert all(bool((change == 0).all()) for change in moved())
        feed.after(4)
        assert all(torch.allclose(change, torch.full_like(change, follows)) for change in moved())


@pytest.mark.parametrize(
    ("is_new", "step", "share"), [(True, 0, 1.0), (True, 15, 0.55), (True, 90, 0.1), (False, 0, 0.1)]
)
def test_a_model_that_has_learned_explores_less(is_new: bool, step: int, share: float) -> None:
    """Of a model that always goes on, so many actions go back: half of those that are drawn at random."""
    model = network(2)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
        model.layers[-1].bias.copy_(torch.tensor([0.0, 1.0]))
    plan = {"exploration": {"end": 0.1, "steps": 30}, "num_envs": 200, "memory": 8000, "warmup": 4000}
    with opened(model=model, is_new=is_new, **plan) as feed:
        feed.after(step)
        next(iter(feed.batches(epoch=0, start_step=0)))
        taken = feed.memory.actions[: len(feed.memory)]
    assert float((taken == 0).float().mean()) == pytest.approx(share / 2, abs=0.03)


def test_a_model_in_parts_is_refused() -> None:
    model = network(2)
    model.layers[1].weight.full_tensor = lambda: None
    with pytest.raises(UnsupportedError, match="whole model") as caught, opened(model=model):
        pass
    assert caught.value.hint == "--set launch.strategy=ddp"


@pytest.mark.parametrize("double", [True, False])
def test_goals_are_the_rewards_and_what_the_right_network_expects(double: bool) -> None:
    model = network(2)
    with opened(model=model, double=double) as feed:
        with torch.no_grad():
            for weight in model.parameters():
                weight += torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
        batch, memory = next(iter(feed.batches(epoch=0, start_step=0))), feed.memory
        target = network(2)
        target.load_state_dict({n.removeprefix("target/"): t for n, t in feed.tensors().items() if "target/" in n})
        places = [int((memory.observations == seen).all(dim=1).nonzero()[0]) for seen in batch["observation"]]
        with torch.no_grad():
            judged, chosen = target(memory.next_observations[places]), model(memory.next_observations[places])
    assert not torch.equal(judged.argmax(1), chosen.argmax(1)), "the two disagree, so that it matters"
    best = (chosen if double else judged).argmax(1, keepdim=True)
    expected = memory.rewards[places] + 0.99 * memory.goes_on[places] * judged.gather(1, best)[:, 0]
    assert torch.allclose(batch["goal"], expected, atol=1e-5)
    assert torch.equal(batch["action"], memory.actions[places]) and bool((batch["weight"] == 1).all())


def test_what_is_cut_off_is_not_over() -> None:
    with opened(Episode("Corridor-v0", 3)) as feed:
        next(iter(feed.batches(epoch=0, start_step=0)))
        memory, num = feed.memory, len(feed.memory)
    assert memory.goes_on[:num].tolist() == [1] * num
    assert memory.is_last[:num].tolist() == [place // 3 % 3 == 2 for place in range(num)]
