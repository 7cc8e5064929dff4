"""Three starts that get no further end in 93; what was told, or got further, does not count."""

from __future__ import annotations

from pathlib import Path

import pytest

from bmctl.errors import DataError, InterruptedRunError, PreemptedError, StuckError, WorkerError
from bmctl.processes.attempts import MOST, UNKNOWN, Attempts


@pytest.fixture
def attempts(tmp_path: Path) -> Attempts:
    return Attempts(tmp_path, "train")


def save(attempts: Attempts, step: int) -> None:
    (attempts.run / "checkpoints" / "train" / f"step-{step:08d}").mkdir(parents=True)


def begin_often(attempts: Attempts, error: BaseException | None, **given) -> None:
    for _ in range(MOST + 2):
        attempts.begin()
        attempts.end(error, **given)


def test_the_fourth_start_is_refused(attempts: Attempts) -> None:
    save(attempts, 40)
    for _ in range(MOST):
        attempts.begin()  # and then kill -9
    with pytest.raises(StuckError, match="3 starts in a row got no further, at the checkpoint of step 40") as caught:
        attempts.begin()
    assert caught.value.exit_code == 93
    assert caught.value.message.count(UNKNOWN) == MOST
    assert f"rm {attempts.path}" in caught.value.hint
    assert "rank-*.log" in caught.value.hint


def test_before_the_first_checkpoint_too(attempts: Attempts) -> None:
    for how in ("rank 1 was killed by SIGSEGV", "rank 0 exited with 91", "rank 1 hangs"):
        attempts.begin()
        attempts.say(how)
    with pytest.raises(StuckError, match="before the first checkpoint") as caught:
        attempts.check()
    assert "rank 0 exited with 91" in caught.value.message


def test_progress_clears(attempts: Attempts) -> None:
    for step in range(1, 10):
        attempts.begin()
        attempts.check()
        save(attempts, step)
        attempts.check()
    assert attempts.path.exists()
    attempts.end(None)
    assert not attempts.path.exists()


def test_starting_afresh_clears(attempts: Attempts) -> None:
    for _ in range(MOST):
        attempts.begin()
    attempts.begin(afresh=True)
    attempts.begin()


@pytest.mark.parametrize(
    "error",
    [
        DataError("sample 7"),
        InterruptedRunError("SIGINT", exit_code=130),
        KeyboardInterrupt(),
    ],
)
def test_what_a_person_did_or_was_told_does_not_count(attempts: Attempts, error: BaseException) -> None:
    begin_often(attempts, error)


@pytest.mark.parametrize(
    "error",
    [
        WorkerError("rank 1 died"),
        InterruptedRunError("SIGTERM", exit_code=143),
        PreemptedError("nothing new was published"),
        ZeroDivisionError("a bug"),
    ],
)
def test_what_only_repeats_itself_counts(attempts: Attempts, error: BaseException) -> None:
    with pytest.raises(StuckError, match=str(error)):
        begin_often(attempts, error)


def test_a_preemption_that_published_does_not_count(attempts: Attempts) -> None:
    for step in range(1, 10):
        attempts.begin()
        save(attempts, step)
        attempts.end(PreemptedError("stopped"))


def test_elastic_stops_do_not_count(attempts: Attempts) -> None:
    begin_often(attempts, PreemptedError("machines come and go"), is_elastic=True)


@pytest.mark.parametrize("text", ["", "null", "[1]", '[{"step": 1}]', "{"])
def test_a_broken_record_is_no_obstacle(attempts: Attempts, text: str) -> None:
    attempts.path.parent.mkdir()
    attempts.path.write_text(text)
    attempts.begin()
    assert UNKNOWN in attempts.path.read_text()
