"""The largest batch that fits, found by trial."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from bmctl.core import memory
from bmctl.engine.effects import no_trace
from bmctl.engine.parallel import Group, Vote
from bmctl.errors import ResourceError

USABLE_RATIO = {"cpu": 0.8, "cuda": 0.9}
"""Of the memory that is free; the rest is for what a trial does not do, as exchanging gradients and loading data."""
_STATES = 2  # tensors of a weight's size that an optimizer keeps: Adam's
_MIB = 2**20
_SMALLER = "--set train.activation_checkpointing=true, or take a smaller model or smaller inputs"


@dataclass(frozen=True)
class _Tried:
    """How much memory a batch took at its peak; None if there was not enough."""

    batch: int
    peak_bytes: int | None


def find_batch_size(
    attempt: Callable[[int], object],
    *,
    model: nn.Module,
    group: Group,
    limit: int,
    limited_by: str,
    in_lock_step: bool = False,
) -> tuple[int, list[str]]:
    """The largest power of two that fits in one part of one process's share of a batch, the same for all ranks.

    Sizes are doubled from 1 (from 2 with batch normalisation) until one fails, takes too much, or passes the limit. A
    GPU says when it is full. On a CPU the kernel ends the process instead, so there the next size is tried only if, by
    the growth so far, it would take no more than 80 % of what is free. So it is in lock step, also on GPUs: a process
    that ran out of memory half-way would leave the others waiting.

    Weights, their gradients, buffers and all generators are as before; room for the optimizer's state is kept.

    Args:
        attempt: Runs forward and backward of so many samples.
        model: What it trains, on its device: the plain one, or this process's parts.
        group: Who must agree; processes of one machine try at the same time and share its memory.
        limit: Largest size that makes sense, whatever fits.
        limited_by: What more would do: ``leave an epoch of 320 samples fewer than 10 steps``.
        in_lock_step: Processes wait for each other within an attempt.

    Returns:
        The size, and a line for the log about every trial.

    Raises:
        ResourceError: Not even the smallest size fits; in lock step, one that was to fit does not.
    """
    device = group.device
    has_batch_norm = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    size = min(2 if has_batch_norm else 1, max(1, limit))
    room, base = _room(model, group), _taken(device)
    tried: list[_Tried] = []
    notes: list[str] = []
    best = 0
    while True:
        tried.append(_measured(attempt, size, model=model, device=device, base=base))
        if in_lock_step and tried[-1].peak_bytes is None:
            raise ResourceError(
                f"train.batch_size is auto, and {size} at a time do not fit in memory",
                hint=f"--set train.batch_size={best * group.world}" if best else _SMALLER,
            )
        peak, predicted = tried[-1].peak_bytes, _predicted(tried, model)
        fits = peak is not None and peak <= room
        says_itself = device.type == "cuda" and not in_lock_step
        goes_on = fits and 2 * size <= limit and (says_itself or predicted <= room)
        failed, stops = Vote(group, [int(not fits), int(not goes_on)]).result()
        best = best if failed else size
        capped = limited_by if 2 * size > limit else ""
        notes.append(_line(tried[-1], room, predicted, capped=capped, failed=bool(failed), stops=bool(stops)))
        if stops:
            break
        size *= 2
    if not best:
        raise ResourceError(
            f"train.batch_size is auto, and not even {size} at a time fit: {notes[-1]}",
            hint="--set launch.strategy=fsdp" if group.world > 1 and not in_lock_step else _SMALLER,
        )
    return best, notes


def _measured(
    attempt: Callable[[int], object], size: int, *, model: nn.Module, device: torch.device, base: int
) -> _Tried:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        memory.give_back()
        memory.reset_peak()
    has_room = True
    try:
        with no_trace(model, device):
            attempt(size)
    except torch.OutOfMemoryError:
        has_room = False
    except RuntimeError as error:
        if "DefaultCPUAllocator" not in str(error):
            raise
        has_room = False
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.empty_cache()
    else:
        peak = memory.peak_bytes()
    return _Tried(size, max(0, peak - base) if has_room else None)


def _room(model: nn.Module, group: Group) -> int:
    """Bytes that one process's trials may take, with the optimizer's state set aside."""
    if group.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(group.device)
    else:
        free = memory.free_bytes() // int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    return int(free * USABLE_RATIO[group.device.type]) - _STATES * _trained_bytes(model)


def _taken(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    memory.give_back()
    return memory.resident_bytes()


def _predicted(tried: list[_Tried], model: nn.Module) -> int:
    """Peak of twice the last size: as much more as the last size took above half of it, or above the gradients."""
    last = tried[-1].peak_bytes or 0
    if len(tried) == 1:
        return last + max(0, last - _trained_bytes(model))
    return last + max(0, 2 * (last - (tried[-2].peak_bytes or 0)))


def _trained_bytes(model: nn.Module) -> int:
    """Of what this process holds."""
    mine = (each.to_local() if isinstance(each, DTensor) else each for each in model.parameters() if each.requires_grad)
    return sum(each.numel() * each.element_size() for each in mine)


def _line(tried: _Tried, room: int, predicted: int, *, capped: str, failed: bool, stops: bool) -> str:
    size, peak = tried.batch, tried.peak_bytes
    start, at_hand = f"batch size, {size} at a time:", f"of {room / _MIB:.0f} MiB"
    if peak is None:
        return f"{start} does not fit in memory"
    took = f"{start} takes {peak / _MIB:.0f} {at_hand}"
    if failed:
        return f"{took}, too much" if peak > room else f"{took}, but does not fit in another process"
    if not stops:
        return took
    too_much = [f"take about {predicted / _MIB:.0f} MiB"] if predicted > room else []
    would = [*too_much, capped] if capped else too_much or ["be too many for another process"]
    return f"{took}; twice as many would {' and '.join(would)}"
