"""One process of a job: join the group, run the stage, record the first error.

``python -m bmctl.engine.worker JOBFILE`` is what `bmctl.launch` starts, once per rank. torch is imported only once
signals are caught: a process that is told to stop while it loads must know it later.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from bmctl import store
from bmctl.core import owncode
from bmctl.errors import BmctlError, InterruptedRunError, PreemptedError, RecipeError
from bmctl.job import Job, Logs, is_restarted, outcome_path, torchrun_nodes, write_outcome
from bmctl.processes import guard
from bmctl.processes.attempts import Attempts
from bmctl.processes.heartbeat import Heart, beating, dump_on_signal, group_timeout_s
from bmctl.processes.signals import Stop, catch_signals
from bmctl.recipe import LaunchConfig, Recipe, load_recipe
from bmctl.schema import Emit
from bmctl.verdict import HEADING

ORPHAN_CHECK_S = 0.5


def run_job(job: Job, config: LaunchConfig, *, emit: Emit, stop: Stop, heart: Heart) -> None:
    """Run a job's stage as one process of its group.

    Args:
        job: Its run holds the resolved recipe.
        config: The recipe's `launch` section.
        emit: Takes rank 0's events.
        stop: The flag that signals set.
        heart: Takes this process's beat.

    Raises:
        StuckError: Three starts in a row got no further.
        BmctlError: Whatever the stage raises.
    """
    from bmctl.engine.context import StageContext
    from bmctl.engine.parallel import barrier, join, leave, settle
    from bmctl.engine.training.train_stage import train_stage
    from bmctl.package import open_package

    group = join(config.model_copy(update={"timeout_s": group_timeout_s(config.timeout_s)}))
    barrier(group)  # rank 0 wrote the recipe before it came here
    run, resume = Path(job.run), job.resume or is_restarted()
    recipe = load_recipe(Logs(run).recipe)
    if recipe.train is not None:
        stop.grace_s = recipe.train.grace_s
    check_worlds(recipe)
    attempts = Attempts(run, job.checkpoints)
    error = None
    if group.leads:
        outcome_path(run).unlink(missing_ok=True)
        try:
            attempts.begin(afresh=job.overwrite and not resume)
        except BmctlError as failed:
            error = failed
    settle(group, error)

    def beat(step: int, doing: str) -> None:
        guard.beat(step, doing)
        heart.beat(step, doing)

    context = StageContext(
        run=run,
        recipe=recipe,
        group=group,
        stop=stop,
        emit=emit,
        resume=resume,
        overwrite=job.overwrite,
        profile=job.profile,
        beat=beat,
    )
    try:
        train_stage(context, start=open_package(Path(job.start)) if job.start else None)
    except BaseException as failed:
        if group.leads:
            attempts.end(failed, is_elastic=is_elastic(recipe))
        raise
    if group.leads:
        attempts.end(None)
    leave(group)


def is_elastic(recipe: Recipe) -> bool:
    """Whether machines may come and go."""
    low, high = torchrun_nodes() or (recipe.launch.nodes.min, recipe.launch.nodes.max)
    return low < high


def check_worlds(recipe: Recipe) -> None:
    """Under somebody's elastic torchrun: every number of processes that it may come to must share a batch evenly.

    Raises:
        RecipeError: One cannot.
    """
    nodes, fit = torchrun_nodes(), recipe.train
    if nodes is None or fit is None or fit.batch_size == "auto":
        return
    nproc = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    for world in range(nodes[0] * nproc, nodes[1] * nproc + 1, nproc):
        if fit.batch_size % (world * fit.accumulate):
            parts = f" in {fit.accumulate} parts each" if fit.accumulate > 1 else ""
            raise RecipeError(
                f"train.batch_size is {fit.batch_size}, which {world} processes{parts} cannot share evenly: "
                f"torchrun may come to {nodes[0]} to {nodes[1]} machines with {nproc} each",
                hint="take a batch that every number of processes divides, or another --nnodes",
            )


def main(argv: Sequence[str]) -> int:
    """Run the job that a file describes; the exit code tells the agent whether the group has failed."""
    job = Job.model_validate_json(Path(argv[0]).read_bytes())
    rank = int(os.environ["RANK"])
    logs = Logs(Path(job.run), node=job.node)
    end_with(int(os.environ["BMCTL_PARENT"]), at_once=True)
    _write_to(logs.of_rank(rank))
    dump_on_signal()
    owncode.trust(job.trust_code)
    try:
        with catch_signals() as stop, beating(logs.beat(rank)) as heart:
            store.write_atomic(logs.pid(rank), str(os.getpid()).encode())
            recipe = load_recipe(logs.recipe)
            run_job(job, recipe.launch, emit=partial(_append, logs.events), stop=stop, heart=heart)
    except (PreemptedError, InterruptedRunError) as stopped:
        write_outcome(outcome_path(Path(job.run)), stopped, rank=rank)
        write_outcome(logs.outcome(rank), stopped, rank=rank)
        return 0
    except Exception as error:  # noqa: BLE001  (recorded with its traceback, and told by the parent)
        traceback.print_exc()
        record_error(logs.error(rank), error, rank=rank)
        return error.exit_code if isinstance(error, BmctlError) else 10
    return 0


def record_error(path: Path, error: Exception, *, rank: int) -> None:
    """Tell the parent process what went wrong, and when: it reports the first failure of all ranks."""
    fields: dict[str, object] = {
        "rank": rank,
        "time": time.time(),
        "pid": os.getpid(),
        "lost_peer": _is_lost_peer(error),
        "torchrun": os.environ.get("TORCHELASTIC_RUN_ID", ""),
    }
    if isinstance(error, BmctlError):
        fields |= error.to_dict()
    else:
        fields |= {"error": type(error).__name__, "message": str(error), "hint": "", "exit_code": 10}
    store.write_atomic(path, json.dumps(fields, default=str).encode())


def _is_lost_peer(error: Exception) -> bool:
    """Whether this process only noticed that another one is gone, or silent."""
    from torch.distributed import DistError

    text = str(error).lower()
    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and ("gloo" in text or "nccl" in text))


def _write_to(log: Path) -> None:
    """Let stdout and stderr, also those of C++ libraries, go to this rank's log, under a heading of their own."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    rank, world = os.environ["RANK"], os.environ.get("WORLD_SIZE", "1")
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    when = time.strftime("%Y-%m-%d %H:%M:%S")
    os.write(handle, f"{HEADING}{when} rank {rank} of {world}, process {os.getpid()}, restart {restart}\n".encode())
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)


def _append(path: Path, event: Mapping[str, object]) -> None:
    store.append(path, json.dumps(event).encode() + b"\n")


def end_with(parent: int, *, at_once: bool = False) -> None:
    """End when the parent process is gone: a resumed run must not meet the workers of a killed one.

    Args:
        at_once: Let the kernel do it, too; not where a thread of the parent may end before the parent does.

    Source: https://man7.org/linux/man-pages/man2/PR_SET_PDEATHSIG.2const.html
    """
    if at_once and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(ORPHAN_CHECK_S)
        os._exit(137)

    threading.Thread(target=watch, name="bmctl-parent", daemon=True).start()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
