"""What lets a training loop be run a few steps at a time by somebody else: a door between two of its batches.

A contender's stdin and stdout are its line to the controller in `rounds.py`: `{"steps": n}` comes in, what they took
goes out; the first answer, before any step, says that the loop is ready.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    Batch = tuple[torch.Tensor, torch.Tensor]


class Gate:
    """Passed before every step; closed unless the controller has asked for steps.

    The time from one passage to the passage n steps later is that of n whole steps, wherever in a step a loop asks
    for its next batch. What else prints to stdout goes to stderr.

    Told of a turn, per step: `seconds`; `cpu_seconds` of all threads; and `cpu_seconds_in_all`, which adds what threads
    in the background have done at the closed gate, since the turn before.

    Attributes:
        about: Told to the controller with every answer.
    """

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self.about = ""
        self._left, self._asked = 0, 0
        self._since = self._cpu_since = 0.0
        self._told = time.process_time()

    def step(self) -> None:
        """Wait here until a step is wanted."""
        if self._left == 0:
            now, cpu_now = time.perf_counter(), time.process_time()
            self._answer(
                seconds=now - self._since,
                cpu_seconds=cpu_now - self._cpu_since,
                cpu_seconds_in_all=cpu_now - self._told,
            )
            self._told = cpu_now
            self._asked = self._left = self._next()
            self._since, self._cpu_since = time.perf_counter(), time.process_time()
        self._left -= 1

    def _answer(self, **clocks: float) -> None:
        said: dict[str, Any] = {clock: took / max(1, self._asked) for clock, took in clocks.items()}
        said["about"] = self.about
        self._answers.write(json.dumps(said) + "\n")
        self._answers.flush()

    def _next(self) -> int:
        line = sys.stdin.readline()
        if not line:  # the controller is done, or gone: no loop has to know how to end
            os._exit(0)
        return int(json.loads(line)["steps"])


class Batches:
    """The same few batches again and again, one step each, through the gate."""

    def __init__(self, gate: Gate, batches: Sequence[Batch]) -> None:
        self._gate, self._batches = gate, batches

    def __iter__(self) -> Iterator[Batch]:
        while True:
            for batch in self._batches:
                self._gate.step()
                yield batch
