"""Which samples form which step: a matter of seed, epoch and global batch, never of processes or workers.

N: samples of a split.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bmctl.core.chance import hash_integers, shuffled


@dataclass(frozen=True)
class Plan:
    """What one process works through in one epoch.

    Attributes:
        seed: Of order and augmentation.
        epoch: Counted from 0.
        batch_size: Samples of a step over all processes.
        rank: This process; it gets its slice of every step, so that a step is the same for any `world`.
        world: Number of processes.
        start_step: Steps of the epoch that are done already.
    """

    seed: int
    epoch: int
    batch_size: int
    rank: int = 0
    world: int = 1
    start_step: int = 0

    def steps(self, order: np.ndarray) -> np.ndarray:
        """int64 [steps left, batch_size / world]: what of `order` this process takes; an incomplete step is dropped."""
        whole = order[: len(order) // self.batch_size * self.batch_size]
        return whole.reshape(-1, self.world, self.batch_size // self.world)[self.start_step :, self.rank]


def share_of(num_rows: int, *, rank: int, world: int) -> slice:
    """The rows of a batch that one process evaluates; the last processes' shares may be shorter, or empty."""
    share = -(-num_rows // world)
    return slice(min(rank * share, num_rows), min((rank + 1) * share, num_rows))


def balanced_order(labels: np.ndarray) -> np.ndarray:
    """An order of which every beginning holds the classes in equal numbers, as far as they last.

    Args:
        labels: int64 [N].

    Returns:
        int64 [N], the same for the same labels.
    """
    order = shuffled(len(labels), keys=())
    by_class = order[np.argsort(labels[order], kind="stable")]
    counts = np.bincount(labels)
    rank_in_class = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    return by_class[np.argsort(rank_in_class, kind="stable")]


def sample_order(num_samples: int, *, seed: int, epoch: int) -> np.ndarray:
    """int64 [num_samples]: the permutation of one epoch, the same in every process and with every NumPy."""
    return shuffled(num_samples, keys=(1, seed, epoch))


def windowed_order(parts: np.ndarray, *, window: int, seed: int, epoch: int) -> np.ndarray:
    """An order that reads parts one after another, nearly in sequence: shuffled parts, then a window shuffle.

    A sample comes out at most `window` places from where it stands in the shuffled parts, so that a reader never holds
    more than `window` samples. Neighbours stay neighbours within about a window: files sorted by class need a window
    larger than a class, or files that were shuffled when they were written.

    Args:
        parts: Integers [N], the file of each sample; samples of a file stand in the order in which they are read.
        window: Samples among which is shuffled.
        seed: The recipe's.
        epoch: Counted from 0.

    Returns:
        int64 [N].
    """
    names, inverse = np.unique(parts, return_inverse=True)
    place_of_part = np.argsort(shuffled(len(names), keys=(5, seed, epoch)), kind="stable")
    in_sequence = np.argsort(place_of_part[inverse], kind="stable")
    late_by = hash_integers(in_sequence, keys=(6, seed, epoch)) % np.uint64(window)
    return in_sequence[np.argsort(np.arange(len(parts)) + late_by.astype(np.int64), kind="stable")]
