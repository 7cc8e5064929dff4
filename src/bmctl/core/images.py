"""Decoded pictures: from files to pixels, refusing what cannot be decoded faithfully or at a bearable cost.

H, W: pixels.
"""

from __future__ import annotations

import os
import shlex
import stat
import struct
import warnings
import zlib
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from bmctl.errors import DataError

Picture = np.ndarray | Image.Image
"""uint8 [H, W] or [H, W, c], or an image of mode L or RGB."""
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
MAX_PIXELS = 64 * 1024 * 1024
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
