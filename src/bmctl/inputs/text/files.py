"""Texts to be predicted: lines of a file, rows of a table, or the text itself."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from bmctl.core.requests import OnBad, Requested, Requests, path_name
from bmctl.core.tables import SUFFIXES, read_lines, read_rows, table_suffix
from bmctl.errors import DataError
from bmctl.inputs.text.spec import COLUMN
from bmctl.inputs.text.tokens import encode
from bmctl.schema import Emit

if TYPE_CHECKING:
    from bmctl.inputs import Resolved

MAX_NAMED = 50
_LINES = (".txt", ".text", ".lines", "")
_MOST_NAME = 4096
_MOST_SHOWN = 60


def requests(source: str | Path, *, given: Resolved, batch_size: int, on_bad: OnBad, emit: Emit) -> Requests:
    """See bmctl.inputs.text.requests.

    Args:
        source: What is there as a file is read; what looks like a file's name must be one; all else is a text.
        given: The training's.
        batch_size: Texts per batch; the last one may be smaller.
        on_bad: `refuse` names all bad texts and gives no batches; `skip` leaves them out and says so.
        emit: Takes a note of what is left out.

    Raises:
        DataError: Nothing there, or no texts; bad texts, while reading.
    """
    texts = _found(source)
    bad = [name for name, text in texts if not text.strip()]
    if len(bad) == len(texts):
        raise DataError(f"{source}: there is no text in it", hint="put a text on each line")
    named = ", ".join(bad[:MAX_NAMED]) + (", ..." if len(bad) > MAX_NAMED else "")
    if bad and on_bad == "refuse":
        raise DataError(f"no text in {named}", hint="remove the empty lines, or leave them out with --on-bad skip")
    if bad:
        emit({"event": "note", "stage": "infer", "text": f"left out, as there is no text: {named}"})
    kept = [(name, text) for name, text in texts if text.strip()]
    return Requests(len(kept), _batches(kept, given=given, batch_size=batch_size))


def _found(source: str | Path) -> list[tuple[str, str]]:
    """Texts, and what they are called."""
    if isinstance(source, str) and not _is_there(source) and not _looks_like_a_file(source):
        try:
            source.encode()
        except UnicodeEncodeError as error:  # bytes of the command line that are no UTF-8 come as halves of characters
            raise DataError(
                f"the text {_short(source)!a} is not UTF-8", hint="write it into a file in UTF-8, and name that"
            ) from error
        return [(_short(source), source)]
    path = Path(source)
    if path.is_dir():
        raise DataError(f"{path} is a folder", hint="name a file with a text on each line, a table, or a text itself")
    name = path_name(Path(path.name))
    if table_suffix(path) in SUFFIXES:
        rows = read_rows(path, wanted=(COLUMN,), hint=f"call the column with the texts {COLUMN}")
        texts = [(f"{name}:{row.line}", row.fields[COLUMN]) for row in rows]
    else:
        texts = [(f"{name}:{number}", line) for number, line in read_lines(path)]
    if not texts:
        raise DataError(f"{path} is empty", hint="put a text on each line")
    return texts


def _short(text: str) -> str:
    """A text by which it is known again."""
    line = " ".join(text.split())
    return line if len(line) <= _MOST_SHOWN else f"{line[: _MOST_SHOWN - 3]}..."


def _is_there(source: str) -> bool:
    try:
        return len(source) < _MOST_NAME and Path(source).exists()
    except (OSError, ValueError):  # no name that a file could have
        return False


def _looks_like_a_file(source: str) -> bool:
    """One word with a suffix that is read, or behind folders."""
    suffix = table_suffix(Path(source))
    return len(source.split()) == 1 and ("/" in source or suffix in (*SUFFIXES, *_LINES[:-1]))


def _batches(texts: list[tuple[str, str]], *, given: Resolved, batch_size: int) -> Iterator[Requested]:
    import numpy as np

    waiting = iter(texts)
    while batch := list(islice(waiting, batch_size)):
        fields = encode({COLUMN: [text for _, text in batch]}, given=given)
        yield Requested([name for name, _ in batch], {name: each.astype(np.int64) for name, each in fields.items()})
