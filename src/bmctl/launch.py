"""A job in this process, or in a group of processes under torchrun's agent, which runs in this process too."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from bmctl import store
from bmctl.disk import disk_errors
from bmctl.errors import BmctlError, InterruptedRunError, PreemptedError, ResourceError, error_from_dict
from bmctl.job import Job as Job
from bmctl.job import Logs, outcome_path, read_record, torchrun_nodes, write_outcome
from bmctl.job import is_worker as is_worker
from bmctl.processes.heartbeat import beating
from bmctl.processes.rendezvous import own_suffix
from bmctl.processes.signals import Stop, catch_signals, interrupted
from bmctl.processes.watchdog import Overseer, watched
from bmctl.recipe import LaunchConfig, load_recipe, recipe_yaml
from bmctl.schema import Emit

if TYPE_CHECKING:
    from bmctl.processes.agent import AgentState

POLL_S = 0.1
KILL_AFTER_S = 15.0
"""Past the workers' own grace period."""
LEAVE_S = 10.0
"""How long a worker that another one stopped waits for its own agent to stop it."""


def launch(job: Job, config: LaunchConfig, *, emit: Emit) -> None:
    """Run a job: here with one process or as somebody's worker, else with `config.nproc` processes per machine.

    Args:
        job: What to do.
        config: The recipe's `launch` section.
        emit: Takes the events of rank 0.

    Raises:
        PreemptedError: Stopped by a signal; a checkpoint was published.
        InterruptedRunError: Stopped by Ctrl-C, or with nothing published.
        WorkerError: A worker died, hung, or failed with what is not an error of ours.
        StuckError: Three starts in a row got no further.
        BmctlError: The first error of any worker, named with its rank.
        SystemExit: A worker of somebody's torchrun was stopped: 0, so that nothing is restarted.
    """
    if is_worker() or (config.nproc == 1 and config.nodes.max == 1):
        _run_here(job, config, emit=emit)
    else:
        _run_group(job, config, emit=emit)


# -- in this process ----------------------------------------------------------------------------------


def _run_here(job: Job, config: LaunchConfig, *, emit: Emit) -> None:
    from bmctl.engine.worker import end_with, record_error, run_job

    rank = int(os.environ.get("RANK", "0")) if is_worker() else 0
    logs = Logs(Path(job.run))
    if rank == 0:
        outcome_path(logs.run).unlink(missing_ok=True)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _raise_final(logs)
        end_with(os.getppid())
    try:
        with catch_signals() as stop, beating(logs.beat(rank)) as heart:
            try:
                with watched(heart, logs, rank=rank, timeout_s=config.timeout_s, stop=stop):
                    run_job(job, config, emit=emit, stop=stop, heart=heart)
            except PreemptedError:
                _await_agent(stop)
                raise
            if not is_worker():
                stop.kept = "what was trained"
                stop.check("the end of the training")
    except (PreemptedError, InterruptedRunError) as stopped:
        if not is_worker():
            raise
        if rank == 0:
            write_outcome(outcome_path(logs.run), stopped, rank=rank)
        raise SystemExit(0) from None
    except BmctlError as error:
        if is_worker():
            record_error(logs.error(rank), error, rank=rank)
        raise


def _raise_final(logs: Logs) -> None:
    """Under somebody's torchrun, which restarts whatever fails: an error of ours that ended the last attempt is final.

    Raises:
        BmctlError: That of the last attempt.
    """
    for path in sorted(logs.folder.glob("error-rank-*.json")):
        found = read_record(path)
        if found is None or found.get("torchrun") != os.environ["TORCHELASTIC_RUN_ID"] or found["exit_code"] == 10:
            continue
        if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") not in ("", "0"):
            raise error_from_dict(found)
        path.unlink(missing_ok=True)  # a later job under the same name


def _await_agent(stop: Stop) -> None:
    """Under somebody's elastic torchrun: leave when the agent says so.

    An agent whose workers end by themselves takes the job for done; the one that has not yet seen that a machine
    joins would leave it.
    """
    nodes = torchrun_nodes()
    if nodes is None or nodes[0] == nodes[1]:
        return
    deadline = time.monotonic() + LEAVE_S
    while stop.requested is None and time.monotonic() < deadline:
        time.sleep(POLL_S)


# -- a group of processes -----------------------------------------------------------------------------


def _run_group(job: Job, config: LaunchConfig, *, emit: Emit) -> None:
    """Start the workers and stay with them.

    torchrun's agent runs in a thread, so that this one can catch signals: each is handed on once to every worker,
    however late that starts, and the group is given time to publish a checkpoint.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read when torch is loaded: only bmctl speaks here
    from bmctl.processes.agent import AgentState, run_agent

    is_shared = config.nodes.max > 1
    job = job.model_copy(update={"node": own_suffix() if is_shared else ""})
    logs, shared = Logs(Path(job.run), node=job.node), AgentState()
    recipe = load_recipe(logs.recipe)
    grace_s = recipe.train.grace_s if recipe.train else 30.0
    _prepare(job, logs)
    given = {"grace_s": grace_s, "recipe_hash": hashlib.sha256(recipe_yaml(recipe).encode()).hexdigest()}
    with _environment(config), catch_signals(grace_s=grace_s + KILL_AFTER_S) as stop:
        agent = threading.Thread(
            target=run_agent, args=(job, config, logs, shared), kwargs=given, name="bmctl-agent", daemon=True
        )
        agent.start()
        try:
            _stay(agent, config, logs, shared, stop=stop, emit=emit)
        finally:
            shared.ending = True
            while agent.is_alive() and shared.workers:  # this thread failed, or was told twice to stop
                _hand_on(signal.SIGKILL, shared.workers.values(), told=set())
                agent.join(POLL_S)
    _raise_outcome(logs, shared, stop)


def _stay(
    agent: threading.Thread, config: LaunchConfig, logs: Logs, shared: AgentState, *, stop: Stop, emit: Emit
) -> None:
    """Until the agent is done: hand on signals and events, and see that the workers move.

    Raises:
        ResourceError: What they tell could not be written; they were stopped, and published a checkpoint.
    """
    told: set[int] = set()
    unheard: list[ResourceError] = []

    def tell(event: Mapping[str, object]) -> None:
        try:
            emit(event)
        except ResourceError as error:  # the workers publish a checkpoint first
            unheard.append(error)
            stop.request(signal.SIGTERM)

    tail, overseer = _Tail(logs.events, tell), Overseer(logs, timeout_s=config.timeout_s)
    alone_s = 0.0
    while agent.is_alive() and alone_s < 2:
        agent.join(POLL_S)
        if stop.requested is not None:
            shared.ending = True
            _hand_on(stop.requested, _begun(logs, shared), told=told)
            alone_s = 0.0 if shared.workers else alone_s + POLL_S  # it may wait for other machines
        tail.read()
        while shared.notes:
            tell({"event": "note", "text": shared.notes.popleft()})
        watched = dict(shared.workers) if shared.is_running else {}
        found = overseer.look(watched)
        if found is not None and shared.is_running and shared.workers == watched:
            shared.hang, shared.is_running = found, False
            _hand_on(signal.SIGKILL, watched.values(), told=set())
    tail.read()
    while shared.notes:
        tell({"event": "note", "text": shared.notes.popleft()})
    if unheard:
        raise unheard[0]


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
    """Nothing of an earlier job may be taken for this one's; the logs of its ranks are added to."""
    with disk_errors(logs.job):
        logs.folder.mkdir(exist_ok=True)
        if not job.node:  # other machines may be at work already; their records carry their processes' ids
            for path in (logs.events, logs.agent, outcome_path(logs.run)):
                path.unlink(missing_ok=True)
            for name in ("rank-*.pid", "rank-*.beat", "error-rank-*.json", "outcome-rank-*.json"):
                for path in logs.folder.glob(name):
                    path.unlink(missing_ok=True)
            for path in logs.folder.glob("rank-*.log") if not job.resume else ():
                path.unlink(missing_ok=True)
    store.write_atomic(logs.job, job.model_dump_json().encode())


@contextmanager
def _environment(config: LaunchConfig) -> Iterator[None]:
    """What workers inherit: their share of the cores, the loopback interface, and whose children they are."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = {"BMCTL_PARENT": str(os.getpid())}
    # Keys of an earlier round must not be found in a later one's store.
    wanted["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    if config.threads is not None or "OMP_NUM_THREADS" not in os.environ:
        wanted["OMP_NUM_THREADS"] = str(config.threads or max(1, cores // config.nproc))
    if sys.platform == "linux" and "GLOO_SOCKET_IFNAME" not in os.environ and _is_here(config):
        wanted["GLOO_SOCKET_IFNAME"] = "lo"  # a host name that does not resolve must not matter on one own_suffix
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


def _is_here(config: LaunchConfig) -> bool:
    """Whether all processes are on this own_suffix."""
    host = (config.rendezvous or "").rpartition(":")[0]
    return config.nodes.max == 1 or host in ("localhost", "[::1]") or host.startswith("127.")


def _begun(logs: Logs, shared: AgentState) -> list[int]:
    """Workers that catch signals by now."""
    found = []
    for rank, pid in dict(shared.workers).items():
        with suppress(OSError, ValueError):
            if int(logs.pid(rank).read_text()) == pid:
                found.append(pid)
    return found


def _hand_on(signum: int, pids: Iterable[int], *, told: set[int]) -> None:
    for pid in list(pids):
        if pid not in told:
            told.add(pid)
            with suppress(ProcessLookupError):
                os.kill(pid, signum)


def _raise_outcome(logs: Logs, shared: AgentState, stop: Stop) -> None:
    """Raise how the group was stopped, or its first failure."""
    outcome, failure = shared.outcome, shared.failure
    # Without a signal from outside, it was the agent that stopped the rest after a failure.
    if outcome is not None and (
        failure is None or stop.requested is not None or outcome.exit_code == PreemptedError.exit_code
    ):
        raise outcome
    if shared.is_done:
        stop.kept = "what was trained"
        stop.check("the end of the training")
        return
    if failure is not None and (failure.is_ours and not failure.is_echo):
        raise failure.error
    if stop.requested is not None:
        raise interrupted(stop.requested, "the workers ended before a checkpoint was published")
    assert failure is not None
    raise failure.error
