"""`--profile`: what every operator of a few training steps took, as a trace and as a table."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerAction, ProfilerActivity, profile

from bmctl.disk import hidden_sibling, write_atomic
from bmctl.engine.context import StageContext
from bmctl.errors import ResourceError

WAIT, WARM_UP, ACTIVE = 5, 2, 6
"""Steps that are left alone until caches have settled; profiled and thrown away, as they pay for the profiler's own
set-up; and kept."""
ROWS = 30


class Tracer:
    """One trace of a few steps; made with no device it does nothing.

    Args:
        device: Where the steps compute.
        path: Of the trace; the table is beside it.
        num_steps: Still to do: where they are few, none are left alone.
        note: Told where the files are, or why there are none.
    """

    def __init__(self, device: torch.device | None, *, path: Path, num_steps: int, note: Callable[[str], None]) -> None:
        self._path, self._note = path, note
        self._wait, self._warm_up = (WAIT, WARM_UP) if num_steps >= WAIT + WARM_UP + ACTIVE else (0, 1)
        self._end = min(self._wait + self._warm_up + ACTIVE, num_steps)
        self._profiler: profile | None = None
        if device is None:
            return
        if num_steps < 2:
            note(f"--profile: of {num_steps} steps nothing is traced, two are needed: one warms up")
            return
        # Kineto writes its own stages, and that a CPU has no GPU, to stderr; it asks the environment when first used.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        self._sort_by = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
        kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
        self._profiler = profile(
            activities=kinds, schedule=self._action, on_trace_ready=self._write, record_shapes=True
        )
        self._profiler.start()

    def step(self) -> None:
        """One more step is done."""
        if self._profiler is not None:
            self._profiler.step()
            if self._profiler.step_num >= self._end:
                self.stop()

    def stop(self) -> None:
        """Write what was recorded so far, unless that is done, and let go of its memory."""
        if self._profiler is None:
            return
        if self._profiler.step_num < self._wait + self._warm_up:
            self._note(f"--profile: the training ended after {self._profiler.step_num} steps, before the first traced")
        self._profiler.stop()
        self._profiler = None

    def _action(self, step: int) -> ProfilerAction:
        if step < self._wait or step >= self._end:
            return ProfilerAction.NONE
        if step < self._wait + self._warm_up:
            return ProfilerAction.WARMUP
        return ProfilerAction.RECORD_AND_SAVE if step == self._end - 1 else ProfilerAction.RECORD

    def _write(self, profiler: profile) -> None:
        """The trace, and the operators that took the most time: over all shapes, and shape by shape."""
        first, last = self._wait + self._warm_up + 1, profiler.step_num
        temporary = hidden_sibling(self._path, "tmp")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            try:
                profiler.export_chrome_trace(str(temporary))
                temporary.replace(self._path)
            finally:
                temporary.unlink(missing_ok=True)
            tables = [
                profiler.key_averages(group_by_input_shape=by_shape).table(
                    sort_by=self._sort_by, row_limit=ROWS, max_name_column_width=60
                )
                for by_shape in (False, True)
            ]
            about = f"{self._path.stem}: steps {first} to {last} of this process"
            write_atomic(self._path.with_suffix(".txt"), "\n\n".join([about, *tables]).encode())
        except (OSError, RuntimeError, ResourceError) as error:
            self._note(f"--profile: the trace could not be written: {error}")
        else:
            self._note(
                f"--profile: a trace of steps {first} to {last} is {self._path}, the top operators are beside it"
            )


@contextmanager
def tracing(context: StageContext, *, stage: str, num_steps: int, note: Callable[[str], None]) -> Iterator[Tracer]:
    """Trace a few steps after the first ones, where `context.profile` asks for it; the loop calls `step` after each.

    RUN/profile/STAGE-rank-N.json is for https://ui.perfetto.dev or chrome://tracing, the .txt beside it for reading.
    A training that is stopped or fails leaves the steps recorded until then.

    Args:
        context: Its run takes the files.
        stage: Part of their names.
        num_steps: Still to do.
        note: Told where the files are, or why there are none.
    """
    path = context.run / "profile" / f"{stage}-rank-{context.group.rank}.json"
    tracer = Tracer(context.group.device if context.profile else None, path=path, num_steps=num_steps, note=note)
    try:
        yield tracer
    finally:
        tracer.stop()
