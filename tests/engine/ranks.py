"""Real processes over gloo, forked from the test: each runs a function and tells what came of it."""

from __future__ import annotations

import json
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # what DTensor imports at its first use: here once, not in every process
import torch.distributed as dist

from bmctl.engine.parallel import Group
from bmctl.errors import BmctlError

if not torch.cuda.is_available():
    # A process's first backward decides whether autograd has threads, and with them it cannot be forked. Here it has
    # none yet; once anything was exported, torch takes a GPU for granted and starts some.
    torch.ones(1, requires_grad=True).sum().backward()


@dataclass(frozen=True)
class Told:
    """How a rank ended.

    Attributes:
        code: 0, or less the signal that killed it.
        value: What its function returned, or the fields of the error that it raised.
    """

    code: int
    value: Any


def on_ranks(world: int, work: Callable[[Group], Any], *, fault: str = "", timeout_s: float = 60) -> list[Told]:
    """Run `work` in `world` processes; its result must be JSON.

    Args:
        fault: BMCTL_FAULT of all of them.
    """
    with tempfile.TemporaryDirectory() as folder:
        pids = [_fork(Path(folder), work, rank=rank, world=world, fault=fault) for rank in range(world)]
        codes = [_wait(pid, timeout_s=timeout_s) for pid in pids]
        found = [Path(folder, f"{rank}.json") for rank in range(world)]
        values = [json.loads(path.read_bytes()) if path.exists() else None for path in found]
    return [Told(code, value) for code, value in zip(codes, values, strict=True)]


def _fork(folder: Path, work: Callable[[Group], Any], *, rank: int, world: int, fault: str) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        torch.set_num_threads(1)
        os.environ |= {"BMCTL_FAULT": fault, "RANK": str(rank)}
        meet, timeout = f"file://{folder}/meet", timedelta(seconds=30)
        dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=world, timeout=timeout)
        group = Group(rank=rank, local_rank=rank, world=world, device=torch.device("cpu"), threads=1)
        try:
            value = work(group)
        except BmctlError as error:
            value = error.to_dict()
        (folder / f"{rank}.json").write_text(json.dumps(value))
        code = 0
    except BaseException:  # noqa: BLE001  (a forked process must not run on into pytest)
        traceback.print_exc()
    finally:
        os._exit(code)


def _wait(pid: int, *, timeout_s: float) -> int:
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return -999
