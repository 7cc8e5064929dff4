"""What one call of torchrun is to do, and the files by which its processes talk to their parent."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bmctl import store
from bmctl.errors import BmctlError
from bmctl.schema import Strict


class Job(Strict):
    """One call of torchrun.

    Attributes:
        run: The run's directory, which holds the resolved recipe.
        resume: Go on from the newest checkpoint.
        overwrite: Do a finished stage again.
        profile: Write a trace of a few steps into the run.
        start: The package of the run to train further; None trains the recipe's model as the run's first package.
    """

    run: str
    stage: Literal["train"] = "train"
    resume: bool = False
    overwrite: bool = False
    start: str | None = None
    profile: bool = False


@dataclass(frozen=True)
class Logs:
    """Where the processes of a job write; all but the ranks' logs is between them and their parent."""

    run: Path

    @property
    def folder(self) -> Path:
        return self.run / "logs"

    @property
    def job(self) -> Path:
        return self.folder / "job.json"

    @property
    def events(self) -> Path:
        return self.folder / "events.jsonl"

    @property
    def agent(self) -> Path:
        return self.folder / "agent.log"

    def of_rank(self, rank: int) -> Path:
        return self.folder / f"rank-{rank}.log"

    def error(self, rank: int) -> Path:
        return self.folder / f"error-rank-{rank}.json"

    def pid(self, rank: int) -> Path:
        return self.folder / f"rank-{rank}.pid"


def is_worker() -> bool:
    """Whether somebody's torchrun started this process: then it joins that group and starts no other."""
    return "TORCHELASTIC_RUN_ID" in os.environ or {"RANK", "WORLD_SIZE"} <= os.environ.keys()


def outcome_path(run: Path) -> Path:
    return run / "outcome.json"


def write_outcome(run: Path, stopped: BmctlError, *, rank: int) -> None:
    """Say in RUN/outcome.json how a job was stopped: its processes exit with 0, so that no agent restarts them."""
    fields = stopped.to_dict() | {"rank": rank, "time": time.time()}
    store.write_atomic(outcome_path(run), json.dumps(fields, default=str).encode() + b"\n")
