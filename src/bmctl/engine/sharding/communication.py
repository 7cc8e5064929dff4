"""How long a step waits for other processes: the same collectives as torch's own, with a clock beside them.

What a clock tells is exposed communication, the part of a step in which nothing else could be done:

- ddp: from the moment at which the last gradients are ready to that at which all buckets are summed. What runs beside
  the backward pass is not counted, as it costs no time (on a CPU it costs some of the cores).
- fsdp on a CPU: every all-gather and reduce-scatter, start to end: over gloo the step waits for each of them.
- fsdp on GPUs: the same on the stream of the collectives, which runs beside the computation: an upper bound.
"""

import time
from collections.abc import Sequence

import torch
import torch.distributed as dist


class Clock:
    """Seconds spent, counted up by collectives and taken by the loop.

    On a GPU nobody waits for the end: a span that is still running is counted when it is asked for the next time.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_gpu = device.type == "cuda"
        self._spans: list[tuple[float | torch.cuda.Event, float | torch.cuda.Event]] = []

    def now(self) -> float | torch.cuda.Event:
        """This moment, or this place in the current stream."""
        if not self._is_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add(self, start: float | torch.cuda.Event) -> None:
        """What began at `start` ends now. May be called by any thread."""
        self._spans.append((start, self.now()))

    def take(self) -> float:
        """Seconds since this was asked last; where spans overlap, time counts once."""
        spans, self._spans = self._spans, []
        seconds, reached = 0.0, float("-inf")
        for start, end in spans:
            if isinstance(start, torch.cuda.Event) or isinstance(end, torch.cuda.Event):
                assert isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event)
                if end.query():
                    seconds += start.elapsed_time(end) / 1000
                else:
                    self._spans.append((start, end))
            else:
                seconds += max(0.0, end - max(start, reached))
                reached = max(reached, end)
        return seconds


# -- ddp --------------------------------------------------------------------------------------------


class BucketClock:
    """For a communication hook of DistributedDataParallel: torch's own averaging, timed from the last bucket on.

    Source: torch.distributed.algorithms.ddp_comm_hooks.default_hooks.allreduce_hook
    """

    def __init__(self, clock: Clock, *, world: int) -> None:
        self._clock, self._world = clock, world
        self._ready: float | torch.cuda.Event | None = None

    def average(
        self,
        _: None,
        bucket: dist.GradBucket,  # type: ignore[name-defined]
    ) -> torch.futures.Future[torch.Tensor]:
        gradients, is_last = bucket.buffer(), bucket.is_last()
        gradients.div_(self._world)
        self._ready = self._clock.now() if is_last else None
        work = dist.all_reduce(gradients, async_op=True)
        assert work is not None

        def summed(future: torch.futures.Future[list[torch.Tensor]]) -> torch.Tensor:
            # NCCL sums the buckets in order; gloo may end with an earlier one.
            ready = self._ready
            if ready is not None and (is_last or isinstance(ready, float)):
                self._clock.add(ready)
            return future.value()[0]

        return work.get_future().then(summed)


# -- fsdp -------------------------------------------------------------------------------------------


class TimedAllGather:
    """Of one FSDPModule; see torch.distributed.fsdp.FSDPModule.set_custom_all_gather."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,  # torch passes it by name
    ) -> dist.Work | None:
        start = self._clock.now()
        work = dist.all_gather_single(output_tensor, input_tensor, group=group, async_op=async_op)
        self._clock.add(start)
        return work


class TimedReduceScatter:
    """Of one FSDPModule; see torch.distributed.fsdp.FSDPModule.set_custom_reduce_scatter."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp.RedOpType,
        async_op: bool = False,  # torch passes it by name
    ) -> dist.Work | None:
        start = self._clock.now()
        work = dist.reduce_scatter_single(output_tensor, input_tensor, group=group, op=op, async_op=async_op)
        self._clock.add(start)
        return work
