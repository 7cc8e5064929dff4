"""kill -9 at random instants of training and saving, again and again: bit for bit the run that nothing stopped.

The instants that are known to matter have tests of their own, in test_kill.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
from tests.engine.runs import make_run, run_to_end, same, start, weights

from bmctl.errors import StuckError
from bmctl.processes.attempts import Attempts

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1500)]

KILLS = int(os.environ.get("BMCTL_TEST_KILLS", "15"))
LONGEST_S = 0.8
SEED = int(os.environ.get("BMCTL_TEST_SEED", random.SystemRandom().randrange(10**6)))
LONG = (
    "model.args.hidden=[16]",
    "data.input.augment.shift=2",
    "train.epochs=150",
    "train.eval_every_steps=25",
    "train.checkpoint_every_steps=5",
    "launch.max_restarts=50",
)


@pytest.mark.parametrize("asynchronous", ["true", "false"])
@pytest.mark.parametrize("nproc", [1, 2])
def test_killed_at_random_instants(tmp_path: Path, nproc: int, asynchronous: str) -> None:
    chance = random.Random(f"{SEED} {nproc} {asynchronous}")
    print(f"BMCTL_TEST_SEED={SEED}")
    overrides = (*LONG, f"launch.nproc={nproc}", f"train.async_checkpoints={asynchronous}")
    whole = make_run(tmp_path, *overrides, name="whole")
    assert run_to_end(whole).code == 0
    left = KILLS
    while left > 0:  # a fast machine is done before it was killed often enough
        run = make_run(tmp_path, *overrides, name=f"run-{left}")
        left = kill_often(run, left, chance)
        assert same(weights(run), weights(whole)), f"BMCTL_TEST_SEED={SEED}"
        assert not list(run.glob("checkpoints/*/*.corrupt")), "what was published is whole"


def kill_often(run: Path, most: int, chance: random.Random) -> int:
    """Train to the end, killed up to `most` times; how many are left."""
    while True:
        Attempts(run, "train").forget()  # nobody is as unlucky as this
        process = start(run, "--resume")
        begun = Begun(process)
        while most > 0 and begun.wait():
            time.sleep(chance.uniform(0, LONGEST_S))
            if process.poll() is None:
                most -= kill(run, process, chance)
        code = begun.end()
        if code == 0:
            return most
        # Three kills may fall before the next checkpoint: then the parent gives up, and is asked again.
        assert code in (-signal.SIGKILL, StuckError.exit_code), begun.stderr


def kill(run: Path, process: subprocess.Popen[str], chance: random.Random) -> int:
    """kill -9 the parent, a rank, or all at once."""
    ranks = [int(path.read_text()) for path in (run / "logs").glob("rank-?.pid")]
    victims = chance.choice([[process.pid], *[[pid] for pid in ranks], [process.pid, *ranks]])
    for pid in victims:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return 1


class Begun:
    """Reads what a training says, and waits for its loop to begin, and to begin again."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process, self.starts, self.seen, self.stderr = process, threading.Semaphore(0), threading.Event(), ""
        self.readers = [threading.Thread(target=self.read), threading.Thread(target=self.read_errors)]
        for reader in self.readers:
            reader.start()

    def read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if json.loads(line)["event"] == "start":
                self.starts.release()
        self.seen.set()
        self.starts.release()

    def read_errors(self) -> None:
        assert self.process.stderr is not None
        self.stderr = self.process.stderr.read()

    def wait(self) -> bool:
        """Whether it has begun, and goes on."""
        self.starts.acquire()
        return not self.seen.is_set()

    def end(self) -> int:
        code = self.process.wait(timeout=600)
        for reader in self.readers:
            reader.join()
        return code
