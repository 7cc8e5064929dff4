"""A command that native code kills says so, ends with 10, leaves nothing behind, and does its work when run again."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.engine.runs import environment

RECIPE = """
name: tiny
model: {name: "bmctl:mlp", args: {hidden: [16]}}
data: {source: {kind: bundled}, train: {limit: 128}, val: {limit: 32}, test: {limit: 32}}
task: {kind: classify}
train: {epochs: 2, batch_size: 32, precision: fp32, checkpoint_every_steps: 2}
compress: [{method: svd, ratio: 0.8, recover: {fit: {epochs: 1, batch_size: 32, precision: fp32}}}]
export: {backends: [onnxruntime]}
launch: {device: cpu}
"""


def bmctl(folder: Path, *command: str, fault: str = "", at: str = "") -> subprocess.CompletedProcess[str]:
    env = environment(fault=fault) | ({"BMCTL_TEST_AT": at} if at else {})
    argv = [sys.executable, "-m", "bmctl", *command]
    return subprocess.run(argv, cwd=folder, env=env, capture_output=True, text=True, timeout=240, check=False)


def check_told(done: subprocess.CompletedProcess[str], *, what: str, how: str) -> None:
    assert done.returncode == 10, done.stderr
    assert done.stdout == ""
    told = done.stderr[done.stderr.index("error: ") :]
    assert re.match(rf"error: {what} was killed by {how}", told), told
    assert " in strike\n" in told, "the stack"
    assert "Traceback" not in done.stderr


def leftovers(folder: Path) -> list[str]:
    """Of a run: hidden files and folders but its lock."""
    return [str(path) for path in (folder / "run").rglob(".*") if path.name != ".lock"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a training was killed, and then done."""
    folder = tmp_path_factory.mktemp("deaths")
    (folder / "r.yaml").write_text(RECIPE)
    killed = bmctl(folder, "train", "-r", "./r.yaml", "-o", "run", fault="abort:0:5")
    check_told(killed, what="train", how="SIGABRT after step 5, training")
    assert "to go on: bmctl train -r ./r.yaml -o run --resume\n" in killed.stderr
    assert "in strike" in (folder / "run" / "logs" / "crash.log").read_text()
    done = bmctl(folder, "train", "-r", "./r.yaml", "-o", "run", "--resume")
    assert done.returncode == 0, done.stderr
    assert "going on from step 4 of 8" in done.stderr or "going on from step 2 of 8" in done.stderr
    return folder


def test_train(trained: Path) -> None:
    assert (trained / "run" / "packages" / "00-train").is_dir()
    assert not leftovers(trained)


def test_infer(trained: Path) -> None:
    command = ("infer", "bundled:samples", "-m", "run", "--to", "found.jsonl", "--backend", "eager")
    check_told(bmctl(trained, *command, fault="segv", at="store:atomic-written"), what="infer", how="SIGSEGV\n")
    assert not (trained / "found.jsonl").exists()
    done = bmctl(trained, *command)
    assert done.returncode == 0, done.stderr
    assert len((trained / "found.jsonl").read_text().splitlines()) == 10


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "fault", "at", "what", "made"),
    [
        pytest.param("compress", "segv", "store:written", "01-svd", "packages/01-svd", id="compress"),
        pytest.param("export", "abort", "store:written", "export", "deploy/onnxruntime", id="export"),
        pytest.param("evaluate", "kill", "store:atomic-written", "evaluate", "", id="evaluate"),
    ],
)
def test_stages(trained: Path, command: str, fault: str, at: str, what: str, made: str) -> None:
    killed = bmctl(trained, command, "-o", "run", fault=fault, at=at)
    if fault == "kill":
        assert killed.returncode == 10, killed.stderr
        assert f"error: {what} was killed by SIGKILL (out of memory?)\n  hint: when memory is short" in killed.stderr
    else:
        check_told(killed, what=what, how=r"SIG(SEGV after step \d, \w+|ABRT)\n")
    going_on = re.search("to go on: bmctl (.+)$", killed.stderr, re.MULTILINE)
    assert going_on is not None
    done = bmctl(trained, *going_on[1].split())
    assert done.returncode == 0, done.stderr
    assert (trained / "run" / made).is_dir()
    assert not leftovers(trained)
