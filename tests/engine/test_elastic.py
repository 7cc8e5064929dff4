"""Machines come and go: 1 -> 2 -> 1 processes take the same samples in the same steps as one that nothing disturbed.

Several parents on one machine, each with one process, stand for several machines with a shared file system.
"""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.engine.runs import RECIPE, distance, environment, steps, weights

from bmctl import store
from bmctl.job import newest_step

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

NUM_STEPS = 60
OVERRIDES = {
    "train.epochs": 6,
    "train.eval_every_steps": 10,
    "train.checkpoint_every_steps": 5,
    "model.args.hidden": "[16]",
    "launch.timeout_s": 60,
}
WAIT_S = 240


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Job:
    """One recipe, one run, and the processes that train it."""

    def __init__(self, folder: Path, name: str, **overrides: object) -> None:
        self.gate = folder / "gate"
        self.open_up_to(6)
        self.folder, self.run, self.samples = folder, folder / name, folder / f"{name}-samples"
        self.samples.mkdir()
        self.recipe = folder / "r.yaml"
        self.recipe.write_text(RECIPE)
        self.flags = ["-r", str(self.recipe), "-o", str(self.run)]
        for key, value in {**OVERRIDES, **overrides}.items():
            self.flags += ["--set", f"{key}={value}"]
        self.env = environment(
            fault="gate",
            BMCTL_TEST_GATE=str(self.gate),
            BMCTL_TEST_SAMPLES=str(self.samples),
            NO_COLOR="1",
            TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",  # without, torchrun's own agents cannot meet a second time
        )
        self.parents: list[subprocess.Popen[str]] = []

    def open_up_to(self, step: int) -> None:
        """Later steps take their time, so that whoever joins or leaves is not too late."""
        store.write_atomic(self.gate, str(step).encode())

    def start(self, *command: str) -> subprocess.Popen[str]:
        log = (self.folder / f"{self.run.name}-{len(self.parents)}.log").open("w")
        with log:
            process = subprocess.Popen(
                [sys.executable, "-m", *command, *self.flags], stdout=log, stderr=log, text=True, env=self.env
            )
        self.parents.append(process)
        return process

    def said(self, number: int) -> str:
        return (self.folder / f"{self.run.name}-{number}.log").read_text()

    def step(self) -> int:
        return newest_step(self.run, "train") or 0

    def wait(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + WAIT_S
        while not condition():
            assert time.monotonic() < deadline, self.told()
            assert self.parents[0].poll() is None, self.told()
            time.sleep(0.05)

    def told(self) -> str:
        return "\n".join(self.said(i) for i in range(len(self.parents)))

    def end(self, number: int) -> int:
        try:
            return self.parents[number].wait(timeout=WAIT_S)
        except subprocess.TimeoutExpired:
            pytest.fail(self.told())

    def taken(self) -> dict[int, tuple[list[int], int]]:
        """Samples, in order of rank, and number of processes of every step, as it was done last."""
        lines = [json.loads(line) for path in self.samples.glob("*.jsonl") for line in path.open()]
        lines = [{**line, "step": line["epoch"] * 10 + line["step"]} for line in lines]
        found = {}
        for step in sorted({line["step"] for line in lines}):
            last = max((line for line in lines if line["step"] == step), key=lambda line: line["time"])
            parts = {}
            for line in sorted(lines, key=lambda line: line["time"]):
                if line["step"] == step and line["world"] == last["world"]:
                    parts[line["rank"]] = line["ids"]
            found[step] = ([one for rank in sorted(parts) for one in parts[rank]], last["world"])
        return found


@contextmanager
def job(folder: Path, name: str, **given: object) -> Iterator[Job]:
    made = Job(folder, name, **given)
    try:
        yield made
    finally:
        for process in made.parents:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Job:
    """One process that nothing disturbs."""
    with job(tmp_path_factory.mktemp("alone"), "alone") as made:
        made.open_up_to(NUM_STEPS)
        made.start("bmctl", "train")
        assert made.end(0) == 0, made.told()
        return made


def check_same_samples(shared: Job, alone: Job) -> None:
    mine, theirs = shared.taken(), alone.taken()
    assert sorted(mine) == sorted(theirs) == list(range(NUM_STEPS))
    assert {step: ids for step, (ids, _) in mine.items()} == {step: ids for step, (ids, _) in theirs.items()}
    worlds = [world for _, world in mine.values()]
    assert worlds[0] == worlds[-1] == 1
    assert 2 in worlds
    # Each was trained on, exactly once: otherwise the weights would be others.
    assert distance(weights(shared.run), weights(alone.run)) < 1e-4


@pytest.mark.parametrize(
    ("farewell", "strategy"), [(signal.SIGTERM, "ddp"), (signal.SIGKILL, "ddp"), (signal.SIGTERM, "fsdp")]
)
def test_a_machine_joins_and_leaves(tmp_path: Path, alone: Job, farewell: signal.Signals, strategy: str) -> None:
    port = free_port()
    nodes = {"launch.nodes": "{min: 1, max: 2}", "launch.rendezvous": f"127.0.0.1:{port}"}
    nodes["launch.strategy"] = strategy
    with job(tmp_path, "shared", **nodes) as shared:
        first = shared.start("bmctl", "distribute")
        shared.wait(lambda: shared.step() >= 5)
        second = shared.start("bmctl", "distribute")
        shared.wait(lambda: read_world(shared.run) == 2)
        second.send_signal(farewell)
        shared.wait(lambda: second.poll() is not None)
        shared.open_up_to(NUM_STEPS)
        assert shared.end(1) == (75 if farewell == signal.SIGTERM else -farewell), shared.told()
        assert first.poll() is None, shared.told()
        assert shared.end(0) == 0, shared.told()
        assert "another machine joins" in shared.said(0)
        assert "going on with 2 processes instead of 1" in shared.said(0)
        assert "going on with 1 processes instead of 2" in shared.said(0)
        check_same_samples(shared, alone)


def test_under_somebody_elses_elastic_torchrun(tmp_path: Path, alone: Job) -> None:
    port = free_port()
    agent = ["torch.distributed.run", "--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=3", "--rdzv-backend=c10d"]
    agent += [f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=job", "--local-addr=127.0.0.1", "--monitor-interval=0.2"]
    agent += ["--rdzv-conf=last_call_timeout=2,keep_alive_interval=2", "-m", "bmctl", "train"]
    with job(tmp_path, "shared") as shared:
        shared.flags.append("--resume")
        shared.start(*agent)
        shared.wait(lambda: shared.step() >= 5)
        second = shared.start(*agent)
        shared.wait(lambda: read_world(shared.run) == 2)
        second.kill()
        shared.wait(lambda: second.poll() is not None)
        shared.open_up_to(NUM_STEPS)
        assert shared.end(0) == 0, shared.told()
        check_same_samples(shared, alone)


def read_world(run: Path) -> int:
    """Of the newest checkpoint."""
    path = run / "checkpoints" / "train" / "latest" / "manifest.json"
    return int(json.loads(path.read_text())["world"]) if path.exists() else 0


def test_another_recipe_on_another_machine_is_refused(tmp_path: Path) -> None:
    nodes = {"launch.nodes": "{min: 1, max: 2}", "launch.rendezvous": f"127.0.0.1:{free_port()}"}
    with job(tmp_path, "shared", **nodes) as shared:
        shared.start("bmctl", "distribute")
        shared.wait(lambda: shared.step() >= 5)
        shared.flags += ["--set", "seed=7"]
        shared.start("bmctl", "distribute")
        assert shared.end(1) == 3
        assert "is being trained with another recipe: it says seed: 0, this one seed: 7" in " ".join(
            shared.said(1).split()
        )
        shared.parents[0].send_signal(signal.SIGTERM)
        assert shared.end(0) == 75, shared.told()
        assert "latest" in steps(shared.run)
