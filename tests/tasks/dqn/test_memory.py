"""Replay memory and TD targets, against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from bmctl.tasks.dqn.memory import LEAST_ERROR, Memory, goals, weights

LAST = torch.tensor([True])


def filled(num: int, *, places: int = 4) -> Memory:
    """Transitions whose numbers all are their own, added one by one."""
    memory = Memory(places, 2)
    for number in range(num):
        one = torch.tensor([float(number)])
        memory.add(
            one.expand(1, 2), one.long(), one.double(), one.expand(1, 2) + 0.5, torch.tensor([number % 2 == 0]), LAST
        )
    return memory


def test_the_oldest_give_way() -> None:
    assert len(filled(3)) == 3
    memory = filled(6)
    assert len(memory) == 4 and int(memory.num_added) == 6
    assert memory.actions.tolist() == [4, 5, 2, 3] == memory.rewards.tolist()
    assert memory.next_observations[:, 1].tolist() == [4.5, 5.5, 2.5, 3.5]
    assert memory.goes_on.tolist() == [1, 0, 1, 0]


def test_several_at_once_go_round_the_end() -> None:
    memory = filled(3)
    memory.add(torch.zeros(2, 2), torch.tensor([8, 9]), torch.zeros(2), torch.zeros(2, 2), torch.ones(2), LAST)
    assert memory.actions.tolist() == [9, 1, 2, 8]


def test_only_what_is_there_is_drawn() -> None:
    memory, chance = filled(3), torch.Generator().manual_seed(0)
    assert set(memory.draw(100, generator=chance).tolist()) == {0, 1, 2}
    assert set(memory.draw_by_priority(100, generator=chance)[0].tolist()) == {0, 1, 2}


def test_what_surprised_more_is_drawn_more_often() -> None:
    memory, chance = filled(6), torch.Generator().manual_seed(0)
    assert memory.priorities.tolist() == [1, 1, 1, 1]
    memory.set_priorities(torch.tensor([0, 1, 2, 3]), torch.tensor([0.0, -1.0, 4.0, 9.0]), alpha=0.5)
    sizes = [(error + LEAST_ERROR) ** 0.5 for error in (0.0, 1.0, 4.0, 9.0)]
    expected = torch.tensor(sizes, dtype=torch.float64) / sum(sizes)
    places, probabilities = memory.draw_by_priority(20_000, generator=chance)
    assert torch.allclose(probabilities, expected[places], rtol=1e-6)
    assert torch.allclose(torch.bincount(places, minlength=4) / 20_000, expected.float(), atol=2e-3)
    memory.add(torch.zeros(1, 2), torch.tensor([7]), torch.zeros(1), torch.zeros(1, 2), torch.ones(1), LAST)
    assert float(memory.priorities[2]) == float(memory.priorities[3]), "what is new comes soon"


def test_weights_make_up_for_it() -> None:
    probabilities = torch.tensor([0.1, 0.4], dtype=torch.float64)
    assert weights(probabilities, num=10, beta=1.0).tolist() == [1, 0.25]
    assert weights(probabilities, num=10, beta=0.5).tolist() == [1, 0.5]
    assert weights(probabilities, num=10, beta=0.0).tolist() == [1, 1]


@pytest.mark.parametrize(
    ("steps", "place", "expected"),
    [
        # Two environments, four steps in a ring of six: steps 1 to 3, of which the second environment's ended at 2.
        (1, 2, (1.0, 0.5, 2)),
        (2, 2, (1 + 0.5 * 2, 0.25, 4)),
        (3, 2, (1 + 0.5 * 2 + 0.25 * 3, 0.125, 0)),
        (9, 2, (1 + 0.5 * 2 + 0.25 * 3, 0.125, 0)),  # no further than to what is newest
        (9, 4, (2 + 0.5 * 3, 0.25, 0)),
        (9, 0, (3.0, 0.5, 0)),
        (3, 3, (10 + 0.5 * 20, 0.0, 5)),  # no further than to the end of the episode
        (9, 1, (30.0, 0.5, 1)),
    ],
)
def test_steps_ahead(steps: int, place: int, expected: tuple[float, float, int]) -> None:
    memory = Memory(6, 1)
    for step in range(4):
        over = torch.tensor([False, step == 2])
        nothing, rewards = torch.zeros(2, 1), torch.tensor([1.0, 10.0]) * step
        memory.add(nothing, torch.zeros(2, dtype=torch.int64), rewards, nothing, ~over, over)
    found = memory.ahead(torch.tensor([place]), steps=steps, num_envs=2, gamma=0.5)
    assert tuple(each.item() for each in found) == expected


@pytest.mark.parametrize(
    ("double", "expected"),
    [
        # The model likes action 1, then 0; the target network says 3 and 5 of these, and at most 7 and 5.
        (True, [1 + 0.5 * 3, 2 + 0.5 * 5, 3]),
        (False, [1 + 0.5 * 7, 2 + 0.5 * 5, 3]),
    ],
)
def test_goals(double: bool, expected: list[float]) -> None:
    judged = torch.tensor([[7.0, 3.0], [5.0, 4.0], [9.0, 9.0]])
    model = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    found = goals(
        torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, 0.5, 0.0]),
        judged=judged, chosen_by=model if double else judged,
    )  # fmt: skip
    assert found.tolist() == expected
