"""What happens to an image in training, drawn from (seed, epoch, index) and from nothing else.

Crops are cut from the decoded image before it is scaled; everything after works on pixels of the input size, in this
order: shift, flip, brightness, contrast, saturation, erase. Each draws its own numbers: switching one on leaves what
the others do as it was.

n: images of a batch. H, W: pixels. c: 1 or 3 channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from bmctl.core.chance import Luck, hash_integers, uniform
from bmctl.core.images import Picture
from bmctl.inputs.image.pixels import Box, resize, size_of
from bmctl.inputs.image.spec import AugmentConfig, CropConfig, Spec

_ATTEMPTS = 10
_AUGMENT = 2
_CROP, _BRIGHTNESS, _CONTRAST, _SATURATION, _ERASE = range(1, 6)


def encode(
    pictures: Sequence[Picture] | np.ndarray, spec: Spec, *, config: AugmentConfig | None, luck: Luck | None
) -> np.ndarray:
    """Pictures brought to size, and augmented where there is luck.

    Args:
        pictures: n images, or one array of them.
        spec: Size, channels, interpolation and crop.
        config: What may be done in training.
        luck: Of each image; None for evaluation.

    Returns:
        uint8 [n, H, W, c].
    """
    if config is None or luck is None:
        return resize(pictures, spec)
    boxes = None
    if config.crop is not None:
        sizes = np.array([size_of(picture) for picture in pictures])
        boxes = crop_boxes(sizes, luck.indices, config=config.crop, seed=luck.seed, epoch=luck.epoch)
    pixels = resize(pictures, spec, boxes=boxes)
    return augment(pixels, luck.indices, config=config, seed=luck.seed, epoch=luck.epoch, fill=spec.mean)


def augment(
    pixels: np.ndarray,
    indices: np.ndarray,
    *,
    config: AugmentConfig,
    seed: int,
    epoch: int,
    fill: Sequence[float] = (0.0,),
) -> np.ndarray:
    """Everything but the crop.

    Args:
        pixels: uint8 [n, H, W, c].
        indices: int64 [n], which samples these are.
        config: What may be done.
        seed: The recipe's.
        epoch: Counted from 0.
        fill: What erased rectangles get, in [0, 1]: the mean of the data, per channel.

    Returns:
        uint8 [n, H, W, c], edges that a shift uncovers black.
    """
    keys = (_AUGMENT, seed, epoch)
    luck = hash_integers(indices, keys=keys)
    if config.shift:
        pixels = _shifted(pixels, luck, most=config.shift)
    if config.flip:
        mirrored = (luck & np.uint64(1)).astype(bool)
        pixels = pixels.copy()
        pixels[mirrored] = pixels[mirrored, :, ::-1]
    if config.brightness or config.contrast or config.saturation:
        factors = np.stack(
            [
                _around_one(uniform(indices, keys=(*keys, kind)), most)
                for kind, most in (
                    (_BRIGHTNESS, config.brightness),
                    (_CONTRAST, config.contrast),
                    (_SATURATION, config.saturation),
                )
            ],
            axis=1,
        )
        pixels = np.stack([_jittered(*each) for each in zip(pixels, factors, strict=True)])
    if config.erase:
        pixels = _erased(pixels, indices, share=config.erase, keys=(*keys, _ERASE), fill=fill)
    return pixels


def crop_boxes(sizes: np.ndarray, indices: np.ndarray, *, config: CropConfig, seed: int, epoch: int) -> list[Box]:
    """The part of each image that is scaled to the input size.

    Ten random boxes of the asked area and ratio are tried; where none fits, it is the largest in the middle.

    Args:
        sizes: Integers [n, 2]: height and width of each image.
        indices: int64 [n], which samples these are.
        config: Share of the area, and width over height.
        seed: The recipe's.
        epoch: Counted from 0.

    Source: Szegedy et al. 2015, https://arxiv.org/abs/1409.4842; the procedure is torchvision's RandomResizedCrop.
    """
    keys = (_AUGMENT, seed, epoch, _CROP)
    luck = np.stack([uniform(indices, keys=(*keys, draw)) for draw in range(2 * _ATTEMPTS + 2)])
    return [_crop_box(int(height), int(width), luck[:, i].tolist(), config) for i, (height, width) in enumerate(sizes)]


def _crop_box(height: int, width: int, luck: list[float], config: CropConfig) -> Box:
    (least, most), (narrow, wide) = config.scale, config.ratio
    for attempt in range(_ATTEMPTS):
        area = height * width * (least + (most - least) * luck[2 * attempt])
        ratio = narrow * (wide / narrow) ** luck[2 * attempt + 1]
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(luck[-1] * (width - w + 1)), int(luck[-2] * (height - h + 1))
            return left, top, left + w, top + h
    ratio = min(max(width / height, narrow), wide)
    w, h = min(width, max(1, round(height * ratio))), min(height, max(1, round(width / ratio)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _shifted(pixels: np.ndarray, luck: np.ndarray, *, most: int) -> np.ndarray:
    count, height, width, _ = pixels.shape
    span = np.uint64(2 * most + 1)
    down, right = ((luck >> np.uint64(8)) % span).astype(int), ((luck >> np.uint64(32)) % span).astype(int)
    padded = np.pad(pixels, ((0, 0), (most, most), (most, most), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(1, 2))
    moved: np.ndarray = windows[np.arange(count), down, right].transpose(0, 2, 3, 1)
    return moved


def _around_one(luck: np.ndarray, most: float) -> np.ndarray:
    """Even in [max(0, 1 - most), 1 + most]."""
    least = max(0.0, 1.0 - most)
    return least + (1.0 + most - least) * luck


def _jittered(pixels: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """Brightness, contrast and saturation by the given factors, as Pillow's ImageEnhance; grey has no saturation."""
    brightness, contrast, saturation = factors.tolist()
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else np.ascontiguousarray(pixels))
    if brightness != 1.0:
        image = Image.blend(Image.new(image.mode, image.size), image, brightness)
    if contrast != 1.0:
        histogram = np.asarray(image.convert("L").histogram(), np.float64)
        mean = int(histogram @ np.arange(256) / histogram.sum() + 0.5)
        image = Image.blend(Image.new("L", image.size, mean).convert(image.mode), image, contrast)
    if saturation != 1.0 and image.mode == "RGB":
        image = Image.blend(image.convert("L").convert("RGB"), image, saturation)
    return np.asarray(image).reshape(pixels.shape)


def _erased(
    pixels: np.ndarray, indices: np.ndarray, *, share: float, keys: Sequence[int], fill: Sequence[float]
) -> np.ndarray:
    """A rectangle of 2 to 33 % of the area, 0.3 to 3.3 as high as wide, in `share` of the images.

    Source: Zhong et al. 2017, https://arxiv.org/abs/1708.04896
    """
    _, height, width, channels = pixels.shape
    happens, area, ratio, down, right = (uniform(indices, keys=(*keys, draw)) for draw in range(5))
    area = height * width * (0.02 + 0.31 * area)
    ratio = 0.3 * 11.0**ratio
    tall = np.clip(np.rint(np.sqrt(area * ratio)), 1, height).astype(int)
    wide = np.clip(np.rint(np.sqrt(area / ratio)), 1, width).astype(int)
    top, left = (down * (height - tall + 1)).astype(int), (right * (width - wide + 1)).astype(int)
    colour = np.rint(255 * (np.asarray(fill) if len(fill) == channels else np.full(channels, np.mean(fill))))
    pixels = pixels.copy()
    for i in np.flatnonzero(happens < share):
        pixels[i, top[i] : top[i] + tall[i], left[i] : left[i] + wide[i]] = np.clip(colour, 0, 255)
    return pixels
