"""Numbers that look random and depend on their keys alone: the same in every process and with every NumPy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Luck:
    """What a sample's augmentation is drawn from, and from nothing else.

    Attributes:
        seed: The recipe's.
        epoch: Counted from 0.
        indices: int64 [n], which samples these are.
    """

    seed: int
    epoch: int
    indices: np.ndarray


def hash_integers(values: np.ndarray, *, keys: Sequence[int]) -> np.ndarray:
    """uint64 [n] for integers [n], by splitmix64 over the keys and each value.

    Args:
        values: Integers [n], such as sample indices.
        keys: Non-negative integers that say what the numbers are for, such as (seed, epoch).

    Source: Steele, Lea, Flood 2014, https://doi.org/10.1145/2714064.2660195
    """
    state = np.zeros(1, np.uint64)
    for key in keys:
        state = _mix(state + np.array([key], np.uint64))
    return _mix(np.asarray(values).astype(np.uint64) + state)


def uniform(values: np.ndarray, *, keys: Sequence[int]) -> np.ndarray:
    """float64 [n] in [0, 1), one per integer."""
    return (hash_integers(values, keys=keys) >> np.uint64(11)) * 2.0**-53


def shuffled(num: int, *, keys: Sequence[int]) -> np.ndarray:
    """int64 [num]: a permutation of 0 .. num - 1."""
    return np.argsort(hash_integers(np.arange(num), keys=keys), kind="stable")


def carve(
    values: np.ndarray, labels: np.ndarray, *, ratios: dict[str, float], seed: int, rest: str
) -> dict[str, np.ndarray]:
    """Cut samples into parts that hold every class in the same proportions.

    A class with at least one sample more than there are parts to fill gives each of them at least one.

    Args:
        values: uint64 or int64 [N], what each sample is known by: its index, or a hash of its name.
        labels: int64 [N].
        ratios: Share of each part but the rest.
        seed: Of the choice.
        rest: Name of the part that gets what is left.

    Returns:
        int64 indices per part, ascending.
    """
    luck = hash_integers(values, keys=(3, seed))
    parts: dict[str, list[np.ndarray]] = {name: [] for name in (*ratios, rest)}
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        members = members[np.argsort(luck[members], kind="stable")]
        asked = sum(ratio > 0 for ratio in ratios.values())
        start = 0
        for name, ratio in ratios.items():
            count = round(len(members) * ratio)
            count = max(count, 1) if ratio > 0 and len(members) > asked else count
            parts[name].append(members[start : start + count])
            start += count
        parts[rest].append(members[start:])
    return {name: np.sort(np.concatenate(chunks)) for name, chunks in parts.items()}


def _mix(state: np.ndarray) -> np.ndarray:
    state = state + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
