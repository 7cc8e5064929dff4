"""Silence for libraries that print, log and warn of their own accord; what they warn about is kept as notes."""

from __future__ import annotations

import contextlib
import io
import logging
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
