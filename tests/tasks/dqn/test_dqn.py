"""Q-learning as a task: what counts as an episode's return, whatever plays it, and what the loss is made of."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.environments import CARTPOLE, CORRIDOR, facts_of

from bmctl.backends.eager import open_module
from bmctl.core.columns import Class, Episode, Id, Picture
from bmctl.core.runner import Runner
from bmctl.engine.artifacts.recording import Call, Recorder
from bmctl.errors import DataError, DivergedError
from bmctl.models import ModelSpec, build
from bmctl.models.own.networks import MLP
from bmctl.schema import TensorSpec
from bmctl.tasks import dqn

CONFIG = dqn.Config()
FACTS = facts_of(CARTPOLE)
SEEDS = 2**30 + np.arange(20)


def given(size: int) -> tuple[TensorSpec, ...]:
    return (TensorSpec(name="observation", dtype="float32", shape=("batch", size)),)


def runners(column: Episode, *, seed: int = 0, scale: float = 1.0) -> dict[str, Runner]:
    """A random network."""
    torch.manual_seed(seed)
    model = MLP(num_inputs=4 if column is CARTPOLE else 2, num_classes=2, hidden=(16,)).eval()
    with torch.no_grad():
        model.layers[-1].weight *= scale
    signatures = dqn.signatures(given(4 if column is CARTPOLE else 2), facts_of(column))
    return {part: open_module(model, signature=signature) for part, signature in signatures.items()}


def evaluate(column: Episode, *, size: int = 7, **how: Any) -> Any:
    batches = ({"seed": SEEDS[start : start + size]} for start in range(0, len(SEEDS), size))
    return dqn.evaluate(runners(column, **how), batches, config=CONFIG, facts=facts_of(column))


@pytest.mark.parametrize("column", [CARTPOLE, CORRIDOR], ids=lambda column: column.env)
def test_episodes_are_the_same_however_they_are_cut(column: Episode) -> None:
    found = [evaluate(column, size=size) for size in (1, 7, 20)]
    assert all(np.array_equal(one.counts, found[0].counts) and one.baseline == found[0].baseline for one in found)
    assert found[0].counts.shape == (20, 1) and len(np.unique(found[0].counts)) > 1
    assert found[0].values == {"return": found[0].counts.mean()} == dqn.metrics(found[0].counts)
    assert (found[0].name, found[0].task) == ("return", "dqn")


def test_every_call_of_an_evaluation_has_as_many_rows() -> None:
    """Products of other sizes may round otherwise, and with that whole episodes may change."""
    calls: list[Call] = []
    parts = {part: Recorder(runner, part=part, calls=calls) for part, runner in runners(CARTPOLE).items()}
    dqn.evaluate(parts, [{"seed": SEEDS[:3]}, {"seed": SEEDS[3:]}], config=CONFIG, facts=facts_of(CARTPOLE))
    assert {len(call.feed["observation"]) for call in calls} == {64}


def test_the_trivial_predictor_plays_at_random() -> None:
    found = evaluate(CARTPOLE)
    assert 15 < found.baseline < 35
    assert evaluate(CARTPOLE, seed=3).baseline == found.baseline


def test_nothing_and_nan_are_refused() -> None:
    with pytest.raises(DataError, match="empty"):
        dqn.evaluate(runners(CORRIDOR), [], config=CONFIG, facts=facts_of(CORRIDOR))
    with pytest.raises(DivergedError):
        evaluate(CORRIDOR, scale=float("nan"))


def test_predictions_are_the_episodes_that_are_judged() -> None:
    batch = {"observation": np.zeros((20, 4), np.float32), "seed": SEEDS}
    found = list(dqn.predict(runners(CARTPOLE), batch, config=CONFIG, facts=facts_of(CARTPOLE)))
    assert [one["return"] for one in found] == evaluate(CARTPOLE).counts[:, 0].tolist()
    assert all(one["length"] == one["return"] for one in found) and [one["seed"] for one in found] == SEEDS.tolist()
    assert dqn.words(found[0]) == f"return {found[0]['return']:g} in {found[0]['length']} steps"


def test_of_observations_alone_the_best_action_is_predicted() -> None:
    parts = runners(CARTPOLE)
    batch = {"observation": np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)}
    values = parts["model"].run(batch)["values"]
    found = list(dqn.predict(parts, batch, config=CONFIG, facts=facts_of(CARTPOLE)))
    assert [one["action"] for one in found] == values.argmax(axis=1).tolist()
    assert [one["value"] for one in found] == values.max(axis=1).tolist()
    assert dqn.words(found[0]).startswith(f"action {found[0]['action']}, worth ")


def test_a_film_of_an_episode() -> None:
    """Of 50 pictures a second every other one is shown, and the last of them stays inside the corridor."""
    parts, batch = runners(CORRIDOR), {"observation": np.zeros((2, 2), np.float32), "seed": SEEDS[:2]}
    film = dqn.film(parts, batch, config=CONFIG, facts=facts_of(CORRIDOR))
    length = next(iter(dqn.predict(parts, batch, config=CONFIG, facts=facts_of(CORRIDOR))))["length"]
    with Image.open(io.BytesIO(film)) as shown:
        assert (shown.format, shown.size) == ("GIF", (6, 4))
        seen_ms = 0
        for frame in range(shown.n_frames):
            shown.seek(frame)
            seen_ms += shown.info["duration"]
    assert seen_ms == 40 * (length // 2 + 1)  # equal pictures in a row are one, shown longer
    with pytest.raises(DataError, match="no episode to film"):
        dqn.film(parts, {"observation": batch["observation"]}, config=CONFIG, facts=facts_of(CORRIDOR))


def test_the_loss_by_hand() -> None:
    outputs = {"values": torch.tensor([[1.0, 5.0], [2.0, 0.0], [0.0, 3.0]])}
    batch = {
        "action": torch.tensor([0, 0, 1]),
        "goal": torch.tensor([1.5, 5.0, 3.0]),
        "weight": torch.tensor([1.0, 0.5, 1.0]),
    }
    assert dqn.loss(outputs, batch, config=CONFIG, facts=FACTS).item() == pytest.approx((0.5**2 / 2 + 0.5 * 2.5) / 3)
    assert dqn.loss(outputs, batch, config=dqn.Config(huber=9.0), facts=FACTS).item() == pytest.approx(
        (0.125 + 0.5 * 4.5) / 3
    )
    assert dqn.score(outputs, batch, facts=FACTS).tolist() == [5, 2, 3]
    other = {"values": outputs["values"] + torch.tensor([0.5, 3.0])}
    assert dqn.distill_loss(other, outputs, temperature=4.0).item() == pytest.approx((0.125 + 2.5) / 2)


def test_facts_are_the_environments() -> None:
    columns = {"episode": CARTPOLE, "seed": Id(9)}
    assert dqn.facts(columns, CONFIG, {}) == dqn.Facts(env="CartPole-v1", max_steps=500, num_actions=2)
    with pytest.raises(DataError, match="dqn plays episodes") as caught:
        dqn.facts({"picture": Picture(), "label": Class(("a", "b"))}, CONFIG, {})
    assert "kind: gymnasium" in caught.value.hint


def test_a_duelling_network_says_apart_what_actions_add() -> None:
    spec = ModelSpec(name="bmctl:duelling", args={"hidden": 8}, given=given(4), told={"num_classes": 3})
    model = build(spec).eval()
    x = torch.randn(5, 4)
    with torch.no_grad():
        state, added = model.state(model.layers(x)), model.actions(model.layers(x))
        assert torch.allclose(model(x), state + added - added.mean(1, keepdim=True))
        assert torch.allclose(model(x).mean(1, keepdim=True), state, atol=1e-6)
