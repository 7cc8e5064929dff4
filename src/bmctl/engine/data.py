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
from typing import Any

import numpy as np

from bmctl.engine import images
from bmctl.engine.chance import hash_integers
from bmctl.engine.loader import Batch, open_loader
from bmctl.engine.order import Plan, balanced_order, sample_order
from bmctl.errors import DataError, RecipeError
from bmctl.models import InputDefaults, input_defaults
from bmctl.schema import Preprocess
from bmctl.sections import AugmentConfig, DataConfig, Recipe
from bmctl.sources import SOURCES, Samples
from bmctl.sources.samples import ArraySamples

PROBE = 1000
"""Files that are decoded for size, channels, mean and std where the recipe leaves them to the data."""
DECODERS = min(4, os.cpu_count() or 1)
_CHUNK = 2048


@dataclass(frozen=True)
class Split:
    """The chosen samples of one split, as the model sees them.

    Attributes:
        indices: int64 [N], into `samples`, in a class-balanced order.
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

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def in_memory(self) -> bool:
        return isinstance(self.samples, ArraySamples)

    def arrays(self, positions: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Unaugmented: float32 [n, C, H, W] and int64 [n]."""
        pixels = images.resize(self.samples.read(self.indices[positions]), self.preprocess)
        return images.normalise(pixels, self.preprocess), self.labels[positions]

    def order(self, *, seed: int, epoch: int) -> np.ndarray:
        """int64 [N]: the positions of one epoch of training."""
        return sample_order(len(self), seed=seed, epoch=epoch)

    def pixel_batches(self, plan: Plan, *, first: int = 0, every: int = 1) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Augmented batches: uint8 [n, H, W, c] and int64 [n].

        Args:
            plan: Which part of which epoch.
            first: Counted from the plan's own first step.
            every: 1 gives all steps from there, 2 every second one.
        """
        for positions in plan.steps(self.order(seed=plan.seed, epoch=plan.epoch))[first::every]:
            chosen = self.indices[positions]
            pixels = images.resize(self.samples.read(chosen), self.preprocess)
            if self.augment is not None:
                pixels = augment(pixels, chosen, config=self.augment, seed=plan.seed, epoch=plan.epoch)
            yield pixels, self.labels[positions]


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
    data = _data(recipe)
    samples, indices = _choose(recipe, name=name)
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
    source: Any = _data(recipe).source
    samples: Samples = SOURCES[source.kind].open(source, split=split)
    if len(samples.labels) == 0:
        raise DataError(f"data.source: the {split} split is empty")
    return samples


def data_fingerprint(recipe: Recipe) -> str:
    """SHA-256 over what training, selection and calibration look at; the test split is not opened for it."""
    digest = hashlib.sha256()
    for name in ("train", "val"):
        samples, indices = _choose(recipe, name=name)
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


def array_batches(split: Split, *, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All samples in order: float32 [n, C, H, W] and int64 [n], the last batch smaller if need be."""
    steps = [np.arange(start, min(start + batch_size, len(split))) for start in range(0, len(split), batch_size)]
    if isinstance(split.samples, ArraySamples):
        yield from map(split.arrays, steps)
        return
    # Files: threads decode the next batches while the caller works on this one.
    waiting: deque[Future[tuple[np.ndarray, np.ndarray]]] = deque()
    with ThreadPoolExecutor(DECODERS) as pool:
        try:
            for step in steps:
                waiting.append(pool.submit(split.arrays, step))
                if len(waiting) > DECODERS:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for each in waiting:
                each.cancel()


def augment(pixels: np.ndarray, indices: np.ndarray, *, config: AugmentConfig, seed: int, epoch: int) -> np.ndarray:
    """Mirror and shift each image; what happens to it depends on (seed, epoch, index) and on nothing else.

    Args:
        pixels: uint8 [n, H, W, c].
        indices: int64 [n], which samples these are.
        config: What may be done.
        seed: The recipe's.
        epoch: Counted from 0.

    Returns:
        uint8 [n, H, W, c], uncovered edges black.
    """
    luck = hash_integers(indices, keys=(2, seed, epoch))
    count, height, width, _ = pixels.shape
    if config.shift:
        span = np.uint64(2 * config.shift + 1)
        down, right = ((luck >> np.uint64(8)) % span).astype(int), ((luck >> np.uint64(32)) % span).astype(int)
        edge = (config.shift, config.shift)
        padded = np.pad(pixels, ((0, 0), edge, edge, (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(1, 2))
        pixels = windows[np.arange(count), down, right].transpose(0, 2, 3, 1)
    if config.flip:
        mirrored = (luck & np.uint64(1)).astype(bool)[:, None, None, None]
        pixels = np.where(mirrored, pixels[:, :, ::-1], pixels)
    return pixels


def resolve_preprocess(recipe: Recipe) -> Preprocess:
    """What the recipe says, over what the model's publisher says, over what the training data says.

    Mean and std are taken from the training split alone, rounded to 4 digits.

    Raises:
        DataError: The images differ in size and no size is given, or are all of one colour.
        RecipeError: Channels that the model does not take, or not one mean and std per channel.
    """
    asked = _data(recipe).preprocess
    known = input_defaults(recipe.model) if recipe.model else InputDefaults()
    if asked.channels is not None and known.channels not in (None, asked.channels):
        raise RecipeError(
            f"data.preprocess.channels: {asked.channels}, but the model takes {known.channels}",
            hint=f"--set data.preprocess.channels={known.channels}",
        )
    size = (asked.size, asked.size) if isinstance(asked.size, int) else asked.size or known.size
    channels = asked.channels or known.channels
    mean, std = asked.mean or known.mean, asked.std or known.std
    if size is None or channels is None or mean is None or std is None:
        probe = _probe(recipe)
        size = size or _common_size(probe)
        channels = channels or (3 if any(image.ndim == 3 for image in probe) else 1)
        measured_mean, measured_std = _moments(probe, channels=channels)
        mean, std = mean or measured_mean, std or measured_std
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != channels:
            raise RecipeError(f"data.preprocess.{name}: {len(values)} values for {channels} channels")
    return Preprocess(
        size=size,
        channels=channels,
        mean=mean,
        std=std,
        interpolation=asked.interpolation or known.interpolation or "bilinear",
        crop=asked.crop if asked.crop is not None else known.crop,
    )


def _data(recipe: Recipe) -> DataConfig:
    if recipe.data is None:
        raise RecipeError(
            "the recipe has no data section", hint="add `data: {source: {kind: bundled}}`, or your own images"
        )
    return recipe.data


def _choose(recipe: Recipe, *, name: str) -> tuple[Samples, np.ndarray]:
    """Samples of a split and the int64 indices of those that the recipe's limits leave."""
    data = _data(recipe)
    split = data.calib.split if name == "calib" else name
    samples = open_samples(recipe, split=split)
    limit = {"train": data.train, "val": data.val, "test": data.test}[split].limit
    order = balanced_order(samples.labels)[:limit]
    return samples, order[: data.calib.limit] if name == "calib" else order


def _probe(recipe: Recipe) -> Sequence[np.ndarray] | np.ndarray:
    """Training images: all of them where they are in memory, the first PROBE of the balanced order else."""
    samples, indices = _choose(recipe, name="train")
    return samples.read(indices if isinstance(samples, ArraySamples) else indices[:PROBE])


def _common_size(probe: Sequence[np.ndarray] | np.ndarray) -> tuple[int, int]:
    sizes = {probe.shape[1:3]} if isinstance(probe, np.ndarray) else {image.shape[:2] for image in probe}
    if len(sizes) > 1:
        some = ", ".join(f"{width}x{height}" for height, width in sorted(sizes)[:3])
        raise DataError(
            f"data.preprocess.size is not given, and the images differ in size ({some}, ...)",
            hint="--set data.preprocess.size=224",
        )
    height, width = sizes.pop()
    return int(height), int(width)


def _moments(probe: Sequence[np.ndarray] | np.ndarray, *, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std per channel of pixels in [0, 1], from exact histograms."""
    counts = np.zeros((channels, 256), np.int64)
    blocks = (
        [probe[start : start + _CHUNK] for start in range(0, len(probe), _CHUNK)]
        if isinstance(probe, np.ndarray)
        else [image[None] for image in probe]
    )
    for block in blocks:
        block = block if block.ndim == 4 else block[..., None]
        block = images.to_grey(block) if channels == 1 and block.shape[-1] == 3 else block
        for channel in range(channels):
            counts[channel] += np.bincount(block[..., channel % block.shape[-1]].ravel(), minlength=256)
    levels = np.arange(256) / 255
    shares = counts / counts.sum(axis=1, keepdims=True)
    mean = shares @ levels
    std = np.sqrt(shares @ levels**2 - mean**2)
    if std.min() < 1e-4:
        raise DataError("the training images are all of one colour", hint="look at the files in data.source")
    return tuple(round(float(each), 4) for each in mean), tuple(round(float(each), 4) for each in std)
