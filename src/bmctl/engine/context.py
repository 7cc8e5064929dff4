"""What every stage of the engine is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from bmctl.engine.loading.data import Data
from bmctl.engine.parallel import Group
from bmctl.processes.signals import Stop
from bmctl.recipe import Recipe
from bmctl.schema import Emit


def silent(step: int, doing: str) -> None:
    """Nobody listens."""


@dataclass(frozen=True)
class StageContext:
    """One stage of one run, in one process.

    Attributes:
        run: The run's directory; it exists and is locked by the parent process.
        recipe: The resolved recipe.
        group: Rank, world size and device of this process.
        stop: Raised by a signal; stages look at it at every step border.
        emit: Where progress goes; only rank 0's is shown.
        resume: Continue from the newest checkpoint that verifies.
        overwrite: Redo a finished stage.
        profile: Write a trace of a few steps into the run.
        beat: Called with the step and what is being done, at every step, evaluated batch and saved file: a process
            from which nothing is heard for `launch.timeout_s` counts as hung.
        data: Of the recipe; what is opened of it stays open for the whole stage.
    """

    run: Path
    recipe: Recipe
    group: Group
    stop: Stop
    emit: Emit
    resume: bool = False
    overwrite: bool = False
    profile: bool = False
    beat: Callable[[int, str], None] = silent
    data: Data = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", Data(self.recipe, folder=self.run / "data"))
