"""TensorBoard's event file, written in step with the loop.

The library's own writer works in a thread, and a full disk ends that thread with a traceback of its own.
"""

from __future__ import annotations

import io
import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from bmctl.disk import append, disk_errors


class Board:
    """One event file.

    Args:
        folder: Where `tensorboard --logdir` looks; made if need be.
        purge_step: From this step on, what files before this one say is void.

    Raises:
        ResourceError: The disk is full, read-only or not ours; so do the methods.
    """

    def __init__(self, folder: Path, *, purge_step: int) -> None:
        self._path = folder / f"events.out.tfevents.{time.time_ns() // 10**9:010d}.{platform.node()}.{os.getpid()}.0"
        with disk_errors(self._path):
            folder.mkdir(parents=True, exist_ok=True)
        self._write(Event(file_version="brain.Event:2"))
        self._write(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    def draw(self, step: int, values: Mapping[str, float]) -> None:
        """One point on the curve of each name."""
        points = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(Event(step=step, summary=Summary(value=points)))

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        append(self._path, record.getvalue())
