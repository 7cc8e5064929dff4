"""Splits and batches: which samples form which step, and what they look like to the model.

n: samples of a batch. C, H, W: channels, height, width. N: samples of a split.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from bmctl.core import images
from bmctl.engine.batch import Batch
from bmctl.engine.loading.augment import augment, crop_boxes
from bmctl.engine.loading.loader import open_loader
from bmctl.engine.loading.order import Plan, balanced_order, sample_order, share_of, windowed_order
from bmctl.errors import DataError, RecipeError
from bmctl.recipe.sections import AugmentConfig, DataConfig, Recipe
from bmctl.schema import BATCH, Preprocess, TensorSpec
from bmctl.sources import SOURCES, Pictures, Samples, Sharded, Stream
from bmctl.sources.samples import ArraySamples

DECODERS = min(4, os.cpu_count() or 1)
MOST_OF_STREAM = 4096
"""Calibration samples of a stream, which is read in order, so that its beginning need not hold all classes."""


@dataclass(frozen=True)
class Split:
    """The chosen samples of one split, as the model sees them.

    Attributes:
        indices: int64 [N], into `samples`, in a class-balanced order; ascending for a stream.
        labels: int64 [N].
        fingerprint: Changes when the samples or the choice among them do.
        augment: None for unaugmented samples.
    """

    samples: Samples
    indices: np.ndarray
    labels: np.ndarray
    preprocess: Preprocess
    fingerprint: str
    augment: AugmentConfig | None = None

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.samples.class_names

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        """What the model takes of a batch, in order."""
        shape, meaning = (self.preprocess.channels, *self.preprocess.size), "normalised image, channels first"
        return (TensorSpec(name="input", shape=(BATCH, *shape), dtype="float32", meaning=meaning),)

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def in_memory(self) -> bool:
        return isinstance(self.samples, ArraySamples)

    def arrays(self, positions: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Unaugmented: float32 [n, C, H, W] and int64 [n]."""
        return self._unaugmented(self._decoded(self.indices[positions]), positions)

    def arrays_in_order(self, steps: Sequence[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """`arrays` of each step, in one pass for a stream whose steps are in its order."""
        if not isinstance(self.samples, Stream):
            yield from map(self.arrays, steps)
            return
        pictures = self.samples.pictures(self.indices[np.concatenate(steps)] if steps else [])
        for positions in steps:
            yield self._unaugmented(list(islice(pictures, len(positions))), positions)

    def order(self, *, seed: int, epoch: int) -> np.ndarray:
        """int64 [N]: the positions of one epoch of training."""
        if isinstance(self.samples, Sharded) and self.samples.window is not None:
            parts = self.samples.parts[self.indices]
            return windowed_order(parts, window=self.samples.window, seed=seed, epoch=epoch)
        return sample_order(len(self), seed=seed, epoch=epoch)

    def pixel_batches(self, plan: Plan, *, first: int = 0, every: int = 1) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Augmented batches: uint8 [n, H, W, c] and int64 [n].

        Args:
            plan: Which part of which epoch.
            first: Counted from the plan's own first step.
            every: 1 gives all steps from there, 2 every second one.
        """
        steps = plan.steps(self.order(seed=plan.seed, epoch=plan.epoch))[first::every]
        stream = self.samples.pictures(self.indices[steps.ravel()]) if isinstance(self.samples, Stream) else None
        for positions in steps:
            chosen = self.indices[positions]
            pictures = self._decoded(chosen) if stream is None else list(islice(stream, len(chosen)))
            yield self._augmented(pictures, chosen, plan), self.labels[positions]

    def _decoded(self, indices: np.ndarray) -> Sequence[images.Picture] | np.ndarray:
        if isinstance(self.samples, Pictures):
            return list(self.samples.pictures(indices))
        return self.samples.read(indices)

    def _unaugmented(
        self, pictures: Sequence[images.Picture] | np.ndarray, positions: Sequence[int] | np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        return images.prepare(pictures, self.preprocess), self.labels[positions]

    def _augmented(self, pictures: Sequence[images.Picture] | np.ndarray, chosen: np.ndarray, plan: Plan) -> np.ndarray:
        """uint8 [n, H, W, c]."""
        config, boxes = self.augment, None
        if config is not None and config.crop is not None:
            sizes = np.array([images.size_of(picture) for picture in pictures])
            boxes = crop_boxes(sizes, chosen, config=config.crop, seed=plan.seed, epoch=plan.epoch)
        pixels = images.resize(pictures, self.preprocess, boxes=boxes)
        if config is None:
            return pixels
        return augment(pixels, chosen, config=config, seed=plan.seed, epoch=plan.epoch, fill=self.preprocess.mean)


def open_split(recipe: Recipe, *, name: str, preprocess: Preprocess, augment: bool = False) -> Split:
    """The samples that the recipe asks for.

    Args:
        recipe: Its `data` section says which source, and how many samples of each split.
        name: ``train``, ``val``, ``test``, or ``calib`` for calibration, which never takes from test.
        preprocess: As `resolve_preprocess` or a package's manifest says.
        augment: Apply the recipe's augmentation; for training.

    Raises:
        DataError: Missing, empty, corrupt or inconsistent data.
    """
    data = data_section(recipe)
    samples, indices = choose_samples(recipe, name=name)
    chosen = indices.astype("<i8").tobytes()
    return Split(
        samples=samples,
        indices=indices,
        labels=samples.labels[indices],
        preprocess=preprocess,
        fingerprint=hashlib.sha256(samples.fingerprint.encode() + chosen).hexdigest(),
        augment=data.augment if augment and data.augment != AugmentConfig() else None,
    )


def open_samples(recipe: Recipe, *, split: str) -> Samples:
    """Everything that the recipe's source has of `train`, `val` or `test`.

    Raises:
        DataError: Missing, empty, corrupt or inconsistent data.
    """
    source: Any = data_section(recipe).source
    samples: Samples = SOURCES[source.kind].open(source, split=split)
    if len(samples.labels) == 0:
        raise DataError(f"data.source: the {split} split is empty")
    return samples


def data_fingerprint(recipe: Recipe) -> str:
    """SHA-256 over what training, selection and calibration look at; the test split is not opened for it."""
    digest = hashlib.sha256()
    for name in ("train", "val"):
        samples, indices = choose_samples(recipe, name=name)
        digest.update(samples.fingerprint.encode() + indices.astype("<i8").tobytes())
    return digest.hexdigest()


def train_batches(
    split: Split,
    *,
    seed: int,
    epoch: int,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    start_step: int = 0,
    num_workers: int = 0,
    prefetch: int = 2,
    pin: bool = False,
) -> Iterator[Batch]:
    """One epoch of shuffled, augmented batches by a loader of its own: see `open_loader`, which makes many.

    Args:
        split: What to train on.
        seed: Of order and augmentation.
        epoch: Of order and augmentation.
        batch_size: Samples of a step over all processes; the last, incomplete step is dropped.
        rank: This process; it gets its slice of every batch, so that a step is the same for any `world`.
        world: Number of processes.
        start_step: Steps of this epoch that are done already.
        num_workers: Processes that decode and assemble; 0 does it here. The batches are the same.
        prefetch: Batches that each of them prepares ahead.
        pin: Page-locked memory.

    Raises:
        DataError: Fewer samples than one step, or a file that cannot be read.
        ResourceError: A loader process died.
    """
    with open_loader(
        split,
        seed=seed,
        batch_size=batch_size,
        rank=rank,
        world=world,
        num_workers=num_workers,
        prefetch=prefetch,
        pin=pin,
    ) as loader:
        yield from loader.batches(epoch=epoch, start_step=start_step)


def array_batches(
    split: Split, *, batch_size: int, rank: int = 0, world: int = 1
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All samples in order: float32 [n, C, H, W] and int64 [n], the last batch smaller if need be.

    Args:
        rank: This process; of each batch only its `share_of` is read, and the other rows are zero.
        world: Number of processes.
    """
    starts = range(0, len(split), batch_size)
    steps = [np.arange(start, min(start + batch_size, len(split))) for start in starts]
    if world == 1:
        yield from _decoded_ahead(split, steps)
        return
    rows = [share_of(len(step), rank=rank, world=world) for step in steps]
    mine = [(step, share) for step, share in zip(steps, rows, strict=True) if share.start < share.stop]
    decoded = _decoded_ahead(split, [step[share] for step, share in mine])
    shape = split.preprocess.channels, *split.preprocess.size
    for step, share in zip(steps, rows, strict=True):
        x_nCHW = np.zeros((len(step), *shape), np.float32)
        if share.start < share.stop:
            x_nCHW[share] = next(decoded)[0]
        yield x_nCHW, split.labels[step]


def _decoded_ahead(split: Split, steps: Sequence[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """`Split.arrays` of each step."""
    if isinstance(split.samples, ArraySamples):
        yield from map(split.arrays, steps)
        return
    # Files: threads decode the next batches while the caller works on this one; of a stream only one can.
    streamed = split.arrays_in_order(steps) if isinstance(split.samples, Stream) else None
    num_threads = DECODERS if streamed is None else 1
    waiting: deque[Future[tuple[np.ndarray, np.ndarray]]] = deque()
    with ThreadPoolExecutor(num_threads) as pool:
        try:
            for step in steps:
                waiting.append(pool.submit(split.arrays, step) if streamed is None else pool.submit(next, streamed))
                if len(waiting) > num_threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for each in waiting:
                each.cancel()


def data_section(recipe: Recipe) -> DataConfig:
    """A recipe's `data`.

    Raises:
        RecipeError: It has none.
    """
    if recipe.data is None:
        raise RecipeError(
            "the recipe has no data section", hint="add `data: {source: {kind: bundled}}`, or your own images"
        )
    return recipe.data


def choose_samples(recipe: Recipe, *, name: str) -> tuple[Samples, np.ndarray]:
    """Samples of a split and the int64 indices of those that the recipe's limits leave."""
    data = data_section(recipe)
    split = data.calib.split if name == "calib" else name
    samples = open_samples(recipe, split=split)
    limit = {"train": data.train, "val": data.val, "test": data.test}[split].limit
    order = balanced_order(samples.labels)[:limit]
    if not isinstance(samples, Stream):
        return samples, order[: data.calib.limit] if name == "calib" else order
    if name == "calib":
        order = order[: data.calib.limit or MOST_OF_STREAM]
    return samples, np.sort(order)
