"""A disk that is full while a run writes what it tells: exit code 7 with the file's name, and no checkpoint is lost.

RLIMIT_FSIZE makes the kernel refuse to let a file grow past a size, as a full disk does; the log at hand starts there.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tests.bad_input import fixtures

from bmctl import disk, rundir
from bmctl.cli import main
from bmctl.engine.training.board import Board
from bmctl.errors import ResourceError
from bmctl.recipe import load_recipe

LIMIT = 2**20
"""Bytes; every other file of a small run is smaller."""


@contextmanager
def files_end_at(size_bytes: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def fill(path: Path, *, up_to: int) -> None:
    """So many bytes of short events."""
    line = json.dumps({"event": "note", "text": "full"}) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text((line * (up_to // len(line) + 1))[:up_to])


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with data, r.yaml, and an empty run/ whose metrics.jsonl will be full in a few lines."""
    fixtures.folder(tmp_path, cache=tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    with rundir.opened(tmp_path / "run", load_recipe(tmp_path / "r.yaml")):
        pass
    return tmp_path


def test_an_event_that_does_not_fit_is_not_written_at_all(tmp_path: Path) -> None:
    fill(tmp_path / "metrics.jsonl", up_to=90)
    with files_end_at(100), pytest.raises(ResourceError, match=r"cannot write .*metrics\.jsonl: ") as caught:
        rundir.append_event(tmp_path, {"event": "note", "text": "longer than ten bytes"})
    assert caught.value.exit_code == 7
    assert (tmp_path / "metrics.jsonl").stat().st_size == 90


def test_a_point_that_does_not_fit_is_not_drawn_at_all(tmp_path: Path) -> None:
    board = Board(tmp_path, purge_step=1)
    board.draw(1, {"train/loss": 0.5})
    (path,) = tmp_path.iterdir()
    with files_end_at(path.stat().st_size + 20), pytest.raises(ResourceError, match=r"cannot write .*events\.out"):
        board.draw(2, {"train/loss": 0.25})
    board.draw(3, {"train/loss": 0.125})
    points = EventAccumulator(str(tmp_path)).Reload().Scalars("train/loss")
    assert [(point.step, point.value) for point in points] == [(1, 0.5), (3, 0.125)]


@pytest.mark.parametrize("room", [0, 900])
def test_training_ends_with_a_checkpoint_and_goes_on_later(
    room: int, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = here / "run" / "metrics.jsonl"
    fill(metrics, up_to=LIMIT - room)
    command = ["train", "-r", "r.yaml", "-o", "run", "--set", "train.epochs=3", "-q"]
    with files_end_at(LIMIT):
        assert main(command) == 7
    assert "error: cannot write run/metrics.jsonl: " in capsys.readouterr().err
    assert not (here / "run" / "packages").exists()
    assert room == 0 or (here / "run" / "checkpoints" / "train" / "latest").exists()
    metrics.unlink()
    assert main([*command, *(["--resume"] if room else [])]) == 0


@pytest.mark.parametrize("command", ["prune run --method magnitude", "export run"])
def test_any_command_says_which_file(command: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "-r", "r.yaml", "-o", "run", "-q"]) == 0
    fill(here / "run" / "metrics.jsonl", up_to=LIMIT)
    with files_end_at(LIMIT):
        assert main(command.split()) == 7
    assert "error: cannot write run/metrics.jsonl: " in capsys.readouterr().err


def test_a_traceback_that_cannot_be_kept_hides_no_bug(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def bug(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("bmctl.stages.first_package", bug)
    (here / "run" / "logs" / "bug.log").mkdir(parents=True)
    assert main(["train", "-r", "r.yaml", "-o", "run"]) == 1
    assert "a bug" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("file", ["metrics.jsonl", "logs/rank-0.log"])
def test_a_group_of_processes_ends_with_a_checkpoint(file: str, here: Path) -> None:
    fill(here / "run" / file, up_to=LIMIT - 900)
    command = ["distribute", "-r", "r.yaml", "-o", "run", "--nproc", "2", "--resume", "--set", "train.epochs=3"]
    line = [sys.executable, "-m", "bmctl", *command]
    limited = ["bash", "-c", f'ulimit -f {LIMIT // 1024}; "$@"', "bash", *line]
    done = subprocess.run(limited, capture_output=True, text=True, timeout=200, check=False)
    if file == "metrics.jsonl":
        assert done.returncode == 7, done.stderr
        assert f"error: cannot write run/{file}: " in done.stderr
        assert (here / "run" / "checkpoints" / "train" / "latest").exists()
        (here / "run" / file).unlink()
        done = subprocess.run(line, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert (here / "run" / "packages" / "00-train").is_dir()


def test_what_is_written_of_an_append_is_taken_back(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"one\n")
    with files_end_at(6), pytest.raises(ResourceError):
        disk.append(tmp_path / "log", b"three\n")
    disk.append(tmp_path / "log", b"two\n")
    assert (tmp_path / "log").read_bytes() == b"one\ntwo\n"
