"""How images become a model's input where the recipe leaves it open: as the publisher says, or as the data are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bmctl.errors import DataError, RecipeError
from bmctl.inputs.image.pixels import to_grey
from bmctl.inputs.image.spec import Config, Spec

if TYPE_CHECKING:
    from bmctl.inputs import Examples

PROBE = 1000
"""Files that are decoded for size, channels, mean and std where the recipe leaves them to the data."""
_CHUNK = 2048


def resolve(asked: Config, examples: Examples, *, published: Mapping[str, Any]) -> Spec:
    """What the recipe says, over what the model's publisher says, over what the training images say.

    Raises:
        DataError: The images differ in size and no size is given, or are all of one colour.
        RecipeError: Channels that the model does not take, or not one mean and std per channel.
    """
    takes = published.get("channels")
    if asked.channels is not None and takes not in (None, asked.channels):
        raise RecipeError(
            f"data.input.channels: {asked.channels}, but the model takes {takes}",
            hint=f"--set data.input.channels={takes}",
        )
    size = (asked.size, asked.size) if isinstance(asked.size, int) else asked.size or published.get("size")
    channels = asked.channels or takes
    mean, std = asked.mean or published.get("mean"), asked.std or published.get("std")
    if size is None or channels is None or mean is None or std is None:
        probe = _probe(examples)
        size = size or _common_size(probe)
        channels = channels or (3 if any(image.ndim == 3 for image in probe) else 1)
        measured_mean, measured_std = _moments(probe, channels=channels)
        mean, std = mean or measured_mean, std or measured_std
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != channels:
            raise RecipeError(f"data.input.{name}: {len(values)} values for {channels} channels")
    return Spec(
        size=size,
        channels=channels,
        mean=mean,
        std=std,
        interpolation=asked.interpolation or published.get("interpolation") or "bilinear",
        crop=asked.crop if asked.crop is not None else published.get("crop"),
    )


def _probe(examples: Examples) -> Sequence[np.ndarray] | np.ndarray:
    """Training images: all of them where they are in memory, PROBE of them else."""
    (pictures,) = examples.read(None if examples.in_memory else PROBE).values()
    return pictures if isinstance(pictures, np.ndarray) else [np.asarray(picture) for picture in pictures]


def _common_size(probe: Sequence[np.ndarray] | np.ndarray) -> tuple[int, int]:
    sizes = {probe.shape[1:3]} if isinstance(probe, np.ndarray) else {image.shape[:2] for image in probe}
    if len(sizes) > 1:
        some = ", ".join(f"{width}x{height}" for height, width in sorted(sizes)[:3])
        raise DataError(
            f"data.input.size is not given, and the images differ in size ({some}, ...)",
            hint="--set data.input.size=224",
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
        block = to_grey(block) if channels == 1 and block.shape[-1] == 3 else block
        for channel in range(channels):
            counts[channel] += np.bincount(block[..., channel % block.shape[-1]].ravel(), minlength=256)
    levels = np.arange(256) / 255
    shares = counts / counts.sum(axis=1, keepdims=True)
    mean = shares @ levels
    std = np.sqrt(shares @ levels**2 - mean**2)
    if std.min() < 1e-4:
        raise DataError("the training images are all of one colour", hint="look at the files in data.source")
    return tuple(round(float(each), 4) for each in mean), tuple(round(float(each), 4) for each in std)
