"""A job as a group of processes: its events, its failures, its signals."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.engine.runs import SCRIPT, end, environment, make_run, run_to_end, same, start, steps, weights

from bmctl.job import Job, is_worker, outcome_path

GROUP = ("launch.nproc=2", "train.epochs=2")


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, False),
        ({"WORLD_SIZE": "2"}, False),
        ({"WORLD_SIZE": "2", "RANK": "0"}, True),
        ({"TORCHELASTIC_RUN_ID": "x"}, True),
    ],
)
def test_somebody_elses_torchrun_is_known(monkeypatch, env: dict[str, str], expected: bool) -> None:
    for name in ("WORLD_SIZE", "RANK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert is_worker() is expected


def test_a_job_is_plain_data() -> None:
    job = Job(run="runs/a", resume=True)
    assert Job.model_validate_json(job.model_dump_json()) == job


# -- failures -----------------------------------------------------------------------------------------


def test_the_first_failure_speaks_with_its_rank_and_code(tmp_path: Path) -> None:
    run = make_run(tmp_path, *GROUP)
    ended = run_to_end(run, fault="data:1:5")
    assert ended.code == 4
    assert ended.error["error"] == "DataError"
    assert ended.error["message"] == "rank 1: sample 7 cannot be read"
    assert ended.error["hint"] == "mend it"
    assert len(ended.stderr.splitlines()) == 1, "only bmctl speaks"
    assert ended.seen.of("start")
    record = json.loads((run / "logs" / "error-rank-1.json").read_text())
    assert (record["rank"], record["exit_code"]) == (1, 4)
    assert "DataError" in (run / "logs" / "rank-1.log").read_text()


@pytest.mark.slow
def test_a_bug_in_a_worker_shows_its_log(tmp_path: Path) -> None:
    ended = run_to_end(make_run(tmp_path, *GROUP, "launch.max_restarts=0"), fault="bug:0:5")
    assert ended.code == 10
    assert "rank 0 failed: ZeroDivisionError: a bug" in ended.error["message"]
    assert "sitecustomize.py" in ended.error["message"]
    assert "rank-0.log" in ended.error["hint"]


@pytest.mark.slow
def test_a_worker_that_is_killed(tmp_path: Path) -> None:
    ended = run_to_end(make_run(tmp_path, *GROUP, "launch.max_restarts=0"), fault="kill:1:5")
    assert ended.code == 10
    assert "rank 1 was killed by SIGKILL" in ended.error["message"]


@pytest.mark.slow
def test_a_worker_that_hangs_is_bounded(tmp_path: Path) -> None:
    run = make_run(tmp_path, *GROUP, "launch.timeout_s=5", "launch.max_restarts=0")
    ended = run_to_end(run, fault="hang:1:5")
    assert ended.code == 10
    found = ended.error["message"]
    assert re.match(r"rank 1 has not moved for \d+ s \(launch.timeout_s\): after step 5, ", found), found
    assert re.search(r"it is stuck in strike \(sitecustomize.py:\d+\)", found), found
    assert "in strike" in (run / "logs" / "rank-1.log").read_text(), "its stack is kept"


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_the_group(tmp_path: Path) -> None:
    ended = run_to_end(make_run(tmp_path, *GROUP, "train.optimizer={name: sgd, lr: 1e30}"))
    assert ended.code == 9
    assert "the loss is no longer finite" in ended.error["message"]
    assert not list(tmp_path.rglob("step-*"))


# -- signals ------------------------------------------------------------------------------------------


def stop(process: subprocess.Popen[str], *signals: int, at: str = "step") -> None:
    """Signal a process once it has told of an event."""
    assert process.stdout is not None
    if not any(json.loads(line)["event"] == at for line in process.stdout):
        pytest.fail(f"it ended with {process.wait()}: {process.stderr.read() if process.stderr else ''}")
    for signum in signals:
        process.send_signal(signum)
        time.sleep(1)


LONG = ("launch.nproc=2", "train.epochs=400")


def test_a_group_is_preempted_and_goes_on(tmp_path: Path) -> None:
    run = make_run(tmp_path, *LONG)
    process = start(run)
    stop(process, signal.SIGTERM)
    ended = end(process)
    assert ended.code == 75, ended.stderr
    assert ended.error["error"] == "PreemptedError"
    assert len(ended.stderr.splitlines()) == 1
    assert json.loads(outcome_path(run).read_text())["exit_code"] == 75
    newest = steps(run)[-1]
    again = start(run, "--resume")
    stop(again, signal.SIGINT)
    ended = end(again)
    assert ended.code == 130, ended.stderr
    assert f"going on from step {int(newest.removeprefix('step-'))}" in ended.seen.notes or steps(run)[-1] > newest


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("nproc", [1, 2])
def test_every_signal_has_its_code(tmp_path: Path, signum: int, nproc: int) -> None:
    run = make_run(tmp_path, f"launch.nproc={nproc}", "train.epochs=4000")
    process = start(run)
    stop(process, signum)
    ended = end(process)
    assert ended.code == (130 if signum == signal.SIGINT else 75), ended.stderr
    assert any(name.startswith("step-") for name in steps(run))


@pytest.mark.slow
def test_signalled_while_it_loads(tmp_path: Path) -> None:
    run = make_run(tmp_path, *LONG)
    process = start(run)
    while not (run / "logs" / "rank-0.pid").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    ended = end(process)
    assert ended.code == 75, ended.stderr
    assert "stopped at step 1 of 4000" in ended.error["message"]


@pytest.mark.slow
def test_a_second_signal_does_not_wait(tmp_path: Path) -> None:
    run = make_run(tmp_path, *LONG, "launch.timeout_s=60", "train.grace_s=60")
    process = start(run, fault="hang:1:15")
    stop(process, signal.SIGTERM, signal.SIGTERM, at="evaluation")
    ended = end(process, timeout=40)
    assert ended.code == 143, ended.stderr


@pytest.mark.slow
def test_workers_do_not_outlive_their_parent(tmp_path: Path) -> None:
    run = make_run(tmp_path, *LONG)
    process = start(run)
    stop(process, signal.SIGKILL)
    process.wait()
    pids = [int(path.read_text()) for path in (run / "logs").glob("rank-*.pid")]
    assert len(pids) == 2
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}/cmdline").exists() and _is_ours(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.2)


def _is_ours(pid: int) -> bool:
    try:
        return b"bmctl.engine.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


# -- somebody else's torchrun -------------------------------------------------------------------------


def torchrun(run: Path, script: Path, *flags: str) -> subprocess.Popen[str]:
    script.write_text(SCRIPT)
    agent = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [*agent, str(script), str(run), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )


@pytest.mark.slow
def test_under_somebody_elses_torchrun(tmp_path: Path) -> None:
    """It joins that group, and starts none of its own: the same weights as with its own agent."""
    mine, theirs = make_run(tmp_path, *GROUP, name="mine"), make_run(tmp_path, *GROUP, name="theirs")
    assert run_to_end(mine).code == 0
    ended = end(torchrun(theirs, tmp_path / "train.py"))
    assert ended.code == 0, ended.stderr
    assert len(ended.seen.of("start")) == 1, "rank 0 alone speaks"
    assert not (theirs / "logs" / "job.json").exists()
    assert same(weights(mine), weights(theirs))


@pytest.mark.slow
def test_preempted_under_somebody_elses_torchrun(tmp_path: Path) -> None:
    run = make_run(tmp_path, *LONG)
    process = torchrun(run, tmp_path / "train.py")
    stop(process)
    # As a scheduler does: to every process of the job but the agent, which would only pass it on.
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    for pid in children.stdout.split():
        os.kill(int(pid), signal.SIGTERM)
    ended = end(process)
    assert ended.code == 0, ended.stderr
    assert json.loads(outcome_path(run).read_text())["exit_code"] == 75
    assert any(name.startswith("step-") for name in steps(run))
