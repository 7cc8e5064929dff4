"""What one call of torchrun is to do, and the files by which its processes talk to their parent."""

from __future__ import annotations

import json
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bmctl import store
from bmctl.errors import BmctlError
from bmctl.schema import Strict


class Job(Strict):
    """One call of torchrun.

    Attributes:
        run: The run's directory, which holds the resolved recipe of the job (`Logs.recipe`).
        resume: Go on from the newest checkpoint.
        overwrite: Do a finished stage again.
        profile: Write a trace of a few steps into the run.
        trust_code: Files that the recipe names in the place of plug-ins may run.
        start: The package of the run to train further; None trains the recipe's model as the run's first package.
        node: Ends the names of this machine's own files where several machines share the run.
    """

    run: str
    stage: Literal["train"] = "train"
    resume: bool = False
    overwrite: bool = False
    start: str | None = None
    profile: bool = False
    trust_code: bool = False
    node: str = ""

    @property
    def checkpoints(self) -> str:
        """Name of the folder under RUN/checkpoints that this job fills."""
        return f"{int(Path(self.start).name.split('-', 1)[0]) + 1:02d}-{self.stage}" if self.start else self.stage


@dataclass(frozen=True)
class Logs:
    """Where the processes of a job write; all but the ranks' logs is between them and their parent."""

    run: Path
    node: str = ""

    @property
    def folder(self) -> Path:
        return self.run / "logs"

    @property
    def recipe(self) -> Path:
        """The resolved recipe of the command at work: the same for all machines, and not always the run's own."""
        return self.folder / "recipe.yaml"

    @property
    def job(self) -> Path:
        return self.folder / f"job{self.node}.json"

    @property
    def events(self) -> Path:
        return self.folder / f"events{self.node}.jsonl"

    @property
    def agent(self) -> Path:
        return self.folder / f"agent{self.node}.log"

    def of_rank(self, rank: int) -> Path:
        return self.folder / f"rank-{rank}.log"

    def error(self, rank: int) -> Path:
        return self.folder / f"error-rank-{rank}.json"

    def outcome(self, rank: int) -> Path:
        return self.folder / f"outcome-rank-{rank}.json"

    def pid(self, rank: int) -> Path:
        return self.folder / f"rank-{rank}.pid"

    def beat(self, rank: int) -> Path:
        return self.folder / f"rank-{rank}.beat"


def is_worker() -> bool:
    """Whether somebody's torchrun started this process: then it joins that group and starts no other."""
    return "TORCHELASTIC_RUN_ID" in os.environ or {"RANK", "WORLD_SIZE"} <= os.environ.keys()


def is_restarted() -> bool:
    """Whether torchrun has started this process in place of one that failed."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") not in ("", "0")


def torchrun_nodes() -> tuple[int, int] | None:
    """Fewest and most machines of somebody's torchrun, from its environment or its command line; None if unknown."""
    given = os.environ.get("PET_NNODES", "")
    if not given and "TORCHELASTIC_RUN_ID" in os.environ:
        try:
            words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            return None
        for word, following in zip(words, [*words[1:], ""], strict=True):
            name, equals, value = word.partition("=")
            if name == "--nnodes":
                given = value if equals else following
    found = re.fullmatch(r"(\d+)(?::(\d+))?", given)
    return (int(found[1]), int(found[2] or found[1])) if found else None


def newest_step(run: Path, stage: str) -> int | None:
    """Step of the newest published checkpoint of a stage."""
    found = (re.fullmatch(r"step-(\d{8,})", path.name) for path in (run / "checkpoints" / stage).glob("step-*"))
    return max((int(match[1]) for match in found if match), default=None)


def outcome_path(run: Path) -> Path:
    return run / "outcome.json"


def write_outcome(path: Path, stopped: BmctlError, *, rank: int) -> None:
    """Say how a job was stopped: its processes exit with 0, so that no agent restarts them."""
    fields = stopped.to_dict() | {"rank": rank, "time": time.time(), "pid": os.getpid()}
    store.write_atomic(path, json.dumps(fields, default=str).encode() + b"\n")


def read_record(path: Path, *, pid: int | None = None) -> dict[str, Any] | None:
    """What a process wrote with `write_outcome` or `record_error`; None without, or if another process wrote it."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and pid in (None, found.get("pid")) else None
