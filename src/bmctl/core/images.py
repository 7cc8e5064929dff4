"""From image files to a model's input: the one path that training, evaluation and inference share.

H, W: pixels. C: channels. n: images of a batch.
"""

from __future__ import annotations

import os
import shlex
import stat
import struct
import warnings
import zlib
from collections.abc import Sequence
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from bmctl.errors import DataError
from bmctl.schema import Preprocess

Picture = np.ndarray | Image.Image
"""uint8 [H, W] or [H, W, c], or an image of mode L or RGB."""
Box = tuple[int, int, int, int]
"""left, top, right, bottom in pixels, as Pillow has them."""
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
MAX_PIXELS = 64 * 1024 * 1024
_PIECE = 1 << 17
_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
_BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    OverflowError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
"""What Pillow's decoders raise on bytes that are not what they say."""

# Beyond MAX_PIXELS anyway; as an error it cannot end up as a stray line on stderr.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)


def decode(path: Path) -> np.ndarray:
    """Decode one image file; see `read_file`.

    Returns:
        uint8 [H, W] for grey images, [H, W, 3] for colour.
    """
    return np.asarray(read_file(path))


def read_file(path: Path) -> Image.Image:
    """Decode one image file; see `read`.

    Args:
        path: A regular file.

    Raises:
        DataError: Missing, unreadable, not a regular file, or what `read` refuses.
    """
    with _open_regular(path) as stream:
        return read(stream, name=str(path))


def read(stream: BinaryIO, *, name: str) -> Image.Image:
    """Decode one image.

    The format is told from the contents, whatever the name. EXIF rotation is applied, CMYK becomes RGB, transparent
    pixels are laid over white, a palette becomes RGB.

    Args:
        stream: PNG, JPEG, WebP or BMP, 8 bits per channel, one frame, at most MAX_PIXELS.
        name: Where the image stands, for messages.

    Returns:
        Of mode L for grey images, RGB for colour.

    Raises:
        DataError: Of another format, truncated, corrupt, too large, 16-bit or animated.
    """
    try:
        head = stream.read(32)
        stream.seek(0)
        with Image.open(stream, formats=FORMATS) as image:
            _check_kind(image, head=head, name=name)
            ImageOps.exif_transpose(image, in_place=True)
            return _flatten(image)
    except UnidentifiedImageError as error:
        raise DataError(
            f"{name}: {_describe(head)}, expected a PNG, JPEG, WebP or BMP image",
            hint="convert the file, or move it out of the data set",
        ) from error
    except _BROKEN as error:
        raise DataError(
            f"{name}: the image is truncated or corrupt ({error})",
            hint="fetch the file again, or move it out of the data set",
        ) from error


def prepare(images: Sequence[Picture] | np.ndarray, spec: Preprocess) -> np.ndarray:
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
    spec: Preprocess,
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


def normalise(pixels: np.ndarray, spec: Preprocess, *, out: np.ndarray | None = None) -> np.ndarray:
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


def _resize_one(image: Picture, spec: Preprocess, *, box: Box | None) -> np.ndarray:
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


def _open_regular(path: Path) -> BufferedReader:
    """Open without ever waiting on a FIFO or reading a device."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise DataError(f"{path}: cannot be read ({reason})", hint="check the path and its permissions") from error
    kind = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(kind):
        os.close(descriptor)
        raise DataError(f"{path}: not a regular file", hint="move it out of the data set")
    return os.fdopen(descriptor, "rb")


def _check_kind(image: Image.Image, *, head: bytes, name: str) -> None:
    """Refuse, from the header alone, what would be decoded at a loss or at a great cost."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise DataError(
            f"{name}: {width} x {height} pixels, expected at most {MAX_PIXELS:,} in all",
            hint="scale the image down first",
        )
    # Pillow cuts 16-bit colour PNGs to 8 bits without a word: the depth stands in the header.
    if image.mode in ("I", "F") or image.mode.startswith("I;") or (image.format == "PNG" and head[24:25] == b"\x10"):
        raise DataError(
            f"{name}: more than 8 bits per channel, expected 8",
            hint=f"magick {shlex.quote(Path(name).name)} -depth 8 {shlex.quote(Path(name).stem + '-8bit.png')}",
        )
    # Phones write JPEGs with a second, smaller picture (MPO); the first is the photo.
    if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
        raise DataError(
            f"{name}: an animation of {getattr(image, 'n_frames', 0)} frames, expected a still image",
            hint="save the frame that is meant as an image of its own",
        )


def _flatten(image: Image.Image) -> Image.Image:
    """To mode L or RGB; transparent pixels over white."""
    grey = image.mode in ("1", "L", "LA", "La")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    mode = "L" if grey else "RGB"
    if image.mode != mode:
        return image.convert(mode)
    image.load()
    return image


def _describe(head: bytes) -> str:
    """What a file that is no image seems to be, from its first bytes."""
    signs = {
        b"": "the file is empty",
        b"GIF8": "a GIF",
        b"II*\0": "a TIFF",
        b"MM\0*": "a TIFF",
        b"version https://git-lfs": "a Git LFS pointer, not the image itself",
        b"<": "HTML or XML",
        b"%PDF": "a PDF",
    }
    if not head:
        return signs[b""]
    return next((name for sign, name in signs.items() if sign and head.startswith(sign)), "not an image that is known")
