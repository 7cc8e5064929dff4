"""Episodes of an environment of gymnasium's registry: nothing is stored, a sample is the seed that one begins with.

The seeds of the splits never meet: training plays any below those of validation, and those of validation and test are
the same for every recipe, so that all policies are judged by the same episodes.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from bmctl.core.columns import Column, Episode, Id
from bmctl.errors import RecipeError
from bmctl.schema import Count, Strict
from bmctl.sources.samples import ArraySamples

INPUT = "observation"
BEGINS = {"train": 0, "val": 2**30, "test": 3 * 2**29}
END = 2**31

Episodes = Annotated[int, Field(ge=1, le=1_000_000)]


def check_name(name: str) -> str:
    """A name that may stand in the registry: gymnasium takes ``module:Name`` as well, and runs the module."""
    if not re.fullmatch(r"([A-Za-z0-9_.-]{1,50}/)?[A-Za-z0-9_.-]{1,50}", name):
        raise ValueError(f"must be a name of gymnasium's registry, such as CartPole-v1, got {name[:60]!r}")
    return name


class NumEpisodes(Strict):
    """How many each split has.

    Attributes:
        train: For calibration and examples; training plays as many as its steps ask for.
    """

    train: Episodes = 20
    val: Episodes = 20
    test: Episodes = 100


class Config(Strict):
    """Attributes:
    env: Its name in gymnasium's registry.
    max_steps: Episodes end after so many steps; None leaves it at the registry's limit.
    """

    kind: Literal["gymnasium"] = "gymnasium"
    env: Annotated[str, AfterValidator(check_name)]
    episodes: NumEpisodes = NumEpisodes()
    max_steps: Annotated[Count, Field(le=100_000)] | None = None


def open(config: Config, *, split: str) -> ArraySamples:
    """The samples of `train`, `val` or `test`: columns `episode`, for an input, and `seed`, the same, for a task.

    Raises:
        RecipeError: The registry has no such environment, or one whose episodes may never end.
        DependencyError: gymnasium is not installed.
    """
    import hashlib

    import numpy as np

    from bmctl.core.environments import longest

    max_steps = config.max_steps or longest(config.env)
    if max_steps is None:
        raise RecipeError(
            f"data.source.max_steps: episodes of {config.env} may never end", hint="add data.source.max_steps: 500"
        )
    seeds = BEGINS[split] + np.arange(getattr(config.episodes, split), dtype=np.int64)
    seeds.flags.writeable = False
    columns: dict[str, Column] = {"episode": Episode(config.env, max_steps), "seed": Id(END)}
    digest = hashlib.sha256(f"{config.env} {max_steps} ".encode() + seeds.astype("<i8").tobytes())
    return ArraySamples(columns, {"episode": seeds, "seed": seeds}, digest.hexdigest())
