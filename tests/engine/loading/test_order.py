"""The order of samples, as numbers; what loaders make of it is in test_loader.py."""

from __future__ import annotations

import numpy as np
import pytest

from bmctl.engine.loading.order import Plan, balanced_order, sample_order, share_of, windowed_order


def test_every_epoch_is_another_permutation() -> None:
    orders = [sample_order(100, seed=seed, epoch=epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(100)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert sample_order(5, seed=0, epoch=0).tolist() == [2, 4, 1, 0, 3]  # on every machine


def test_unequal_classes_are_balanced_as_long_as_they_last() -> None:
    labels = np.array([0] * 50 + [2] * 3 + [1] * 10)
    order = balanced_order(labels)
    assert sorted(order) == list(range(63))
    assert np.bincount(labels[order[:9]]).tolist() == [3, 3, 3]
    assert np.bincount(labels[order[:13]]).tolist() == [5, 5, 3]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_share_every_step(world: int) -> None:
    order = sample_order(50, seed=0, epoch=0)
    plans = [Plan(seed=0, epoch=0, batch_size=8, rank=rank, world=world, start_step=2) for rank in range(world)]
    together = np.concatenate([plan.steps(order) for plan in plans], axis=1)
    assert np.array_equal(together, order[16:48].reshape(4, 8))


@pytest.mark.parametrize(
    ("num_rows", "sizes"), [(0, [0, 0, 0]), (1, [1, 0, 0]), (2, [1, 1, 0]), (7, [3, 3, 1]), (9, [3, 3, 3])]
)
def test_ranks_share_what_is_evaluated(num_rows: int, sizes: list[int]) -> None:
    shares = [np.arange(num_rows)[share_of(num_rows, rank=rank, world=3)] for rank in range(3)]
    assert [len(share) for share in shares] == sizes
    assert np.array_equal(np.concatenate(shares), np.arange(num_rows))


# -- shards -----------------------------------------------------------------------------------------

PARTS = np.repeat([4, 0, 7, 2, 9], [100, 30, 1, 80, 89])


@pytest.mark.parametrize("window", [1, 10, 64, 10_000])
def test_a_reader_never_holds_more_than_a_window(window: int) -> None:
    order = windowed_order(PARTS, window=window, seed=3, epoch=1)
    assert sorted(order) == list(range(300))
    sequence = windowed_order(PARTS, window=1, seed=3, epoch=1)
    place = np.argsort(sequence)[order]  # where each sample stands in the files as they are read
    held = np.maximum.accumulate(place) + 1 - np.arange(1, 301)
    assert held.max() < window
    assert np.abs(place - np.arange(300)).max() < window


def test_a_window_of_one_reads_shuffled_files_in_sequence() -> None:
    order = windowed_order(PARTS, window=1, seed=0, epoch=0)
    changes = np.flatnonzero(np.diff(PARTS[order])) + 1
    assert len(changes) == 4
    assert all(np.array_equal(piece, np.sort(piece)) for piece in np.split(order, changes))
    firsts = {tuple(PARTS[windowed_order(PARTS, window=1, seed=0, epoch=epoch)[[0, -1]]]) for epoch in range(20)}
    assert len(firsts) > 5


def test_a_window_shuffles_what_is_in_it() -> None:
    """Neighbours come apart by about a third of the window, whatever the epoch."""
    one = np.zeros(20_000, int)
    for epoch in (0, 1):
        order = windowed_order(one, window=1000, seed=0, epoch=epoch)
        place = np.argsort(order)
        assert 250 < np.abs(np.diff(place)).mean() < 400
    other = windowed_order(one, window=1000, seed=1, epoch=1)
    assert (other != order).mean() > 0.9


def test_the_same_order_on_every_machine() -> None:
    assert windowed_order(np.array([0, 0, 1, 1, 1]), window=8, seed=0, epoch=0).tolist() == FIXED


FIXED = [2, 3, 4, 1, 0]
