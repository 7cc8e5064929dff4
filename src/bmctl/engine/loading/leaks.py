"""Samples that stand in two splits: what is validated or tested on must not have been trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

from bmctl.engine.loading.data import open_samples
from bmctl.errors import DataError
from bmctl.recipe.sections import Recipe
from bmctl.sources import Samples, Sharded
from bmctl.sources.samples import ArraySamples, FileSamples

TOLERATED = 0.05
"""Share of a split that may repeat another: published data sets have a few twins, a mixed-up split has many."""
MAX_FILES = 20_000
_HEAD_BYTES = 8192


def check_leaks(recipe: Recipe) -> tuple[str, ...]:
    """Compare the splits: pixels in memory, size and both ends of files and of members of archives, lines of streams.

    Returns:
        What is to be said about repeated samples that are too few to refuse, or about files too many to compare.

    Raises:
        DataError: More than TOLERATED of the validation or test samples stand in an earlier split too.
    """
    splits = {name: open_samples(recipe, split=name) for name in ("train", "val", "test")}
    files: list[FileSamples] = [samples for samples in splits.values() if isinstance(samples, FileSamples)]
    if sum(len(samples.paths) for samples in files) > MAX_FILES:
        return (f"more than {MAX_FILES:,} files: they were not searched for images that stand in two splits",)
    wanted = _repeated_sizes(files)
    known = {name: dict(_identities(samples, wanted=wanted)) for name, samples in splits.items()}
    notes = []
    for first, second in combinations(splits, 2):
        total = len(splits[second].labels)
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


def _identities(samples: Samples, *, wanted: set[int]) -> Iterator[tuple[bytes, str]]:
    """What each sample is told by, and where it stands; files of a size that no other has cannot be twins."""
    if isinstance(samples, Sharded):
        for index, digest in enumerate(samples.digests.tolist()):
            yield digest.to_bytes(8), samples.name(index)
        return
    if isinstance(samples, ArraySamples):
        for index, image in enumerate(samples.images):
            yield hashlib.blake2b(image.tobytes(), digest_size=16).digest(), f"sample {index}"
    elif isinstance(samples, FileSamples):
        for path, size in zip(samples.paths, samples.sizes, strict=True):
            if size in wanted:
                yield _contents(path), str(path)


def _repeated_sizes(files: list[FileSamples]) -> set[int]:
    """Sizes that occur in more than one split."""
    sizes = [set(samples.sizes) for samples in files]
    return {size for first, second in combinations(sizes, 2) for size in first & second}


def _contents(path: Path) -> bytes:
    """Hash of a file's size, beginning and end: images that agree in these are the same image."""
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
            size_bytes = file.seek(0, 2)
            file.seek(max(len(head), size_bytes - _HEAD_BYTES))
            digest = hashlib.blake2b(head + file.read(_HEAD_BYTES), digest_size=16)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})", hint="check its permissions") from error
    digest.update(str(size_bytes).encode())
    return digest.digest()
