"""Silence for libraries that print, log, warn and report of their own accord; what they warn about is kept as notes."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Iterator

NOISY = ("torch", "onnxscript", "onnx_ir", "nncf")
"""Loggers that speak while exporting and quantizing; their own handlers hang on them or on children of theirs."""


@contextlib.contextmanager
def listening(notes: list[str]) -> Iterator[None]:
    """Nothing reaches stdout or stderr from Python; each warning becomes a line of `notes`, once.

    Warnings about what will change in a library's future are dropped: the user cannot act on them.
    """
    keep = _Keep(notes)
    loggers = [logging.getLogger(name) for name in NOISY]
    loggers += [
        logger
        for name, logger in logging.root.manager.loggerDict.items()
        if isinstance(logger, logging.Logger) and name.startswith(NOISY) and (logger.handlers or not logger.propagate)
    ]
    before = [(logger, logger.handlers[:], logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [keep], False
    try:
        with (
            warnings.catch_warnings(record=True) as caught,
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("always")
            yield
    finally:
        for logger, handlers, propagate in before:
            logger.handlers, logger.propagate = handlers, propagate
    for entry in caught:
        if not issubclass(entry.category, DeprecationWarning | FutureWarning | PendingDeprecationWarning):
            keep.add(str(entry.message))


def switch_off_telemetry() -> None:
    """bmctl sends nothing: call this before the first import of openvino or nncf.

    Both fall back to a silent stub when `openvino_telemetry` cannot be imported; its own opt-out is a file in the
    user's home directory, which is not ours to write. NNCF's log is kept to errors.

    Source: openvino/tools/ovc/telemetry_utils.py and nncf/telemetry/wrapper.py
    """
    if "openvino_telemetry" not in sys.modules:
        # None makes the import statement raise ModuleNotFoundError.
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    logging.getLogger("nncf").setLevel(logging.ERROR)


class _Keep(logging.Handler):
    def __init__(self, notes: list[str]) -> None:
        super().__init__(level=logging.WARNING)
        self.notes = notes

    def emit(self, record: logging.LogRecord) -> None:
        self.add(record.getMessage())

    def add(self, text: str) -> None:
        line = " ".join(text.split())[:300]
        if line and line not in self.notes:
            self.notes.append(line)
