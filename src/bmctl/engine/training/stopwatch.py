"""Where the time of a training step goes: waiting for data, forward, backward, communication, optimizer."""

from __future__ import annotations

import time

import torch

PARTS = ("data", "forward", "backward", "communication", "optimizer")
ENDS_STEP = "optimizer"
"""Each lap of this part is the end of one more step."""


class Stopwatch:
    """Laps: each adds the time since the last mark to one part of the step, so that the parts add up to the whole.

    On a CPU a lap reads the clock (0.3 us). On a GPU it records an event on the current stream, and events are read
    only when somebody asks: a part's time is then that of the stream, in which a late batch is a gap.

    Args:
        device: Where the steps compute.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_gpu = device.type == "cuda"
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._moved: dict[tuple[str, str], float] = {}
        self._total = dict.fromkeys(PARTS, 0.0)
        self._steps, self._total_steps = 0, 0
        self._mark = 0.0
        self._events: list[tuple[str | None, torch.cuda.Event]] = []
        self._free: list[torch.cuda.Event] = []

    def start(self) -> None:
        """The first lap, or the next one after a pause, begins now; what passed since the last mark is nobody's."""
        if self._is_gpu:
            self._record(None)
        else:
            self._mark = time.perf_counter()

    def lap(self, part: str) -> None:
        """The time since the last mark was spent on `part`, one of PARTS."""
        if self._is_gpu:
            self._record(part)
        else:
            now = time.perf_counter()
            self._seconds[part] += now - self._mark
            self._mark = now
        if part == ENDS_STEP:
            self._steps += 1

    def add(self, part: str, seconds: float, *, out_of: str = "backward") -> None:
        """Of the time that `out_of` took, so many seconds were spent on `part`, as measured elsewhere."""
        key = (out_of, part)
        self._moved[key] = self._moved.get(key, 0.0) + seconds

    def take(self) -> dict[str, float]:
        """Mean milliseconds per part and step since this was asked last.

        On a GPU this waits for the last lap.
        """
        self._fold()
        means = _means(self._seconds, self._steps)
        for part in PARTS:
            self._total[part] += self._seconds[part]
            self._seconds[part] = 0.0
        self._total_steps += self._steps
        self._steps = 0
        return means

    def overall(self) -> dict[str, float]:
        """Mean milliseconds per part and step, over all steps in this process."""
        self.take()
        return _means(self._total, self._total_steps)

    def _record(self, part: str | None) -> None:
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
        event.record()
        self._events.append((part, event))

    def _fold(self) -> None:
        """Read the GPU's events, and move what was measured elsewhere to where it belongs."""
        if self._events:
            self._events[-1][1].synchronize()
            for (_, before), (part, event) in zip(self._events, self._events[1:], strict=False):
                if part is not None:
                    self._seconds[part] += before.elapsed_time(event) / 1000
            self._free += [event for _, event in self._events[:-1]]
            self._events = [(None, self._events[-1][1])]
        for (out_of, part), seconds in self._moved.items():
            # Never more than there is: communication may have run beside the backward pass, not within it.
            moved = min(seconds, self._seconds[out_of])
            self._seconds[out_of] -= moved
            self._seconds[part] += moved
        self._moved.clear()


def _means(seconds: dict[str, float], steps: int) -> dict[str, float]:
    return {part: 1000 * value / max(1, steps) for part, value in seconds.items()}
