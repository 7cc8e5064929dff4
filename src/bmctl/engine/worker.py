"""One process of a job: join the group, run the stage, record the first error.

``python -m bmctl.engine.worker JOBFILE`` is what `bmctl.launch` starts, once per rank. torch is imported only once
signals are caught: a process that is told to stop while it loads must know it later.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

from bmctl import store
from bmctl.engine.signals import Stop, catch_signals
from bmctl.errors import BmctlError, InterruptedRunError, PreemptedError
from bmctl.job import Job, Logs, write_outcome
from bmctl.recipe import LaunchConfig, load_recipe
from bmctl.schema import Emit

ORPHAN_CHECK_S = 0.5


def run_job(job: Job, config: LaunchConfig, *, emit: Emit, stop: Stop) -> None:
    """Run a job's stage as one process of its group.

    Args:
        job: Its run holds the resolved recipe.
        config: The recipe's `launch` section.
        emit: Takes rank 0's events.
        stop: The flag that signals set.

    Raises:
        BmctlError: Whatever the stage raises.
    """
    from bmctl.engine.context import StageContext
    from bmctl.engine.parallel import barrier, join, leave
    from bmctl.engine.train_stage import train_stage
    from bmctl.package import open_package

    group = join(config)
    barrier(group)  # rank 0 wrote the recipe before it came here
    recipe = load_recipe(Path(job.run) / "recipe.yaml")
    if recipe.train is not None:
        stop.grace_s = recipe.train.grace_s
    context = StageContext(
        run=Path(job.run),
        recipe=recipe,
        group=group,
        stop=stop,
        emit=emit,
        resume=job.resume,
        overwrite=job.overwrite,
    )
    train_stage(context, start=open_package(Path(job.start)) if job.start else None)
    leave(group)


def main(argv: Sequence[str]) -> int:
    """Run the job that a file describes; the exit code tells the agent whether the group has failed."""
    job = Job.model_validate_json(Path(argv[0]).read_bytes())
    rank = int(os.environ["RANK"])
    logs = Logs(Path(job.run))
    _write_to(logs.of_rank(rank))
    try:
        with catch_signals() as stop:
            store.write_atomic(logs.pid(rank), str(os.getpid()).encode())
            _end_with(parent=int(os.environ["BMCTL_PARENT"]))
            recipe = load_recipe(Path(job.run) / "recipe.yaml")
            run_job(job, recipe.launch, emit=lambda event: _append(logs.events, event), stop=stop)
    except (PreemptedError, InterruptedRunError) as stopped:
        write_outcome(Path(job.run), stopped, rank=rank)
        return 0
    except Exception as error:  # noqa: BLE001  (recorded with its traceback, and told by the parent)
        traceback.print_exc()
        record_error(logs.error(rank), error, rank=rank)
        return error.exit_code if isinstance(error, BmctlError) else 10
    return 0


def record_error(path: Path, error: Exception, *, rank: int) -> None:
    """Tell the parent process what went wrong, and when: it reports the first failure of all ranks."""
    fields: dict[str, object] = {"rank": rank, "time": time.time(), "lost_peer": _is_lost_peer(error)}
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
    """Let stdout and stderr, also those of C++ libraries, go to this rank's log."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)


def _append(path: Path, event: Mapping[str, object]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(event) + "\n")


def _end_with(*, parent: int) -> None:
    """End at once when the parent process is gone: a resumed run must not meet the workers of a killed one."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(ORPHAN_CHECK_S)
        os._exit(137)

    threading.Thread(target=watch, name="bmctl-parent", daemon=True).start()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
