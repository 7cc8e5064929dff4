"""All samples of a split in order, as arrays: for evaluation, calibration and examples."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from bmctl.engine.loading.order import share_of
from bmctl.engine.loading.split import Arrays, Encoded, Split

DECODERS = min(4, os.cpu_count() or 1)


def array_batches(split: Split, *, batch_size: int, rank: int = 0, world: int = 1) -> Iterator[Arrays]:
    """Finished fields in the order in which the model takes them, then targets; the last batch smaller if need be.

    Args:
        rank: This process; of each batch only its `share_of` is read, and the other rows of the fields are zero.
        world: Number of processes.
    """
    starts = range(0, len(split), batch_size)
    steps = [np.arange(start, min(start + batch_size, len(split))) for start in starts]
    if world == 1:
        yield from ({**fields, **targets} for fields, targets in _ahead(split, steps))
        return
    rows = [share_of(len(step), rank=rank, world=world) for step in steps]
    mine = [(step, share) for step, share in zip(steps, rows, strict=True) if share.start < share.stop]
    read = _ahead(split, [step[share] for step, share in mine])
    for step, share in zip(steps, rows, strict=True):
        fields = next(read).fields if share.start < share.stop else _none_of(split)
        yield {**{name: _padded(array, len(step), share) for name, array in fields.items()}, **split.targets(step)}


def _none_of(split: Split) -> Arrays:
    """No rows; free axes are as short as they can be."""
    shapes = {spec.name: [size if isinstance(size, int) else 1 for size in spec.shape[1:]] for spec in split.specs}
    return {spec.name: np.zeros((0, *shapes[spec.name]), spec.dtype) for spec in split.specs}


def _padded(array: np.ndarray, num_rows: int, share: slice) -> np.ndarray:
    whole = np.zeros((num_rows, *array.shape[1:]), array.dtype)
    whole[share] = array
    return whole


def _ahead(split: Split, steps: Sequence[np.ndarray]) -> Iterator[Encoded]:
    """`Split.arrays` of each step."""
    if split.in_memory:
        yield from map(split.arrays, steps)
        return
    # Files: threads read the next batches while the caller works on this one; in sequence only one can.
    in_order = split.arrays_in_order(steps) if split.samples.sequential else None
    num_threads = DECODERS if in_order is None else 1
    waiting: deque[Future[Encoded]] = deque()
    with ThreadPoolExecutor(num_threads) as pool:
        try:
            for step in steps:
                waiting.append(pool.submit(split.arrays, step) if in_order is None else pool.submit(next, in_order))
                if len(waiting) > num_threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for each in waiting:
                each.cancel()
