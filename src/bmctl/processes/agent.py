"""torchrun's agent, run in a thread of the parent process: it starts the workers, and starts them again.

torchrun's own loop restarts whatever failed, however it failed, and takes a group that stopped itself for one that is
done. This one looks at what the workers recorded: an error of ours ends the job, a death starts it again from the
newest checkpoint, a machine that comes or goes starts it again with another number of processes.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.rendezvous.api import RendezvousClosedError, RendezvousError, RendezvousTimeoutError

from bmctl import store, verdict
from bmctl.errors import BmctlError, StuckError, WorkerError, error_from_dict
from bmctl.job import Job, Logs, newest_step, read_record
from bmctl.processes.attempts import Attempts
from bmctl.processes.heartbeat import read_sign
from bmctl.processes.rendezvous import Meeting, meet
from bmctl.recipe import LaunchConfig

WATCH_S = 0.1
STRAGGLE_S = 5.0
"""How long the rest of a group may take to notice that one of it died."""


@dataclass
class AgentState:
    """What the agent's thread and the one that started it tell each other.

    Attributes:
        workers: Process id by rank, of the processes of this machine that were started last.
        is_running: Whether they are to move: none has failed, and they were not told to stop.
        ending: Told to stop: nothing is started again.
        hang: What the watch found; it has killed the workers.
        notes: Sentences for the user.
        outcome: How the workers say that they were stopped.
        failure: What ended the job.
        is_done: The workers did all that there was to do.
    """

    workers: dict[int, int] = field(default_factory=dict)
    is_running: bool = False
    ending: bool = False
    hang: WorkerError | None = None
    notes: deque[str] = field(default_factory=deque)
    outcome: BmctlError | None = None
    failure: verdict.Failure | None = None
    is_done: bool = False


def run_agent(
    job: Job, launch: LaunchConfig, logs: Logs, shared: AgentState, *, grace_s: float, recipe_hash: str
) -> None:
    """Start this machine's workers on the job of `logs`, and stay until all is done or nothing can be done.

    Args:
        shared: Filled with how it ended.
        grace_s: Seconds between SIGTERM and SIGKILL for workers that are to stop.
        recipe_hash: The same on all machines.
    """
    with tempfile.TemporaryDirectory() as folder, _quiet(logs.agent):
        agent = None
        try:
            meeting = meet(launch, recipe_hash=recipe_hash, told=lambda: shared.ending)
            agent = Agent(job, launch, logs, shared, meeting=meeting, grace_s=grace_s, folder=Path(folder))
            agent.stay()
        except _EndedError:
            pass
        except BmctlError as error:
            shared.failure = verdict.Failure(error, error.message, is_final=True, is_ours=True)
        except RendezvousError as error:
            shared.failure = _lost(error, launch, logs)
        except Exception:
            logging.getLogger("torch.distributed").exception("the agent failed")
            failed = WorkerError("the workers could not be started", hint=f"read {logs.agent}")
            shared.failure = verdict.Failure(failed, failed.message)
        finally:
            if agent is not None:
                agent.leave()


class _EndedError(Exception):
    """Told to stop before the workers were started."""


class Agent(LocalElasticAgent):
    """The processes of one machine."""

    def __init__(
        self,
        job: Job,
        launch: LaunchConfig,
        logs: Logs,
        shared: AgentState,
        *,
        meeting: Meeting,
        grace_s: float,
        folder: Path,
    ) -> None:
        spec = WorkerSpec(
            role="bmctl",
            local_world_size=launch.nproc,
            entrypoint=sys.executable,
            args=("-P", "-m", "bmctl.engine.worker", str(logs.job)),
            rdzv_handler=meeting.handler,
            max_restarts=launch.max_restarts,
            monitor_interval=WATCH_S,
        )
        logs_specs = DefaultLogsSpecs(log_dir=str(folder), redirects=Std.ALL)
        super().__init__(spec, logs_specs, exit_barrier_timeout=grace_s, shutdown_timeout=math.ceil(grace_s))
        self._job, self._launch, self._logs, self._shared, self._meeting = job, launch, logs, shared, meeting
        self._grace_s, self._folder = grace_s, folder
        self._attempts = Attempts(logs.run, job.checkpoints)
        self._died: dict[int, int] = {}
        self._size = 0

    @property
    def is_elastic(self) -> bool:
        return self._launch.nodes.min < self._launch.nodes.max

    def stay(self) -> None:
        """Start the workers, and again where that can help, until the job is done, stopped or failed."""
        group, has_said = self._worker_group, False
        self._initialize_workers(group)
        while True:
            time.sleep(WATCH_S)
            if self._shared.ending and self._is_shared and not self.is_elastic and not has_said:
                self._meeting.end()
                has_said = True
            result = self._monitor_workers(group)
            group.state = result.state
            if result.state == WorkerState.SUCCEEDED:
                self._shared.outcome = self._outcome()
                if self._shared.outcome is None:
                    self._shared.is_done = True
                    self._exit_barrier()
                    return
                if not self._goes_on():
                    return
                self._begin_again(f"stopped at {self._newest()}: machines come or go")
            elif result.state in (WorkerState.UNHEALTHY, WorkerState.FAILED):
                if not self._try_again():
                    return
            elif not self._shared.ending and self._is_shared and self._meeting.handler.num_nodes_waiting() > 0:
                self._begin_again("another machine joins")

    def leave(self) -> None:
        """End what is left of the workers, and the meeting where nobody is to come any more."""
        self._shutdown(timeout=math.ceil(self._grace_s))
        if not (self.is_elastic and self._shared.outcome is not None):
            with suppress(Exception):
                self._meeting.handler.shutdown()

    @property
    def _is_shared(self) -> bool:
        return self._launch.nodes.max > 1

    def _goes_on(self) -> bool:
        """Whether workers that stopped themselves did so for a change of machines, not because the job is to stop."""
        if self._shared.ending or not self._is_shared:
            return False
        return self.is_elastic or not self._meeting.is_ending()

    # -- starting and stopping ------------------------------------------------------------------------

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        if self._shared.ending:
            raise _EndedError
        self._died, self._shared.hang = {}, None
        for worker in worker_group.workers:
            for path in (self._logs.error, self._logs.outcome, self._logs.pid, self._logs.beat):
                path(worker.global_rank).unlink(missing_ok=True)
        pids: dict[int, Any] = super()._start_workers(worker_group)
        size = worker_group.workers[0].world_size
        if self._size not in (0, size):
            self._shared.notes.append(f"going on with {size} processes instead of {self._size}")
        self._size = size
        self._shared.workers = {worker.global_rank: pids[worker.local_rank] for worker in worker_group.workers}
        self._shared.is_running = True
        return pids

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        if not self._died and self._pcontext is not None:
            ended = {
                worker_group.workers[local].global_rank: handler.proc.poll()
                for local, handler in self._pcontext.subprocess_handlers.items()  # type: ignore[attr-defined]
            }
            self._died = {rank: code for rank, code in ended.items() if code}
            if any(code is not None for code in ended.values()):
                self._shared.is_running = False
            if self._died:
                self._end_stragglers()
        return super()._monitor_workers(worker_group)

    def _end_stragglers(self) -> None:
        """Give the rest of a group in which one died time to notice, not the half minute that torchrun gives it."""
        deadline = time.monotonic() + STRAGGLE_S
        self._signal(signal.SIGTERM)
        while self._alive() and time.monotonic() < deadline:
            time.sleep(WATCH_S / 2)
        self._signal(signal.SIGKILL)

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        """Stop the workers so that they publish a checkpoint; whoever has not begun its loop has nothing to save."""
        self._shared.is_running = False
        signs = [read_sign(self._logs.beat(rank), pid=pid) for rank, pid in self._shared.workers.items()]
        begun = any(sign is not None and sign.step >= 0 for sign in signs)
        self._shutdown(timeout=math.ceil(self._grace_s) if begun else 2)
        self._shared.workers = {}

    def _signal(self, signum: signal.Signals) -> None:
        for handler in self._alive():
            with suppress(ProcessLookupError):
                os.killpg(handler.proc.pid, signum)

    def _alive(self) -> list[Any]:
        handlers = self._pcontext.subprocess_handlers.values() if self._pcontext else ()  # type: ignore[attr-defined]
        return [handler for handler in handlers if handler.proc.poll() is None]

    def _begin_again(self, why: str) -> None:
        self._shared.notes.append(why)
        self._stop_workers(self._worker_group)
        self._shared.outcome = None
        self._resume()
        self._initialize_workers(self._worker_group)

    def _resume(self) -> None:
        job = self._job.model_copy(update={"resume": True})
        store.write_atomic(self._logs.job, job.model_dump_json().encode())

    # -- how it went ----------------------------------------------------------------------------------

    def _outcome(self) -> BmctlError | None:
        """How the workers say that they were stopped; None if they finished."""
        for rank, pid in self._shared.workers.items():
            found = read_record(self._logs.outcome(rank), pid=pid)
            if found is not None:
                return error_from_dict(found)
        return None

    def _newest(self) -> str:
        step = newest_step(self._logs.run, self._job.checkpoints)
        return "the beginning" if step is None else f"step {step}"

    def _try_again(self) -> bool:
        """After a failure: start again where that can help."""
        self._keep_output()
        failure = verdict.judge(self._logs, self._shared.workers, self._died, hang=self._shared.hang)
        self._shared.failure, self._shared.outcome = failure, self._outcome()
        if not failure.is_echo:
            self._attempts.say(None if failure.is_final else failure.brief)
        if failure.is_final or self._shared.ending or self._shared.outcome is not None:
            return False
        most = self._launch.max_restarts
        if most == 0:
            return False
        if failure.is_echo and self._is_shared:
            self._shared.notes.append(f"a process of another machine is gone; going on from {self._newest()}")
        else:
            try:
                self._attempts.check()
            except StuckError as error:
                self._shared.failure = verdict.Failure(error, error.message, is_final=True, is_ours=True)
                return False
            if self._remaining_restarts == 0:
                return False
            self._remaining_restarts -= 1
            done = most - self._remaining_restarts
            self._shared.notes.append(f"{failure.brief}; restart {done} of {most} from {self._newest()}")
        self._shared.failure = None
        self._resume()
        self._stop_workers(self._worker_group)
        self._initialize_workers(self._worker_group)
        return True

    def _keep_output(self) -> None:
        """What a worker said before it could open its own log: a broken installation, for one."""
        ranks = {str(worker.local_rank): worker.global_rank for worker in self._worker_group.workers}
        for path in sorted(self._folder.rglob("std*.log")):
            text = path.read_text(encoding="utf-8", errors="replace")
            if text and path.parent.name in ranks:
                with self._logs.of_rank(ranks[path.parent.name]).open("a", encoding="utf-8") as log:
                    log.write(text)
            path.write_bytes(b"")


def _lost(error: RendezvousError, launch: LaunchConfig, logs: Logs) -> verdict.Failure:
    """What it means that the machines of a job could not meet, or meet again."""
    if isinstance(error, RendezvousClosedError):
        for path in sorted(logs.folder.glob("error-rank-*.json")):
            found = read_record(path)
            if found is not None and not found["lost_peer"]:
                told = error_from_dict(found, prefix=f"rank {found['rank']}, on another machine: ")
                return verdict.Failure(told, told.message, is_final=True, is_ours=True)
        text = "another machine ended the job"
    elif isinstance(error, RendezvousTimeoutError):
        text = f"fewer than {launch.nodes.min} machines came to {launch.rendezvous} within {launch.timeout_s:g} s"
    else:
        text = f"the machine at {launch.rendezvous}, where the others meet, is gone"
    told = WorkerError(text, hint=f"run the same command with --resume on all machines; more is in {logs.agent}")
    return verdict.Failure(told, text)


@contextmanager
def _quiet(path: Path) -> Iterator[None]:
    """Let what torch.distributed has to say go to a file: on the terminal only bmctl speaks."""
    loggers = [
        logging.getLogger(name)
        for name in [*logging.root.manager.loggerDict, "torch.distributed"]
        if name.startswith("torch.distributed")
    ]
    before = [(logger, logger.handlers[:], logger.propagate) for logger in loggers]
    handler = logging.FileHandler(path, encoding="utf-8")
    for logger in loggers:
        logger.handlers, logger.propagate = [handler], False
    try:
        yield
    finally:
        for logger, handlers, propagate in before:
            logger.handlers, logger.propagate = handlers, propagate
        handler.close()
