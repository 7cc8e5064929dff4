"""Data sets that come as a series of files: which ones a recipe means."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from bmctl.errors import DataError
from bmctl.schema import resolve_env

SPLITS = ("train", "val", "test")
MAX_FILES = 100_000
_RANGE = re.compile(r"\{(\d{1,9})\.\.(\d{1,9})\}")

Stamp = tuple[int, int]
"""Size in bytes and time of the last change in ns: as long as they stay, what was read of a file holds."""


def find(pattern: str, *, suffixes: tuple[str, ...], key: str) -> list[Path]:
    """The files of a folder, a pattern such as ``train-*.tar``, or a range such as ``train-{000000..000146}.tar``.

    Args:
        pattern: As the recipe has it; relative to where bmctl is started.
        suffixes: By which files of a folder are told.
        key: Of the recipe, for messages.

    Returns:
        Sorted by name, or in the range's order.

    Raises:
        DataError: No such files, or one of a range is missing.
    """
    text = resolve_env(pattern)
    if "://" in text or text.startswith("pipe:"):
        raise DataError(f"{key}: {text!r} is not a local file", hint="fetch the files first, and name them here")
    if Path(text).is_dir():
        found = sorted(path for path in Path(text).iterdir() if path.name.endswith(suffixes) and path.name[0] != ".")
        if not found:
            raise DataError(f"{key}: no {' or '.join(suffixes)} files in {text!r}", hint=f"--set {key}=FILES")
        return found
    paths = [Path(each) for each in _expand(text, key=key)]
    if len(paths) == 1 and not paths[0].exists() and re.search(r"[*?\[]", text):
        root, rest = (Path("/"), text.lstrip("/")) if text.startswith("/") else (Path(), text)
        paths = sorted(root.glob(rest))
    if not paths:
        raise DataError(f"{key}: no files match {text!r}", hint=f"--set {key}=FILES")
    return paths


def stamp(path: Path, *, key: str = "") -> Stamp:
    """What tells whether a file has changed.

    Raises:
        DataError: Missing, unreadable or not a regular file.
    """
    try:
        known = path.stat()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        hint = f"--set {key}=FILES" if key else "fetch it again"
        raise DataError(f"{path}: cannot be read ({reason})", hint=hint) from error
    if not stat.S_ISREG(known.st_mode):
        raise DataError(f"{path}: not a regular file", hint="move it away, or name the files one by one")
    return known.st_size, known.st_mtime_ns


def open_unchanged(path: Path, known: Stamp) -> int:
    """A descriptor for reading a file of which `stamp` was taken before; never waits on a FIFO.

    Raises:
        DataError: It is gone, unreadable or another one by now.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})", hint="check its permissions") from error
    now = os.fstat(descriptor)
    if (now.st_size, now.st_mtime_ns) != known or not stat.S_ISREG(now.st_mode):
        os.close(descriptor)
        raise DataError(f"{path}: has changed since its index was read", hint="start again with the data at rest")
    return descriptor


def _expand(text: str, *, key: str) -> list[str]:
    """Every text that the first range stands for, and so on."""
    match = _RANGE.search(text)
    if match is None:
        return [text]
    first, last = match.groups()
    if not int(first) <= int(last) < int(first) + MAX_FILES:
        raise DataError(f"{key}: the range {match.group()} of files", hint="write {FIRST..LAST}, FIRST <= LAST")
    width = len(first) if first.startswith("0") or len(first) == len(last) else 0
    before, after = text[: match.start()], text[match.end() :]
    numbers = range(int(first), int(last) + 1)
    found = [each for number in numbers for each in _expand(f"{before}{number:0{width}}{after}", key=key)]
    if len(found) > MAX_FILES:
        raise DataError(f"{key}: more than {MAX_FILES:,} files", hint="write larger files")
    return found
