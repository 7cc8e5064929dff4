"""Deep Q-learning: a model says what each action is worth, training plays episodes and remembers them.

Metric is the mean return of the episodes of a split, played greedily, whatever runs the model. Duelling is the model's
affair: `bmctl:duelling`.

Sources: Mnih et al. 2015, https://doi.org/10.1038/nature14236; van Hasselt et al. 2015, https://arxiv.org/abs/1509.06461;
    Schaul et al. 2015, https://arxiv.org/abs/1511.05952

n: samples of a batch. F: numbers of an observation. A: actions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from bmctl.core.columns import Column, Episode
from bmctl.core.evaluation import Evaluation, Metric
from bmctl.core.runner import Runner
from bmctl.errors import DataError
from bmctl.schema import BATCH, Signature, TensorSpec
from bmctl.tasks.dqn.spec import GIVES, SEED, Config, Exploration, Facts, Prioritised

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

    from bmctl.tasks import Feed

__all__ = ["GIVES", "SEED", "Config", "Exploration", "Facts", "Prioritised"]

METRICS: Mapping[str, Metric] = {"return": Metric("return")}
SCORED = "return"
COLUMNS = ("seed", "return", "length", "action", "value")

# -- data -------------------------------------------------------------------------------------------


def needs(config: Config) -> tuple[str, ...]:
    """The seeds of the episodes."""
    return (SEED,)


def facts(columns: Mapping[str, Column], config: Config, told: Mapping[str, Any]) -> Facts:
    """The environment.

    Raises:
        DataError: The samples are no episodes, or the actions no choice among a few.
        DependencyError: The environment needs what is not installed.
    """
    from bmctl.core.environments import num_actions

    column = next((column for column in columns.values() if isinstance(column, Episode)), None)
    if column is None:
        raise DataError(
            f"data.source: its samples have {', '.join(columns)}, and dqn plays episodes",
            hint="data.source: {kind: gymnasium, env: CartPole-v1}, or another task",
        )
    return Facts(env=column.env, max_steps=column.max_steps, num_actions=num_actions(column))


def balance(config: Config) -> str | None:
    """None: episodes have no classes."""
    return None


def targets(records: Mapping[str, Sequence[Any]], *, config: Config, facts: Facts) -> dict[str, np.ndarray]:
    """``seed``: int64 [n]."""
    import numpy as np

    return {SEED: np.asarray(records[SEED], np.int64)}


def told(facts: Facts) -> dict[str, Any]:
    """The number of actions: for a model they are classes like any others."""
    return {"num_classes": facts.num_actions}


# -- training ---------------------------------------------------------------------------------------


def epoch_steps(config: Config) -> int:
    """Optimizer steps that count as an epoch."""
    return config.epoch_steps


def feed(
    train: Any,
    *,
    config: Config,
    model: nn.Module,
    teacher: nn.Module | None,
    seed: int,
    batch_size: int,
    rank: int,
    world: int,
    device: torch.device,
) -> AbstractContextManager[Feed]:
    """Batches from a replay memory that fills while the model plays; see tasks.Feed and tasks.dqn.feed."""
    from bmctl.tasks.dqn.playing import open_playing

    return open_playing(
        train.facts,
        config=config,
        model=model,
        is_new=teacher is None,
        seed=seed,
        num=batch_size // world,
        rank=rank,
        device=device,
    )


def loss(
    outputs: Mapping[str, torch.Tensor], batch: Mapping[str, torch.Tensor], *, config: Config, facts: Facts
) -> torch.Tensor:
    """Weighted mean Huber loss of what the actions that were taken are worth, in float32.

    Args:
        outputs: ``values`` [n, A].
        batch: ``action`` int64 [n], ``goal`` and ``weight`` float32 [n].
        config: Where Huber's loss bends.
        facts: Not used.
    """
    from torch.nn import functional

    values = outputs["values"].float().gather(1, batch["action"][:, None])[:, 0]
    errors = functional.huber_loss(values, batch["goal"], delta=config.huber, reduction="none")
    return (errors * batch["weight"]).mean()


def score(outputs: Mapping[str, torch.Tensor], batch: Mapping[str, torch.Tensor], *, facts: Facts) -> torch.Tensor:
    """float32 [n]: the return that the model expects of its best action; batches are no whole episodes."""
    return outputs["values"].float().amax(dim=1)


def distill_loss(
    student: Mapping[str, torch.Tensor], teacher: Mapping[str, torch.Tensor], *, temperature: float
) -> torch.Tensor:
    """Huber loss between their values, of the same scale as the TD loss beside it; there is nothing to soften.

    Args:
        student: ``values`` [n, A].
        teacher: ``values`` [n, A].
        temperature: Not used.
    """
    from torch.nn import functional

    return functional.huber_loss(student["values"].float(), teacher["values"].float())


# -- graphs -----------------------------------------------------------------------------------------


def signatures(given: Sequence[TensorSpec], facts: Facts, model: Any = None) -> dict[str, Signature]:
    """One graph: from observations to a row of values per sample."""
    values = TensorSpec(
        name="values",
        dtype="float32",
        shape=(BATCH, facts.num_actions),
        role="scores",
        meaning="return to expect of each action",
    )
    return {"model": Signature(inputs=tuple(given), outputs=(values,))}


def modules(model: nn.Module) -> dict[str, nn.Module]:
    """The model itself."""
    return {"model": model}


def predict(
    runners: Mapping[str, Runner], batch: Mapping[str, np.ndarray], *, config: Config, facts: Facts
) -> Iterator[dict[str, Any]]:
    """Of each seed the episode, played greedily to its end; of mere observations the best action.

    Args:
        runners: ``{"model": ...}``, from observations to values [n, A].
        batch: Either has ``seed`` int64 [n], or is what the model takes.
        config: Not used.
        facts: The environment.

    Raises:
        DivergedError: A value is nan or infinite.
    """
    from bmctl.tasks.dqn import play

    if SEED in batch:
        played = play.play(play.greedy(runners["model"]), batch[SEED], facts=facts)
        for seed, total, length in zip(batch[SEED], played.returns, played.lengths, strict=True):
            yield {"seed": int(seed), "return": float(total), "length": int(length)}
        return
    for row in play.values(runners["model"], next(iter(batch.values()))):
        yield {"action": int(row.argmax()), "value": float(row.max())}


def film(runners: Mapping[str, Runner], batch: Mapping[str, np.ndarray], *, config: Config, facts: Facts) -> bytes:
    """An animated GIF of the first episode.

    Raises:
        DataError: There is no episode, or the environment draws no pictures.
        DependencyError: It draws them with what is not installed.
    """
    from bmctl.tasks.dqn import play

    if SEED not in batch:
        raise DataError("observations alone are no episode to film", hint=f"bmctl infer {facts.env} --gif FILE")
    return play.film(runners["model"], int(batch[SEED][0]), facts=facts)


def words(prediction: Mapping[str, Any]) -> str:
    """``return 500 in 500 steps``."""
    if "return" not in prediction:
        return f"action {prediction['action']}, worth {prediction['value']:.4g}"
    return f"return {prediction['return']:g} in {prediction['length']} steps"


# -- evaluation -------------------------------------------------------------------------------------


def evaluate(
    runners: Mapping[str, Runner], batches: Iterable[Mapping[str, np.ndarray]], *, config: Config, facts: Facts
) -> Evaluation:
    """The mean return of greedy play; the trivial predictor plays the same episodes at random.

    Episodes are the same however they are cut into batches.

    Args:
        runners: ``{"model": ...}``, from observations to values [n, A].
        batches: ``seed`` int64 [n].
        config: Not used.
        facts: The environment.

    Raises:
        DataError: No episodes.
        DivergedError: A value is nan or infinite.
    """
    import numpy as np

    from bmctl.tasks.dqn import play

    act = play.greedy(runners["model"], rows=play.ROWS)
    returns: list[np.ndarray] = []
    seeds: list[int] = []
    for batch in batches:
        returns.append(play.play(act, batch[SEED], facts=facts).returns)
        seeds += batch[SEED].tolist()
    if not seeds:
        raise DataError("there is nothing to evaluate: the split is empty")
    counts = np.concatenate(returns)[:, None]
    return Evaluation("dqn", counts, metrics(counts), baseline=play.random_return(facts, tuple(seeds)))


def metrics(counts: np.ndarray) -> dict[str, float]:
    """Every metric of METRICS.

    Args:
        counts: float64 [N, 1], returns of episodes.
    """
    return {name: float(scores.mean()) for name, scores in means(counts).items()}


def means(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Per episode, float64 [N]: its return."""
    return {"return": counts[:, 0]}
