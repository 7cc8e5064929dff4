"""Work in a guarded child: its exit codes and signals are those of one process alone, and its death is told."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bmctl.processes.attempts import Attempts

# What `bmctl.cli` does with a command, without the command: work that is told what to do, one word after another.
SCRIPT = """
import ctypes, os, signal, sys, time
from bmctl.errors import BmctlError
from bmctl.processes.guard import guarded, note

def say(*words):
    print(*words, flush=True)

def caught(signum, frame):
    say("caught", signal.Signals(signum).name)

def work():
    word, *rest = sys.argv[1:]
    if word == "exit":
        return int(rest[0])
    if word == "abort":
        os.abort()
    if word == "segv":
        ctypes.string_at(0)
    if word == "die":
        note(run=rest[1])
        note(stage="train")
        os.kill(os.getpid(), getattr(signal, rest[0]))
    if word == "listen":
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, caught)
        signal.signal(signal.SIGUSR1, lambda *_: sys.exit(0))
    say("ready", os.getpid(), os.getppid())
    end = time.monotonic() + float(rest[0])
    while (left := end - time.monotonic()) > 0:
        time.sleep(left)
    return 0

try:
    code = guarded(work, again=["train", "-r", "my recipe.yaml", "--resume"])
except BmctlError as error:
    say(error.message)
    say(error.hint)
    code = error.exit_code
sys.exit(code)
"""
APART_S = 0.5
"""Longer than what counts as the same signal."""


def start(*words: str, **given: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCRIPT, *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **given)  # type: ignore[call-overload]


def ready(process: subprocess.Popen[str]) -> int:
    """The process that does the work."""
    assert process.stdout is not None
    _, child, parent = process.stdout.readline().split()
    assert int(parent) == process.pid
    return int(child)


def run(*words: str, **given: object) -> tuple[int, str]:
    process = start(*words, **given)
    out, err = process.communicate(timeout=60)
    assert not err
    return process.returncode, out


@pytest.mark.parametrize("code", [0, 75])
def test_exit_codes_are_the_works(code: int) -> None:
    assert run("exit", str(code)) == (code, "")


def test_also_where_ends_of_children_are_ignored() -> None:
    ignore = lambda: signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # noqa: E731
    assert run("exit", "8", preexec_fn=ignore) == (8, "")


@pytest.mark.parametrize(("word", "name"), [("abort", "SIGABRT"), ("segv", "SIGSEGV")])
def test_a_crash_is_told_with_its_stack(word: str, name: str) -> None:
    code, out = run(word)
    assert code == 10
    assert out.startswith(f"train was killed by {name}\n")
    assert '  File "<string>", line' in out
    assert " in work\n" in out


def test_a_crash_is_kept_with_its_run(tmp_path: Path) -> None:
    attempts = Attempts(tmp_path, "train")
    attempts.begin()
    code, out = run("die", "SIGBUS", str(tmp_path))
    assert code == 10
    log = tmp_path / "logs" / "crash.log"
    assert f"the stacks are in {log}; " in out
    assert "to go on: bmctl train -r 'my recipe.yaml' --resume\n" in out
    assert "train was killed by SIGBUS\nFatal Python error: Bus error\n" in log.read_text()
    (found,) = json.loads(attempts.path.read_text())
    assert found["how"] == "train was killed by SIGBUS"


def test_what_the_kernel_kills_leaves_no_stack(tmp_path: Path) -> None:
    code, out = run("die", "SIGKILL", str(tmp_path))
    assert code == 10
    assert out.startswith("train was killed by SIGKILL (out of memory?)\nwhen memory is short")
    assert not (tmp_path / "logs").exists()


def test_a_signal_that_nobody_catches_ends_both() -> None:
    process = start("wait", "60")
    child = ready(process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == -signal.SIGTERM
    assert is_gone(child)


def test_a_signal_arrives_as_often_as_it_is_sent() -> None:
    """To the parent, to the child, to their group, and as `timeout` does it."""
    process = start("listen", "60", start_new_session=True)
    parent, child = process.pid, ready(process)
    ways: list[list[Callable[[], None]]] = [
        [lambda: os.kill(parent, signal.SIGTERM)],
        [lambda: os.kill(parent, signal.SIGTERM)],
        [lambda: os.kill(child, signal.SIGTERM)],
        [lambda: os.killpg(parent, signal.SIGTERM)],
        [lambda: os.kill(parent, signal.SIGTERM), lambda: os.killpg(parent, signal.SIGTERM)],
    ]
    assert process.stdout is not None
    for way in ways:
        for send in way:
            send()
        assert process.stdout.readline() == "caught SIGTERM\n"
        time.sleep(APART_S)
    os.kill(parent, signal.SIGUSR1)
    assert process.communicate(timeout=60)[0] == "", "none of them arrived twice"
    assert process.returncode == 0


def test_ctrl_c_arrives_once() -> None:
    """From a terminal, which tells the parent too."""
    main, end = pty.openpty()

    def own_terminal() -> None:
        os.setsid()
        os.close(os.open(os.ttyname(end), os.O_RDWR))  # the first that a session opens is its own

    process = start("listen", "1", stdin=end, preexec_fn=own_terminal)
    ready(process)
    os.write(main, b"\x03")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert out == "caught SIGINT\n"
    os.close(main)
    os.close(end)


def test_the_work_does_not_outlive_its_parent() -> None:
    process = start("wait", "60")
    child = ready(process)
    process.kill()
    assert process.wait(timeout=60) == -signal.SIGKILL
    assert is_gone(child)


def test_workers_of_torchrun_are_not_guarded_again() -> None:
    process = start("wait", "0", env=os.environ | {"RANK": "0", "WORLD_SIZE": "1"})
    out, _ = process.communicate(timeout=60)
    assert out.split()[1] == str(process.pid)


def is_gone(pid: int) -> bool:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.02)
    return False
