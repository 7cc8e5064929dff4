"""Samples that stand in two splits: what is validated or tested on must not have been trained on."""

from __future__ import annotations

from itertools import combinations

import numpy as np

from bmctl.engine.loading.data import Data
from bmctl.errors import DataError

TOLERATED = 0.05
"""Share of a split that may repeat another: published data sets have a few twins, a mixed-up split has many."""
MAX_FILES = 20_000


def check_leaks(data: Data) -> tuple[str, ...]:
    """Compare the splits: arrays in memory, size and both ends of files and of members of archives, lines of streams.

    Returns:
        What is to be said about repeated samples that are too few to refuse, or about files too many to compare.

    Raises:
        DataError: More than TOLERATED of the validation or test samples stand in an earlier split too.
    """
    splits = {name: data.samples(name) for name in ("train", "val", "test")}
    if sum(len(samples) for samples in splits.values() if samples.opens_files) > MAX_FILES:
        return (f"more than {MAX_FILES:,} files: they were not searched for samples that stand in two splits",)
    sketches = {name: samples.sketches() for name, samples in splits.items()}
    known: dict[str, dict[bytes, str]] = {}
    for name, samples in splits.items():
        others = np.concatenate([sketch for other, sketch in sketches.items() if other != name])
        alike = np.flatnonzero(np.isin(sketches[name], others)).tolist()
        known[name] = {key: samples.name(index) for key, index in zip(samples.identities(alike), alike, strict=True)}
    notes = []
    for first, second in combinations(splits, 2):
        total = len(splits[second])
        twins = [(known[first][key], where) for key, where in known[second].items() if key in known[first]]
        if not twins:
            continue
        text = f"{len(twins)} of {total} {second} samples stand in {first} too, such as {twins[0][1]} = {twins[0][0]}"
        if len(twins) > TOLERATED * total:
            raise DataError(
                f"data.source: {text}; a score on them would measure memory", hint="remove them from one of the splits"
            )
        notes.append(text)
    return tuple(notes)
