"""Classes of samples whose labels are numbers or names, as tar files and streams have them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bmctl.errors import DataError
from bmctl.sources.samples import in_order

if TYPE_CHECKING:
    import numpy as np

Label = int | str
"""The number of a class, or its name."""
MAX_CLASSES = 100_000


def name_labels(
    labels: Sequence[Sequence[Label]],
    *,
    is_train: Sequence[bool],
    class_names: Sequence[str] | None,
    base: Path,
    where: Callable[[int, int], str],
) -> tuple[tuple[str, ...], np.ndarray]:
    """The classes, and the labels of all samples as their numbers; the training samples say which there are.

    Args:
        labels: Of each file.
        is_train: Of each file.
        class_names: In the order of the numbers; None takes the numbers, or the names that occur, sorted.
        base: Where the data is, for messages.
        where: Names a sample by file and place in it, for messages.

    Returns:
        Names, and int64 [N] over all files.

    Raises:
        DataError: Numbers among names, a label of no class, or fewer than two classes.
    """
    import numpy as np

    known = {label for each, trains in zip(labels, is_train, strict=True) if trains for label in each}
    numbered = {label for label in known if isinstance(label, int)}
    if 0 < len(numbered) < len(known):
        raise DataError(f"{base}: some labels are numbers, some are names", hint="write all of them as names")
    if class_names is not None:
        names = tuple(class_names)
    elif numbered:
        names = tuple(str(number) for number in range(min(max(numbered) + 1, MAX_CLASSES)))
    else:
        names = tuple(in_order({str(label) for label in known}))
    if len(names) < 2:
        raise DataError(f"{base}: all images are of one class; expected at least two", hint="add another class")
    index: dict[Label, int] = {name: position for position, name in enumerate(names)}
    if numbered:
        index = {position: position for position in range(len(names))}
    found = np.array([index.get(label, -1) for each in labels for label in each], np.int64)
    if found.min() < 0:
        part, row = _place(labels, int(np.argmin(found)))
        among = f"0 to {len(names) - 1}" if numbered else "one of " + ", ".join(names[:5]) + ", ..." * (len(names) > 5)
        raise DataError(
            f"{where(part, row)}: label {labels[part][row]!r}, expected {among}",
            hint="--set data.source.class_names=[...], or correct the label",
        )
    return names, found


def _place(labels: Sequence[Sequence[Label]], number: int) -> tuple[int, int]:
    """File, and place in it, of a sample counted over all files."""
    for part, each in enumerate(labels):
        if number < len(each):
            return part, number
        number -= len(each)
    raise IndexError(number)
