"""Hashes that stand in for random numbers."""

from __future__ import annotations

import numpy as np
import pytest

from bmctl.core.chance import carve, hash_integers, shuffled, uniform


def test_splitmix64_gives_its_published_numbers() -> None:
    """First outputs of the reference implementation for seed 1234567: https://rosettacode.org/wiki/Pseudo-random_numbers/Splitmix64"""
    step = 0x9E3779B97F4A7C15
    states = np.array([(1234567 + step * index) % 2**64 for index in range(3)], np.uint64)
    assert hash_integers(states, keys=()).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_bits_are_even_and_keys_matter() -> None:
    values = np.arange(20_000)
    luck = hash_integers(values, keys=(1, 2))
    bits = (luck[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    assert np.abs(bits.mean(axis=0) - 0.5).max() < 0.02
    for keys in ((2, 1), (1, 3), (1,), (1, 2, 0)):
        assert not np.any(hash_integers(values, keys=keys) == luck)
    assert sorted(shuffled(1000, keys=(5,))) == list(range(1000))


def test_uniform_numbers_fill_their_range_evenly() -> None:
    drawn = uniform(np.arange(20_000), keys=(7,))
    assert drawn.dtype == np.float64
    assert 0 <= drawn.min() < 1e-3 and 1 - 1e-3 < drawn.max() < 1
    assert np.abs(np.histogram(drawn, bins=10, range=(0, 1))[0] - 2000).max() < 200


def test_parts_are_disjoint_complete_and_stratified() -> None:
    labels = np.repeat([0, 1, 2], [100, 40, 7])
    parts = carve(np.arange(147), labels, ratios={"val": 0.1, "test": 0.2}, seed=0, rest="train")
    assert sorted(np.concatenate(list(parts.values()))) == list(range(147))
    assert np.bincount(labels[parts["val"]]).tolist() == [10, 4, 1]
    assert np.bincount(labels[parts["test"]]).tolist() == [20, 8, 1]


@pytest.mark.parametrize(("count", "sizes"), [(1, (0, 0, 1)), (2, (0, 0, 2)), (3, (1, 1, 1)), (4, (1, 1, 2))])
def test_small_classes_are_shared_out_as_far_as_they_go(count: int, sizes: tuple[int, ...]) -> None:
    parts = carve(np.arange(count), np.zeros(count, int), ratios={"val": 0.1, "test": 0.1}, seed=0, rest="train")
    assert tuple(len(parts[name]) for name in ("val", "test", "train")) == sizes
