"""torchrun's agent, run in a thread of the parent process: it starts the workers and watches them."""

from __future__ import annotations

import logging
import math
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bmctl.job import Logs

WATCH_S = 0.1


def run_agent(nproc: int, logs: Logs, grace_s: float, failures: dict[int, int]) -> None:
    """Start `nproc` workers on the job of `logs` and stay until all have ended; one failure ends them all.

    Args:
        grace_s: Seconds between SIGTERM and SIGKILL for the workers that are left when one fails.
        failures: Filled with the exit code of every worker that failed; -N for signal N, key -1 for the agent itself.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    with tempfile.TemporaryDirectory() as folder, _quiet(logs.agent):
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=nproc,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            local_addr="127.0.0.1",
            max_restarts=0,
            monitor_interval=WATCH_S,
            logs_specs=DefaultLogsSpecs(log_dir=folder, redirects=Std.ALL),
            shutdown_timeout=math.ceil(grace_s),
        )
        command = ["-P", "-m", "bmctl.engine.worker", str(logs.job)]
        try:
            elastic_launch(config, sys.executable)(*command)
        except ChildFailedError as error:
            failures.update({rank: failure.exitcode for rank, failure in error.failures.items()})
        except Exception:
            logging.getLogger("torch.distributed").exception("the agent failed")
            failures[-1] = 1
        _keep_output(Path(folder), logs)


def _keep_output(folder: Path, logs: Logs) -> None:
    """What a worker said before it could open its own log: a broken installation, for one."""
    for path in sorted(folder.rglob("std*.log")):
        text = path.read_text(encoding="utf-8", errors="replace")
        if text:
            with logs.of_rank(int(path.parent.name)).open("a", encoding="utf-8") as log:
                log.write(text)


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
