"""A job in this process, or in a group of processes under torchrun's agent, which runs in this process too."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bmctl import store
from bmctl.disk import disk_errors
from bmctl.errors import BmctlError, InterruptedRunError, PreemptedError, WorkerError, error_from_dict
from bmctl.job import Job as Job
from bmctl.job import Logs, outcome_path, write_outcome
from bmctl.job import is_worker as is_worker
from bmctl.recipe import LaunchConfig, load_recipe
from bmctl.schema import Emit

if TYPE_CHECKING:
    from bmctl.engine.signals import Stop

POLL_S = 0.1
KILL_AFTER_S = 15.0
"""Past the workers' own grace period."""
TAIL_LINES = 8


def launch(job: Job, config: LaunchConfig, *, emit: Emit) -> None:
    """Run a job: here with one process or as somebody's worker, else with `config.nproc` processes.

    Args:
        job: What to do.
        config: The recipe's `launch` section.
        emit: Takes the events of rank 0.

    Raises:
        PreemptedError: Stopped by a signal; a checkpoint was published.
        InterruptedRunError: Stopped by Ctrl-C, or with nothing published.
        WorkerError: A worker died, or failed with what is not an error of ours.
        BmctlError: The first error of any worker, named with its rank.
        SystemExit: A worker of somebody's torchrun was stopped: 0, so that nothing is restarted.
    """
    if is_worker() or config.nproc == 1:
        _run_here(job, config, emit=emit)
    else:
        _run_group(job, config, emit=emit)


def _run_here(job: Job, config: LaunchConfig, *, emit: Emit) -> None:
    from bmctl.engine.signals import catch_signals
    from bmctl.engine.worker import run_job

    rank = int(os.environ.get("RANK", "0")) if is_worker() else 0
    if rank == 0:
        outcome_path(Path(job.run)).unlink(missing_ok=True)
    try:
        with catch_signals() as stop:
            run_job(job, config, emit=emit, stop=stop)
    except (PreemptedError, InterruptedRunError) as stopped:
        if not is_worker():
            raise
        if rank == 0:
            write_outcome(Path(job.run), stopped, rank=rank)
        raise SystemExit(0) from None


# -- a group of processes -----------------------------------------------------------------------------


def _run_group(job: Job, config: LaunchConfig, *, emit: Emit) -> None:
    """Start the workers and stay with them.

    torchrun's agent runs in a thread, so that this one can catch signals: each is handed on once to every worker,
    however late that starts, and the group is given time to publish a checkpoint.
    """
    from bmctl.engine.agent import run_agent
    from bmctl.engine.signals import catch_signals

    run, logs = Path(job.run), Logs(Path(job.run))
    recipe = load_recipe(run / "recipe.yaml")
    grace_s = recipe.train.grace_s if recipe.train else 30.0
    _prepare(job, logs)
    failures: dict[int, int] = {}
    tail = _Tail(logs.events, emit)
    told: set[int] = set()
    with _environment(config), catch_signals(grace_s=grace_s + KILL_AFTER_S) as stop:
        agent = threading.Thread(target=run_agent, args=(config.nproc, logs, grace_s, failures), name="bmctl-agent")
        agent.start()
        try:
            while agent.is_alive():
                agent.join(POLL_S)
                if stop.requested is not None:
                    _hand_on(stop.requested, _pids(logs), told=told)
                tail.read()
        finally:
            while agent.is_alive():  # this thread failed, or was told twice to stop
                _hand_on(signal.SIGKILL, _pids(logs), told=set())
                agent.join(POLL_S)
    tail.read()
    _judge(logs, failures, stop)


class _Tail:
    """Reads what rank 0 appends, and hands every whole line on as an event."""

    def __init__(self, path: Path, emit: Emit) -> None:
        self._path, self._emit, self._offset = path, emit, 0

    def read(self) -> None:
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.splitlines():
            self._emit(json.loads(line))


def _prepare(job: Job, logs: Logs) -> None:
    """Nothing of an earlier job may be taken for this one's."""
    with disk_errors(logs.job):
        logs.folder.mkdir(exist_ok=True)
        for path in (logs.events, logs.agent, outcome_path(logs.run), *logs.folder.glob("rank-*.*")):
            path.unlink(missing_ok=True)
        for path in logs.folder.glob("error-rank-*.json"):
            path.unlink()
    store.write_atomic(logs.job, job.model_dump_json().encode())


@contextmanager
def _environment(config: LaunchConfig) -> Iterator[None]:
    """What workers inherit: their share of the cores, the loopback interface, and whose children they are."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = {"BMCTL_PARENT": str(os.getpid())}
    if config.threads is not None or "OMP_NUM_THREADS" not in os.environ:
        wanted["OMP_NUM_THREADS"] = str(config.threads or max(1, cores // config.nproc))
    if sys.platform == "linux" and "GLOO_SOCKET_IFNAME" not in os.environ:
        wanted["GLOO_SOCKET_IFNAME"] = "lo"  # a host name that does not resolve must not matter on one machine
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _pids(logs: Logs) -> list[int]:
    """Of the workers that have begun."""
    found = []
    for path in logs.folder.glob("rank-*.pid"):
        with suppress(OSError, ValueError):
            found.append(int(path.read_text()))
    return found


def _hand_on(signum: int, pids: list[int], *, told: set[int]) -> None:
    for pid in pids:
        if pid not in told:
            told.add(pid)
            with suppress(ProcessLookupError):
                os.kill(pid, signum)


# -- how it ended -------------------------------------------------------------------------------------


def _judge(logs: Logs, failures: dict[int, int], stop: Stop) -> None:
    """Raise how the group was stopped, or its first failure.

    Args:
        failures: Exit code of every worker that failed; -N for signal N. Key -1: the agent itself.
        stop: What this process was told.
    """
    outcome = _read(outcome_path(logs.run))
    # Without a signal from outside, it was the agent that stopped the rest after a failure.
    if outcome is not None and (stop.requested is not None or outcome["exit_code"] == PreemptedError.exit_code):
        raise error_from_dict(outcome)
    errors = [found for path in sorted(logs.folder.glob("error-rank-*.json")) if (found := _read(path)) is not None]
    errors.sort(key=lambda error: error["time"])
    first = next((error for error in errors if not error["lost_peer"]), None)
    if first is not None:
        raise _told(first, logs)
    if not failures:
        return
    if stop.requested is not None:
        from bmctl.engine.signals import interrupted

        raise interrupted(stop.requested, "the workers ended before a checkpoint was published")
    # Whoever left no record was killed; the others only noticed, unless one had waited too long before.
    silent = sorted(set(failures) - {error["rank"] for error in errors})
    if silent and not (errors and "timed out" in errors[0]["message"].lower()):
        raise _died(silent[0], failures[silent[0]], logs)
    raise _told(errors[0], logs)


def _told(error: dict[str, Any], logs: Logs) -> BmctlError:
    rank, log = error["rank"], logs.of_rank(error["rank"])
    if error["lost_peer"]:
        return WorkerError(
            f"rank {rank} lost the others, or waited for them longer than launch.timeout_s: {error['message']}",
            hint=f"read {logs.folder}/rank-*.log",
        )
    if error["exit_code"] == 10 and error["error"] != "WorkerError":
        return WorkerError(
            f"rank {rank} failed: {error['error']}: {error['message']}\n{_last_lines(log)}", hint=f"read {log}"
        )
    return error_from_dict(error, prefix=f"rank {rank}: ")


def _died(rank: int, exit_code: int, logs: Logs) -> WorkerError:
    log = logs.of_rank(rank)
    if rank < 0:
        return WorkerError("the workers could not be started", hint=f"read {logs.agent}")
    how = f"exited with {exit_code}"
    if exit_code < 0:
        how = f"was killed by {signal.Signals(-exit_code).name}"
    if exit_code == -signal.SIGKILL:
        how += " (out of memory?)"
    return WorkerError(f"rank {rank} {how}\n{_last_lines(log)}".strip(), hint=f"read {log}")


def _last_lines(log: Path) -> str:
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return ""
    return "\n".join(f"  {line}" for line in lines[-TAIL_LINES:])


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_bytes()) if path.exists() else None
