"""The controller: contenders in processes of their own, of which one computes at a time, in interleaved rounds."""

from __future__ import annotations

import json
import os
import random
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bmctl.core.stats import Interval, ratio_interval
from bmctl.engine.computing.precision import choose_precision
from bmctl.engine.parallel import num_cores

ROOT = Path(__file__).parents[2]
ROUNDS = int(os.environ.get("BMCTL_BENCH_ROUNDS", "30"))
VALIDATION_ROUNDS = min(ROUNDS, 9)
"""In which settings are chosen: those that are reported come after them, and know nothing of the choice."""
PATIENCE_S = 600.0
"""With a contender that says nothing: torch.compile takes minutes."""
SETTLE_S = 0.02
"""Threads that have finished spin for a moment before they sleep."""
needs_bf16 = pytest.mark.skipif(
    choose_precision("auto", torch.device("cpu")).name != "bf16", reason="this CPU has no bf16 instructions"
)


def environments(world: int) -> list[dict[str, str]]:
    """Of each process of a group on this machine; threads are for the processes to set."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "MKL_", "BMCTL_"))}
    if world == 1:
        return [clean]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    sizes = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    return [clean | meeting | sizes | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]


class Contender:
    """One loop at its gate: a process, or the several processes of a group.

    Attributes:
        about: What it said of itself.

    Args:
        name: Of contender.PEERS, or ``bmctl``.
        workload: Of workloads.WORKLOADS.
        folder: For what the processes print, and for bmctl's run.
        label: Of their files there, if a name is not enough.
        world: Processes.
        apart: They are no group: each trains for itself, at the same time.
        threads: Of each of them; None is all cores.
        given: Further arguments, as in contender.py.
    """

    def __init__(
        self,
        name: str,
        workload: str,
        *,
        folder: Path,
        label: str | None = None,
        world: int = 1,
        apart: bool = False,
        threads: int | None = None,
        **given: object,
    ) -> None:
        self._log = folder / f"{label or name}.log"
        arguments = {"threads": threads or num_cores(), **given}
        self._processes = []
        for number, environment in enumerate(environments(1) * world if apart else environments(world)):
            if name == "bmctl":
                arguments["run"] = folder / f"{label or name}-run{number if apart else ''}"
            words = [f"{key}={value}" for key, value in arguments.items()]
            with self._log.open("a") as log:
                self._processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "tests.benchmarks.contender", name, workload, *words],
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=log,
                        text=True,
                        cwd=ROOT,
                        env=environment,
                    )
                )
        self.about = ""

    def wait(self) -> None:
        """Until the loop has come to its first step."""
        for process in self._processes:
            self._read(process)

    def run(self, steps: int, *, clock: str = "seconds") -> float:
        """Seconds of one step, over `steps` of them, by a clock of `Gate`; of a group those of its slowest process."""
        time.sleep(SETTLE_S)
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps({"steps": steps}) + "\n")
            process.stdin.flush()
        return max(self._read(process)[clock] for process in self._processes)

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.communicate()

    def _read(self, process: subprocess.Popen[str]) -> dict[str, Any]:
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], PATIENCE_S)
        line = process.stdout.readline() if ready else ""
        if not line:
            state = "said nothing for too long" if ready == [] else f"ended with {process.wait()}"
            raise RuntimeError(f"a contender {state}:\n{self._log.read_text()[-3000:]}")
        answer = json.loads(line)
        self.about = answer["about"]
        return answer


@contextmanager
def contenders(made: Mapping[str, Mapping[str, Any]], *, folder: Path) -> Iterator[dict[str, Contender]]:
    """Start them, each waiting at its gate; end them all.

    Args:
        made: Label -> arguments of `Contender`.
    """
    with ExitStack() as stack:
        started = {}
        for label, arguments in made.items():
            started[label] = Contender(folder=folder, label=label, **arguments)
            stack.callback(started[label].close)
        for contender in started.values():
            contender.wait()
        yield started


def interleave(
    them: Mapping[str, Contender],
    *,
    steps: int | Mapping[str, int],
    warm_up: int,
    rounds: int = ROUNDS,
    clock: str = "seconds",
) -> dict[str, np.ndarray]:
    """Seconds per step, [rounds] for each: in every round each has its turn, in an order drawn anew.

    Args:
        steps: Of a turn; one number, or one for each.
        warm_up: Steps of each before the first round.
        clock: Of `Gate`: `seconds` of the wall, or of the processor, which others do not slow down.
    """
    turn = dict.fromkeys(them, steps) if isinstance(steps, int) else dict(steps)
    for contender in them.values():
        contender.run(warm_up)
    order, drawn = list(them), random.Random(0)
    took: dict[str, list[float]] = {label: [] for label in them}
    for _ in range(rounds):
        drawn.shuffle(order)
        for label in order:
            took[label].append(them[label].run(turn[label], clock=clock))
    return {label: np.array(seconds) for label, seconds in took.items()}


def fastest(
    tried: Mapping[str, Mapping[str, Any]], *, folder: Path, steps: int, warm_up: int
) -> tuple[str, dict[str, np.ndarray]]:
    """The label of the settings whose steps take the shortest, and the seconds per step of all.

    Args:
        tried: Label -> arguments of `Contender`.
    """
    with contenders(tried, folder=folder) as them:
        seconds = interleave(them, steps=steps, warm_up=warm_up, rounds=VALIDATION_ROUNDS)
    return min(seconds, key=lambda label: float(np.median(seconds[label]))), seconds


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> tuple[float, Interval]:
    """Of medians, with its 95 % interval over redrawn rounds."""
    return float(np.median(numerator) / np.median(denominator)), ratio_interval(numerator, denominator)


def difference(first: np.ndarray, second: np.ndarray, *, seed: int = 0) -> tuple[float, Interval]:
    """Median of first - second in the same rounds, with its 95 % interval over redrawn rounds."""
    pairs = first - second
    drawn = np.random.default_rng(seed).integers(0, len(pairs), size=(4000, len(pairs)))
    low, high = np.quantile(np.median(pairs[drawn], axis=1), [0.025, 0.975])
    return float(np.median(pairs)), (float(low), float(high))


def shown(value: float, interval: Interval, *, unit: str = "", digits: int = 3) -> str:
    low, high = interval
    return f"{value:.{digits}f}{unit} [{low:.{digits}f}, {high:.{digits}f}]"


def table(rows: Sequence[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {text}" for name, text in rows)
