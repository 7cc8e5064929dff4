"""Observations of an environment, as they come: float32 [n, F] to the model, of an episode's beginning.

What comes after the beginning is the task's, which plays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bmctl.core.columns import Episode
from bmctl.errors import DataError
from bmctl.schema import BATCH, Count, Emit, Span, Strict, TensorSpec

if TYPE_CHECKING:
    import numpy as np
    import torch

    from bmctl.core.chance import Luck
    from bmctl.core.requests import OnBad, Requests
    from bmctl.inputs import Examples, Records, Resolved

COLUMN = Episode.kind
READS = (COLUMN,)
FIELD, SEED = "observation", "seed"
NUM_EPISODES = 10
"""That `infer` plays where it is not told how many."""
MOST_EPISODES = 1_000_000
LAST_SEED = 2**31 - 1


class Config(Strict):
    kind: Literal["observation"] = "observation"


class Spec(Strict):
    """Attributes:
    env: Name in gymnasium's registry.
    max_steps: Of an episode.
    size: Numbers of an observation.
    """

    kind: Literal["observation"] = "observation"
    env: str
    max_steps: Count
    size: Count


def check(given: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Nothing in it has to fit together."""
    return iter(())


def resolve(asked: Config, examples: Examples, *, published: Mapping[str, Any]) -> tuple[Spec, dict[str, bytes]]:
    """How many numbers an observation is, as the environment says.

    Raises:
        DataError: Its observations are no vectors.
        DependencyError: It needs what is not installed.
    """
    from bmctl.core.environments import num_observed

    (column,) = examples.columns.values()
    assert isinstance(column, Episode)
    return Spec(env=column.env, max_steps=column.max_steps, size=num_observed(column)), {}


def specs(spec: Spec) -> tuple[TensorSpec, ...]:
    """The observation."""
    meaning = f"observation of {spec.env}"
    return (TensorSpec(name=FIELD, dtype="float32", shape=(BATCH, spec.size), meaning=meaning),)


def fitted(asked: Config, inputs: Sequence[TensorSpec]) -> Config:
    """The recipe's Config: there is nothing to choose."""
    return asked


def axes(spec: Spec) -> dict[str, Span]:
    """None: every observation is of one size."""
    return {}


def told(given: Resolved) -> dict[str, Any]:
    """Nothing: models read the size from `specs`."""
    return {}


def prepare(samples: Any, *, given: Resolved, folder: Path | None) -> Any:
    """The samples as they are: seeds."""
    return samples


def encode(
    records: Records, *, given: Resolved, asked: Config | None = None, luck: Luck | None = None
) -> dict[str, np.ndarray]:
    """float32 [n, F]: what the episodes begin with."""
    from bmctl.core.environments import first_observations

    (seeds,) = records.values()
    return {FIELD: first_observations(_column(given.spec), seeds)}


def finish(
    fields: Mapping[str, torch.Tensor],
    *,
    given: Resolved,
    channels_last: bool = False,
    empty: Callable[[tuple[int, ...], torch.dtype], torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """float32 [n, F], as they are."""
    return {FIELD: fields[FIELD]}


def unprepared(arrays: Mapping[str, np.ndarray], *, given: Resolved, name: str) -> Records | None:
    """None: arrays are observations."""
    return None


def requests(source: str | Path, *, given: Resolved, batch_size: int, on_bad: OnBad = "refuse", emit: Emit) -> Requests:
    """``CartPole-v1``, ``CartPole-v1:5`` for five episodes, ``CartPole-v1:5:42`` with seeds from 42 on.

    Besides the field that the model takes, each batch has the episodes' seeds: int64 [n].

    Raises:
        DataError: Another environment than the policy's, or no such numbers.
    """
    import numpy as np

    from bmctl.core.requests import Requested, Requests

    spec: Spec = given.spec
    num, first = _asked(str(source), env=spec.env)

    def batches() -> Iterator[Requested]:
        for start in range(0, num, batch_size):
            seeds = first + np.arange(start, min(start + batch_size, num), dtype=np.int64)
            names = [f"{spec.env}#{seed - first}" for seed in seeds.tolist()]
            yield Requested(names, {**encode({COLUMN: seeds.tolist()}, given=given), SEED: seeds})

    return Requests(num, batches())


def _asked(source: str, *, env: str) -> tuple[int, int]:
    """How many episodes, and the first one's seed."""
    name, *numbers = source.split(":")
    hint = f"bmctl infer {env}, {env}:5 for five episodes, {env}:5:42 with seeds from 42 on, or an .npz of observations"
    if name != env:
        raise DataError(f"{source}: the policy plays {env}", hint=hint)
    if len(numbers) > 2 or not all(number.isascii() and number.isdigit() and len(number) < 12 for number in numbers):
        raise DataError(f"{source}: expected {env}:EPISODES:SEED, whole numbers", hint=hint)
    num, first = [*map(int, numbers), *(NUM_EPISODES, 0)[len(numbers) :]]
    if not 1 <= num <= MOST_EPISODES or first + num - 1 > LAST_SEED:
        raise DataError(f"{source}: expected 1 to {MOST_EPISODES:,} episodes with seeds up to {LAST_SEED:,}", hint=hint)
    return num, first


def _column(spec: Spec) -> Episode:
    return Episode(spec.env, spec.max_steps)
