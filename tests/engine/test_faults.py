"""One process dies, hangs or is stopped: the others end or begin again, the message names it, nothing is lost."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tests.engine.runs import Ended, make_run, run_to_end, same, weights

from bmctl.job import outcome_path
from bmctl.processes.attempts import Attempts

pytestmark = pytest.mark.slow

# Saved in the foreground: the message names the newest checkpoint.
SMALL = (
    "train.checkpoint_every_steps=4",
    "train.epochs=2",
    "train.async_checkpoints=false",
    "model.args.hidden=[16]",
)
GROUP = (*SMALL, "launch.nproc=2")
QUICK = "launch.timeout_s=15"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """What two processes come to when nothing happens."""
    run = make_run(tmp_path_factory.mktemp("whole"), *GROUP)
    ended = run_to_end(run)
    assert ended.code == 0, ended.stderr
    return run


# -- a group is begun again ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("segv:1:6", r"rank 1 was killed by SIGSEGV; restart 1 of 3 from step 4"),
        ("exit:0:7", r"rank 0 exited with 91; restart 1 of 3 from step 4"),
        ("kill:1:9", r"rank 1 was killed by SIGKILL \(out of memory\?\); restart 1 of 3 from step 8"),
        ("bug:0:6", r"rank 0 failed: ZeroDivisionError: a bug; restart 1 of 3 from step 4"),
        ("stop:1:6", r"rank 1 has not moved for \d+ s .* after step 6, training; it is stopped \(SIGSTOP\); restart 1"),
        ("hold:0:6", r"rank 0 has not moved for \d+ s .* its interpreter does not run; restart 1"),
        (
            "hang:1:10:evaluating",
            r"rank 1 has not moved .* step 10, evaluating; it is stuck in strike .*restart 1",
        ),
    ],
)
def test_a_group_that_lost_one_goes_on_bit_for_bit(tmp_path: Path, whole: Path, fault: str, said: str) -> None:
    run = make_run(tmp_path, *GROUP, QUICK) if "has not moved" in said else make_run(tmp_path, *GROUP)
    ended = run_to_end(run, fault=fault, BMCTL_TEST_ONCE="1")
    assert ended.code == 0, ended.stderr
    assert re.search(said, ended.seen.notes), ended.seen.notes
    assert "going on from step" in ended.seen.notes
    assert same(weights(run), weights(whole))
    log = (run / "logs" / "rank-1.log").read_text()
    assert len(re.findall(r"^=== .* rank 1 of 2, process \d+, restart [01]$", log, re.MULTILINE)) == 2
    assert not list((run / "logs").glob("attempts-*")), "it is done"


def test_one_that_dies_before_the_first_step(tmp_path: Path, whole: Path) -> None:
    run = make_run(tmp_path, *GROUP)
    ended = run_to_end(run, fault="exit:1:-1", BMCTL_TEST_ONCE="1")
    assert ended.code == 0, ended.stderr
    assert "rank 1 exited with 91; restart 1 of 3 from the beginning" in ended.seen.notes
    assert same(weights(run), weights(whole))


def test_without_restarts_it_ends_and_goes_on_later(tmp_path: Path, whole: Path) -> None:
    run = make_run(tmp_path, *GROUP, "launch.max_restarts=0")
    ended = run_to_end(run, fault="exit:1:7")
    assert ended.code == 10
    assert ended.error["message"].startswith("rank 1 exited with 91")
    assert ended.error["hint"].endswith("rank-1.log")
    ended = run_to_end(run, "--resume")
    assert ended.code == 0, ended.stderr
    assert same(weights(run), weights(whole))


def test_an_error_of_ours_is_not_tried_again(tmp_path: Path) -> None:
    run = make_run(tmp_path, *GROUP)
    ended = run_to_end(run, fault="data:1:6")
    assert ended.code == 4
    assert ended.error["message"] == "rank 1: sample 7 cannot be read"
    assert (run / "logs" / "rank-1.log").read_text().count("===") == 1
    assert "restart" not in ended.seen.notes


# -- what does not get any further --------------------------------------------------------------------


def test_a_group_that_gets_no_further_is_given_up(tmp_path: Path) -> None:
    run = make_run(tmp_path, *GROUP, "launch.max_restarts=50")
    ended = run_to_end(run, fault="segv:1:6")
    stuck(ended, told="rank 1 was killed by SIGSEGV", where="at the checkpoint of step 4")
    assert "restart 3" in ended.seen.notes, "the first start got to step 4"
    assert "restart 4" not in ended.seen.notes
    stuck(run_to_end(run, "--resume"), told="rank 1 was killed by SIGSEGV", where="at the checkpoint of step 4")
    Attempts(run, "train").path.unlink()
    assert run_to_end(run, "--resume").code == 0, "once it is mended"


def stuck(ended: Ended, *, told: str, where: str) -> None:
    assert ended.code == 93, ended.stderr
    assert ended.error["error"] == "StuckError"
    assert ended.error["message"].count(told) == 3
    assert where in ended.error["message"]


def test_one_process_that_gets_no_further_is_given_up(tmp_path: Path) -> None:
    run = make_run(tmp_path, *SMALL)
    for _ in range(3):
        assert run_to_end(run, "--resume", fault="kill:0:2").code == -9
    stuck(run_to_end(run, "--resume"), told="killed", where="before the first checkpoint")


# -- one process alone --------------------------------------------------------------------------------


def test_one_process_that_hangs_ends_itself(tmp_path: Path) -> None:
    run = make_run(tmp_path, *SMALL, QUICK)
    ended = run_to_end(run, fault="hang:0:6")
    assert ended.code == 10
    assert "after step 6, training; it is stuck in strike" in ended.error["message"]
    assert "in strike" in (run / "logs" / "rank-0.log").read_text()
    assert run_to_end(run, "--resume").code == 0


def test_one_process_that_cannot_be_interrupted_ends_all_the_same(tmp_path: Path) -> None:
    ended = run_to_end(make_run(tmp_path, *SMALL, QUICK), fault="deaf:0:6")
    assert ended.code == 10
    assert re.match(r"error: rank 0 has not moved for .*\n  hint: the stacks are in .*rank-0.log", ended.stderr)


# -- signals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "env", "code"),
    [
        pytest.param("SIGTERM:1:6", {}, 75, id="one-rank"),
        pytest.param("SIGINT:1:6", {}, 130, id="one-rank-interrupted"),
        pytest.param("SIGTERM:0:10:evaluating", {}, 75, id="evaluating"),
        pytest.param("SIGUSR1:0:0", {"BMCTL_TEST_AT": "store:written"}, 75, id="saving"),
    ],
)
def test_a_signal_to_one_rank_stops_all(
    tmp_path: Path, whole: Path, fault: str, env: dict[str, str], code: int
) -> None:
    run = make_run(tmp_path, *GROUP)
    ended = run_to_end(run, fault=fault, **env)
    assert ended.code == code, ended.stderr
    assert json.loads(outcome_path(run).read_text())["exit_code"] == code
    ended = run_to_end(run, "--resume")
    assert ended.code == 0, ended.stderr
    assert same(weights(run), weights(whole))


@pytest.mark.parametrize(
    ("fault", "env", "code"),
    [
        pytest.param("SIGTERM:0:10:evaluating", {}, 75, id="evaluating"),
        pytest.param("SIGTERM:0:0", {"BMCTL_TEST_AT": "store:written"}, 75, id="saving"),
        pytest.param("SIGINT:0:-1", {}, 130, id="before-the-first-step"),
    ],
)
def test_a_signal_to_one_process(tmp_path: Path, fault: str, env: dict[str, str], code: int) -> None:
    run = make_run(tmp_path, *SMALL, "data.num_workers=2")
    ended = run_to_end(run, fault=fault, **env)
    assert ended.code == code, ended.stderr
    assert run_to_end(run, "--resume").code == 0
