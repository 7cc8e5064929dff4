"""Small trainings for tests: in this process, or in one of their own that may be killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tests.specs import image_spec

from bmctl.engine.context import StageContext
from bmctl.engine.loading.data import open_split, resolve_input
from bmctl.engine.parallel import Group
from bmctl.engine.training import train
from bmctl.job import Logs
from bmctl.models import build
from bmctl.processes.signals import Stop
from bmctl.recipe import Recipe, load_recipe, recipe_yaml
from bmctl.tasks import TASKS

FAULTS = Path(__file__).parent / "faults"
RECIPE = """
name: small
model: {name: "bmctl:mlp"}
data: {source: {kind: bundled}, train: {limit: 320}, val: {limit: 100}}
task: {kind: classify}
train: {epochs: 3, batch_size: 32, precision: fp32}
launch: {device: cpu, timeout_s: 60}
"""
# What a user's process does: the same call as `bmctl train`, with the events on stdout.
SCRIPT = """
import json, os, sys
from bmctl.errors import BmctlError
from bmctl.launch import Job, launch
from bmctl.recipe import load_recipe

run, *flags = sys.argv[1:]
config = load_recipe(run + "/logs/recipe.yaml").launch
job = Job(run=run, resume="--resume" in flags, overwrite="--overwrite" in flags)
try:
    launch(job, config, emit=lambda event: print(json.dumps(event), flush=True))
except BmctlError as error:
    print(json.dumps(error.to_dict()), file=sys.stderr)
    sys.exit(error.exit_code)
"""


def make_recipe(folder: Path, *overrides: str) -> Recipe:
    path = folder / "small.yaml"
    path.write_text(RECIPE)
    return load_recipe(path, overrides=overrides)


def make_run(folder: Path, *overrides: str, name: str = "run") -> Path:
    """A run's directory with the resolved recipe of a job."""
    run = folder / name
    Logs(run).folder.mkdir(parents=True)
    Logs(run).recipe.write_text(recipe_yaml(make_recipe(folder, *overrides)))
    return run


@dataclass
class Seen:
    """The events of a training."""

    events: list[Mapping[str, Any]] = field(default_factory=list)

    def of(self, kind: str) -> list[Mapping[str, Any]]:
        return [event for event in self.events if event["event"] == kind]

    @property
    def notes(self) -> str:
        return "\n".join(str(event["text"]) for event in self.of("note"))


def make_context(
    run: Path, recipe: Recipe, *, seen: Seen | None = None, device: str = "cpu", **given: Any
) -> StageContext:
    run.mkdir(exist_ok=True)
    torch.set_num_threads(1)
    group = Group(rank=0, local_rank=0, world=1, device=torch.device(device), threads=1)
    emit = (seen or Seen()).events.append
    return StageContext(run=run, recipe=recipe, group=group, emit=emit, **{"stop": Stop(), **given})


class StopAt(Stop):
    """Is requested once it has been looked at `number` times."""

    def __init__(self, number: int, signum: int = signal.SIGTERM) -> None:
        self.looks, self.number, self.signum = 0, number, signum
        super().__init__()

    @property
    def requested(self) -> int | None:
        self.looks += 1
        return self.signum if self.looks > self.number else None

    @requested.setter
    def requested(self, value: int | None) -> None:
        pass


def make_model(recipe: Recipe) -> torch.nn.Module:
    torch.manual_seed(0)
    assert recipe.model is not None
    return build(image_spec(recipe.model.name))


def fit(context: StageContext, model: torch.nn.Module, **given: Any) -> train.FitResult:
    recipe = context.recipe
    assert recipe.task is not None
    given_input = resolve_input(context.data)
    return train.fit(
        model,
        **{
            "fit": recipe.train,
            "train": open_split(context.data, name="train", given=given_input, augment=True),
            "val": open_split(context.data, name="val", given=given_input),
            "task": TASKS[recipe.task.kind],
            "task_config": recipe.task,
            "context": context,
            "stage": "train",
            "seed": recipe.seed,
            **given,
        },
    )


def start(run: Path, *flags: str, fault: str = "", **env: str) -> subprocess.Popen[str]:
    """`bmctl train` on `run` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(run), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(fault=fault, **env),
    )


def environment(*, fault: str = "", **env: str) -> dict[str, str]:
    path = os.pathsep.join([str(FAULTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "BMCTL_TEST_FAULT": fault, **env}


@dataclass(frozen=True)
class Ended:
    """How a process ended; `error` is what it told on stderr."""

    code: int
    seen: Seen
    stderr: str

    @property
    def error(self) -> dict[str, Any]:
        return json.loads(self.stderr.splitlines()[-1])


def end(process: subprocess.Popen[str], *, timeout: float = 280) -> Ended:
    out, err = process.communicate(timeout=timeout)
    return Ended(process.returncode, Seen([json.loads(line) for line in out.splitlines()]), err)


def run_to_end(run: Path, *flags: str, fault: str = "", **env: str) -> Ended:
    return end(start(run, *flags, fault=fault, **env))


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Of the run's first package."""
    return load_file(run / "packages" / "00-train" / "weights.safetensors")


def same(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def distance(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> float:
    """Largest difference of any weight."""
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def steps(run: Path, stage: str = "train") -> Sequence[str]:
    """Names in the checkpoints' folder."""
    return sorted(path.name for path in (run / "checkpoints" / stage).iterdir() if not path.name.startswith("."))
