"""The group of processes that run one stage together: who am I, where do I compute, what do all agree on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from bmctl.core import memory
from bmctl.errors import BmctlError, DependencyError, RecipeError, UsageError, WorkerError, error_from_dict, first_line
from bmctl.recipe import LaunchConfig


@dataclass(frozen=True)
class Group:
    """One process among `world` of them.

    Attributes:
        rank: 0 for the process that writes and speaks.
        local_rank: Rank among the processes of this machine.
        world: Number of processes; 1 means that there is no process group.
        device: Where this process computes.
        threads: CPU threads of this process.
    """

    rank: int
    local_rank: int
    world: int
    device: torch.device
    threads: int

    @property
    def leads(self) -> bool:
        return self.rank == 0


def join(launch: LaunchConfig) -> Group:
    """Join the group that torchrun's environment describes, or be alone where there is none.

    Raises:
        DependencyError: A GPU was asked for and there is none, or fewer than local processes.
        WorkerError: The others could not be met within `launch.timeout_s`.
    """
    world = _from_env("WORLD_SIZE", default=1)
    rank, local_rank = _from_env("RANK", default=0), _from_env("LOCAL_RANK", default=0)
    if world > 1 and "RANK" not in os.environ:
        raise UsageError("WORLD_SIZE is set but RANK is not", hint="unset WORLD_SIZE, or start through torchrun")
    local_world = _from_env("LOCAL_WORLD_SIZE", default=1)
    device = _choose_device(launch, local_rank=local_rank, local_world=local_world)
    threads = launch.threads or _from_env("OMP_NUM_THREADS", default=0) or max(1, num_cores() // local_world)
    torch.set_num_threads(threads)
    memory.keep_freed()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        # The control messages of a GPU group go over gloo as well, so that agreeing never waits for the GPU.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        try:
            dist.init_process_group(backend, timeout=timedelta(seconds=launch.timeout_s))
        except (RuntimeError, ValueError, OSError) as error:
            raise WorkerError(
                f"rank {rank} could not meet the other {world - 1} processes at "
                f"{os.environ.get('MASTER_ADDR', '(MASTER_ADDR unset)')}: {first_line(error)}",
                hint="check that every node resolves and reaches that host and port",
            ) from error
    return Group(rank=rank, local_rank=local_rank, world=world, device=device, threads=threads)


def mesh_of(group: Group) -> DeviceMesh:
    """All processes, along the one dimension there is: `data`, over which batches are cut and parameters sharded."""
    return init_device_mesh(group.device.type, (group.world,), mesh_dim_names=("data",))


def leave(group: Group) -> None:
    """Take the process group down, if `join` made one."""
    if group.world > 1 and dist.is_initialized():
        dist.destroy_process_group()


def num_cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_batch(group: Group, batch_size: int) -> None:
    """Refuse a global batch that the processes cannot share evenly."""
    if batch_size % group.world:
        near = max(1, round(batch_size / group.world)) * group.world
        raise RecipeError(
            f"batch_size is {batch_size} over all processes, which {group.world} processes cannot share evenly",
            hint=f"--set train.batch_size={near}",
        )


class Vote:
    """An agreement under way: each rank's numbers, of which every rank gets the largest.

    Starting it after the backward pass and reading it after the optimizer's step hides its cost.
    """

    def __init__(self, group: Group, values: Sequence[int]) -> None:
        self._values = list(values)
        self._work = None
        if group.world > 1:
            self._shared = torch.tensor(self._values, dtype=torch.int64)
            self._work = dist.all_reduce(self._shared, dist.ReduceOp.MAX, async_op=True)

    def result(self) -> list[int]:
        """Per position the maximum over all ranks."""
        if self._work is not None:
            self._work.wait()
            self._values, self._work = self._shared.tolist(), None
        return self._values


def agree(group: Group, value: bool) -> bool:
    """True everywhere if `value` is true on any rank."""
    return bool(Vote(group, [int(value)]).result()[0])


def barrier(group: Group) -> None:
    """Wait until every rank is here."""
    agree(group, False)


def gather(group: Group, value: Mapping[str, Any] | None) -> list[Any]:
    """Every rank's small JSON value, by rank, on every rank. No pickle, unlike torch's gather_object."""
    if group.world == 1:
        return [value]
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    longest = Vote(group, [len(data)]).result()[0]
    mine = torch.full((longest,), ord(" "), dtype=torch.uint8)
    mine[: len(data)] = data
    parts = [torch.empty_like(mine) for _ in range(group.world)]
    dist.all_gather(parts, mine)
    return [json.loads(bytes(part.numpy()).decode()) for part in parts]


def settle(group: Group, error: BmctlError | None) -> None:
    """Go on only if no rank has an error; else raise, on every rank, that of the lowest rank."""
    if group.world == 1:
        if error is not None:
            raise error
        return
    for rank, fields in enumerate(gather(group, error.to_dict() if error is not None else None)):
        if fields is not None:
            raise error if error is not None and rank == group.rank else error_from_dict(fields)


def _choose_device(launch: LaunchConfig, *, local_rank: int, local_world: int) -> torch.device:
    if launch.device == "cpu":
        return torch.device("cpu")
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if launch.device == "auto" and num_gpus < local_world:
        return torch.device("cpu")
    if num_gpus == 0:
        raise DependencyError("launch.device is cuda, but torch sees no GPU here", hint="--device cpu")
    if num_gpus < local_world:
        raise DependencyError(
            f"launch.device is cuda for {local_world} processes, but torch sees {num_gpus} GPUs",
            hint=f"--set launch.nproc={num_gpus}",
        )
    return torch.device("cuda", local_rank)


def _from_env(name: str, *, default: int) -> int:
    text = os.environ.get(name, "")
    if not text:
        return default
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"{name} is {text!r}, expected a number", hint=f"unset {name}") from None
