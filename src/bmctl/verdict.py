"""How a group of processes failed: which failure came first, told in one error."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bmctl.errors import BmctlError, InterruptedRunError, WorkerError, error_from_dict
from bmctl.job import Logs, read_record

TAIL_LINES = 8
HEADING = "=== "
"""Begins the line of a rank's log that a new process writes first."""


@dataclass(frozen=True)
class Failure:
    """What ended a group of processes.

    Attributes:
        error: What to tell.
        brief: The same in one line, without the log.
        is_final: To begin again would end the same way: an error of ours that is not about a process that died.
        is_echo: The processes here only noticed that one of another machine was gone.
        is_ours: Some process recorded it: nothing was killed from outside.
    """

    error: BmctlError
    brief: str
    is_final: bool = False
    is_echo: bool = False
    is_ours: bool = False


def judge(
    logs: Logs, workers: Mapping[int, int], died: Mapping[int, int], *, hang: WorkerError | None = None
) -> Failure:
    """The first failure of a group.

    Args:
        workers: Process id by rank, of this machine.
        died: Exit code of those that had failed when the first failure was seen; -N for signal N.
        hang: What the watch found before it killed them.
    """
    if hang is not None:
        return Failure(hang, hang.message.splitlines()[0])
    errors = [found for rank, pid in workers.items() if (found := read_record(logs.error(rank), pid=pid)) is not None]
    errors.sort(key=lambda error: error["time"])
    first = next((error for error in errors if not error["lost_peer"]), None)
    if first is not None:
        return _told(first, logs)
    # Whoever left no record was killed; the others only noticed, unless one had waited too long before.
    silent = sorted(set(died) - {error["rank"] for error in errors})
    if silent and not (errors and "timed out" in errors[0]["message"].lower()):
        return _died(silent[0], died[silent[0]], logs)
    if errors:
        return _told(errors[0], logs)
    return Failure(WorkerError("the workers could not be started", hint=f"read {logs.agent}"), "no worker began")


def _told(error: Mapping[str, Any], logs: Logs) -> Failure:
    rank, log = error["rank"], logs.of_rank(error["rank"])
    if error["lost_peer"]:
        brief = f"rank {rank} lost the others, or waited for them too long: {error['message']}"
        return Failure(WorkerError(brief, hint=f"read {logs.folder}/rank-*.log"), brief, is_echo=True, is_ours=True)
    if error["exit_code"] == 10 and error["error"] != "WorkerError":
        brief = f"rank {rank} failed: {error['error']}: {error['message']}"
        return Failure(WorkerError(f"{brief}\n{last_lines(logs, rank)}", hint=f"read {log}"), brief, is_ours=True)
    ours = error_from_dict(error, prefix=f"rank {rank}: ")
    is_final = not isinstance(ours, WorkerError | InterruptedRunError)
    return Failure(ours, ours.message, is_final=is_final, is_ours=True)


def _died(rank: int, exit_code: int, logs: Logs) -> Failure:
    brief = f"rank {rank} {how_ended(exit_code)}"
    message = f"{brief}\n{last_lines(logs, rank)}".strip()
    return Failure(WorkerError(message, hint=f"read {logs.of_rank(rank)}"), brief)


def how_ended(exit_code: int) -> str:
    """An exit code in words; -N is signal N."""
    if exit_code >= 0:
        return f"exited with {exit_code}"
    try:
        name = signal.Signals(-exit_code).name
    except ValueError:
        name = f"signal {-exit_code}"
    return f"was killed by {name}" + (" (out of memory?)" if exit_code == -signal.SIGKILL else "")


def last_lines(logs: Logs, rank: int) -> str:
    """The end of what a rank's newest process wrote."""
    try:
        lines = logs.of_rank(rank).read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return ""
    begun = max((i for i, line in enumerate(lines) if line.startswith(HEADING)), default=-1)
    return "\n".join(crash_lines(lines[begun + 1 :]))


def crash_lines(lines: Sequence[str]) -> list[str]:
    """Of the stacks that a crash leaves, the one that crashed, innermost first; else the last lines."""
    lines = [line for line in lines if line.strip() and not line.startswith("Extension modules:")]
    crashed = next((i for i, line in enumerate(lines) if line.startswith("Current thread")), None)
    shown = lines[-TAIL_LINES:] if crashed is None else lines[crashed : crashed + TAIL_LINES]
    return [f"  {line}" for line in shown]
