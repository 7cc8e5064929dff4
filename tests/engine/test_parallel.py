"""Who is in the group, what it agrees on, and that several processes do what one would."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.engine.runs import distance, environment, make_run, run_to_end, weights

from bmctl.engine.parallel import Group, agree, check_batch, gather, join, leave, settle
from bmctl.errors import DataError, DependencyError, RecipeError, UsageError
from bmctl.recipe import LaunchConfig

ALONE = Group(rank=0, local_rank=0, world=1, device=torch.device("cpu"), threads=1)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    threads = torch.get_num_threads()
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    yield
    torch.set_num_threads(threads)


def test_alone_there_is_no_process_group() -> None:
    group = join(LaunchConfig(device="cpu"))
    assert (group.rank, group.world, group.leads) == (0, 1, True)
    assert not torch.distributed.is_initialized()
    leave(group)


@pytest.mark.parametrize(
    ("config", "env", "threads"),
    [
        ({"threads": 3}, {"OMP_NUM_THREADS": "2"}, 3),
        ({}, {"OMP_NUM_THREADS": "2"}, 2),
        ({}, {"LOCAL_WORLD_SIZE": "1"}, len(os.sched_getaffinity(0))),
        ({}, {"LOCAL_WORLD_SIZE": "64"}, 1),
    ],
)
def test_threads(monkeypatch, config, env, threads) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert join(LaunchConfig(device="cpu", **config)).threads == threads == torch.get_num_threads()


def test_a_gpu_that_is_not_there(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DependencyError, match="sees no GPU") as caught:
        join(LaunchConfig(device="cuda"))
    assert caught.value.exit_code == 6
    assert join(LaunchConfig(device="auto")).device.type == "cpu"


def test_fewer_gpus_than_processes(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(DependencyError, match="2 processes, but torch sees 1"):
        join(LaunchConfig(device="cuda"))


@pytest.mark.parametrize("env", [{"WORLD_SIZE": "2"}, {"WORLD_SIZE": "two"}])
def test_half_an_environment_is_refused(monkeypatch, env) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="WORLD_SIZE"):
        join(LaunchConfig(device="cpu"))


def test_a_batch_that_cannot_be_shared() -> None:
    group = Group(rank=0, local_rank=0, world=3, device=torch.device("cpu"), threads=1)
    check_batch(group, 33)
    with pytest.raises(RecipeError, match="32 over all processes, which 3") as caught:
        check_batch(group, 32)
    assert caught.value.exit_code == 3
    assert "batch_size=33" in caught.value.hint


def test_one_process_agrees_with_itself() -> None:
    assert agree(ALONE, True)
    assert not agree(ALONE, False)
    assert gather(ALONE, {"a": 1}) == [{"a": 1}]
    settle(ALONE, None)
    with pytest.raises(DataError, match="mine"):
        settle(ALONE, DataError("mine"))


WORKER = """
import sys
from bmctl.engine.parallel import agree, barrier, gather, join, leave, settle
from bmctl.errors import DataError
from bmctl.recipe import LaunchConfig

group = join(LaunchConfig(device="cpu", timeout_s=60))
assert group.world == 2 and group.threads == 1
assert agree(group, group.rank == 1) and not agree(group, False)
texts = gather(group, {"text": "ü" * group.rank})
assert texts == [{"text": ""}, {"text": "ü"}]
assert gather(group, None) == [None, None]
settle(group, None)
try:
    settle(group, DataError("sample 7", hint="mend it") if group.rank == 1 else None)
except DataError as error:
    assert (error.message, error.hint, error.exit_code) == ("sample 7", "mend it", 4)
else:
    raise AssertionError("no error")
barrier(group)
leave(group)
"""


def test_two_processes_agree(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*torchrun, str(script)], env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


# -- the same weights ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    run = make_run(tmp_path_factory.mktemp("one"), "data.input.augment.shift=2")
    ended = run_to_end(run)
    assert ended.code == 0, ended.stderr
    return run


def test_two_processes_end_with_the_weights_of_one(tmp_path: Path, one: Path) -> None:
    two = make_run(tmp_path, "launch.nproc=2", "data.input.augment.shift=2")
    ended = run_to_end(two)
    assert ended.code == 0, ended.stderr
    assert ended.stderr == ""
    assert distance(weights(one), weights(two)) < 1e-5
    assert "processes:" not in ended.seen.notes


def test_a_broken_sampler_is_seen(tmp_path: Path, one: Path) -> None:
    """The comparison above can fail: here both processes take the same half of every batch."""
    two = make_run(tmp_path, "launch.nproc=2", "data.input.augment.shift=2")
    assert run_to_end(two, fault="sampler").code == 0
    assert distance(weights(one), weights(two)) > 1e-3


@pytest.mark.slow
def test_batch_statistics_are_said_to_differ(tmp_path: Path) -> None:
    run = make_run(tmp_path, "launch.nproc=2", "model.name=bmctl:rescnn", "train.max_steps=2")
    ended = run_to_end(run)
    assert ended.code == 0, ended.stderr
    assert "batch statistics are taken over each process's part of a batch" in ended.seen.notes
