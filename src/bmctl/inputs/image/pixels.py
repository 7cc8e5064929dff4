"""From decoded pictures to a model's input: the one path that training, evaluation and inference share.

H, W: pixels. C: channels that the model takes. c: 1 or 3 channels as they are in the data. n: images of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from bmctl.core.images import Picture
from bmctl.inputs.image.spec import Spec

Box = tuple[int, int, int, int]
"""left, top, right, bottom in pixels, as Pillow has them."""
_PIECE = 1 << 17
_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}


def prepare(images: Sequence[Picture] | np.ndarray, spec: Spec) -> np.ndarray:
    """Bring decoded images into the form that the model takes.

    Args:
        images: n images, each one of Pillow's or uint8 [H, W] or [H, W, 3], of any size; or an array of one size,
            [n, H, W] or [n, H, W, 3].
        spec: Size, channels, normalisation, interpolation and crop.

    Returns:
        float32 [n, C, H, W]: (pixel / 255 - mean) / std.
    """
    return normalise(resize(images, spec), spec)


def resize(
    images: Sequence[Picture] | np.ndarray,
    spec: Spec,
    *,
    boxes: Sequence[tuple[int, int, int, int]] | None = None,
) -> np.ndarray:
    """The geometry alone: channels, resize and centre crop, in pixels.

    Args:
        images: As for `prepare`.
        spec: Size, channels, interpolation and crop.
        boxes: The part of each image that is scaled to `spec.size`, instead of the centre crop.

    Returns:
        uint8 [n, H, W, c], where c is 1 for grey images even if the model takes 3 channels: `normalise` repeats them.
    """
    if isinstance(images, np.ndarray):
        block = images if images.ndim == 4 else images[..., None]
        block = to_grey(block) if spec.channels == 1 and block.shape[-1] == 3 else block
        if block.shape[1:3] == tuple(spec.size) and spec.crop in (None, 1.0) and boxes is None:
            return block
        images = block
    if len(images) == 0:
        return np.empty((0, *spec.size, spec.channels), np.uint8)
    resized = [_resize_one(image, spec, box=boxes[i] if boxes else None) for i, image in enumerate(images)]
    if len({image.shape for image in resized}) > 1:  # grey among colour
        resized = [np.broadcast_to(image, (*image.shape[:2], 3)) for image in resized]
    return np.stack(resized)


def size_of(image: Picture) -> tuple[int, int]:
    """Height and width in pixels."""
    return image.size[::-1] if isinstance(image, Image.Image) else (image.shape[0], image.shape[1])


def normalise(pixels: np.ndarray, spec: Spec, *, out: np.ndarray | None = None) -> np.ndarray:
    """uint8 [n, H, W, c] to float32 [n, C, H, W], with the operations of torchvision's ToTensor and Normalize.

    Args:
        pixels: c is 1 or `spec.channels`.
        spec: Mean and std.
        out: float32 [n, C, H, W] of any strides; made here if None.
    """
    count, height, width, _ = pixels.shape
    if out is None:
        out = np.empty((count, spec.channels, height, width), np.float32)
    mean, std = np.asarray(spec.mean, np.float32), np.asarray(spec.std, np.float32)
    by_rows = spec.channels > 1 and out.transpose(0, 2, 3, 1).flags.c_contiguous
    # Loops over channels last would be of length 3: whole rows against mean and std repeated are as good as contiguous.
    shift, scale = (np.tile(each, width) if by_rows else each[:, None, None] for each in (mean, std))
    # In pieces that stay in the cache over the three operations.
    step = max(1, _PIECE // max(1, spec.channels * height * width))
    for start in range(0, count, step):
        piece, source = out[start : start + step], pixels[start : start + step]
        if by_rows:
            piece = piece.transpose(0, 2, 3, 1).reshape(-1, width * spec.channels)
            source = np.broadcast_to(source, (*source.shape[:3], spec.channels)).reshape(piece.shape)
        else:
            source = source.transpose(0, 3, 1, 2)
        np.divide(source, np.float32(255), out=piece, dtype=np.float32)
        np.subtract(piece, shift, out=piece)
        np.divide(piece, scale, out=piece)
    return out


def to_grey(pixels: np.ndarray) -> np.ndarray:
    """uint8 [..., 3] to [..., 1], rounded as Pillow's ``convert("L")`` does it (ITU-R 601-2)."""
    weighted = pixels.astype(np.uint32) @ np.array([19595, 38470, 7471], np.uint32)
    return ((weighted + 0x8000) >> 16).astype(np.uint8)[..., None]


def _resize_one(image: Picture, spec: Spec, *, box: Box | None) -> np.ndarray:
    """To uint8 [size, c]."""
    if not isinstance(image, Image.Image):
        image = Image.fromarray(image[..., 0] if image.ndim == 3 and image.shape[-1] == 1 else image)
    if spec.channels == 1 and image.mode == "RGB":
        image = image.convert("L")
    height, width = spec.size
    if box is not None:
        # Cut before scaling, as torchvision does: `resize(box=...)` would look at pixels outside.
        image = image if box == (0, 0, *image.size) else image.crop(box)
        image = image if image.size == (width, height) else image.resize((width, height), _FILTERS[spec.interpolation])
        return _array(image)
    tall, wide = height, width
    if spec.crop is not None:
        # torchvision's Resize(int) and CenterCrop for square sizes: the shorter side is matched, the longer truncated.
        tall, wide = round(height / spec.crop), round(width / spec.crop)
        if tall * image.width > wide * image.height:
            wide = max(wide, int(tall * image.width / image.height))
        else:
            tall = max(tall, int(wide * image.height / image.width))
    if image.size != (wide, tall):
        image = image.resize((wide, tall), _FILTERS[spec.interpolation])
    top, left = round((tall - height) / 2), round((wide - width) / 2)
    return _array(image)[top : top + height, left : left + width]


def _array(image: Image.Image) -> np.ndarray:
    """uint8 [H, W, c]."""
    pixels = np.asarray(image)
    return pixels if pixels.ndim == 3 else pixels[..., None]
