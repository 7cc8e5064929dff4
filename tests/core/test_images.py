"""Decoding images, held against Pillow's own, and what is refused."""

from __future__ import annotations

import contextlib
import io
import os
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bmctl.core import images
from bmctl.errors import DataError

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (40, 30, 3), np.uint8)
GREY = RNG.integers(0, 256, (28, 28), np.uint8)


def save(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)
    return path


# -- decode -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x.png", "x.bmp", "x.webp", "png-in-disguise.jpg"])
def test_lossless_formats_come_back(tmp_path: Path, name: str) -> None:
    format = {"x.png": "PNG", "x.bmp": "BMP", "x.webp": "WEBP"}.get(name, "PNG")
    path = save(tmp_path / name, Image.fromarray(COLOUR), format=format, lossless=True)
    assert np.array_equal(images.decode(path), COLOUR)


def test_grey_stays_grey_and_other_modes_become_rgb(tmp_path: Path) -> None:
    colour = Image.fromarray(COLOUR)
    assert np.array_equal(images.decode(save(tmp_path / "l.png", Image.fromarray(GREY))), GREY)
    assert set(np.unique(images.decode(save(tmp_path / "1.png", Image.fromarray(GREY).convert("1"))))) == {0, 255}
    palette = colour.quantize(16)
    assert np.array_equal(images.decode(save(tmp_path / "p.png", palette)), np.asarray(palette.convert("RGB")))
    cmyk = colour.convert("CMYK")
    found = images.decode(save(tmp_path / "cmyk.jpg", cmyk, quality=100))
    assert found.shape == COLOUR.shape
    with Image.open(tmp_path / "cmyk.jpg") as opened:
        assert np.array_equal(found, np.asarray(opened.convert("RGB")))


def test_transparent_pixels_are_laid_over_white(tmp_path: Path) -> None:
    pixels = np.dstack([COLOUR, np.full(COLOUR.shape[:2], 255, np.uint8)])
    pixels[0, 0, 3], pixels[0, 1] = 0, (0, 0, 0, 128)
    found = images.decode(save(tmp_path / "x.png", Image.fromarray(pixels)))
    assert found.shape == COLOUR.shape
    assert found[0, 0].tolist() == [255, 255, 255]
    assert abs(int(found[0, 1, 0]) - 127) <= 1
    assert np.array_equal(found[1:], COLOUR[1:])
    grey = np.dstack([GREY, np.zeros_like(GREY)])
    found = images.decode(save(tmp_path / "la.png", Image.fromarray(grey, mode="LA")))
    assert found.shape == (28, 28)
    assert found.min() == 255


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn by 90 degrees
    path = save(tmp_path / "x.png", Image.fromarray(COLOUR), exif=exif)
    assert np.array_equal(images.decode(path), np.rot90(COLOUR, k=-1))


def png(*, depth: int, colour: int, size: tuple[int, int] = (2, 2)) -> bytes:
    """A PNG of zeros, by hand: Pillow writes no 16-bit colour and no 100,000 x 100,000 pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    width, height = size
    row = bytes(1 + width * (depth // 8) * {0: 1, 2: 3}[colour])
    body = zlib.compress(row * height) if width < 1000 else b""
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def whole_png() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(COLOUR).save(stream, format="PNG")
    return stream.getvalue()


def animation(format: str) -> bytes:
    stream = io.BytesIO()
    frames = [Image.fromarray(frame) for frame in RNG.integers(0, 256, (3, 8, 8, 3), np.uint8)]
    frames[0].save(stream, format=format, save_all=True, append_images=frames[1:])
    return stream.getvalue()


def jpeg() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(COLOUR).save(stream, format="JPEG")
    return stream.getvalue()


REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "the file is empty, expected a PNG"),
    "text": (lambda: b"hello", "not an image"),
    "html": (lambda: b"<!doctype html><p>404", "HTML"),
    "lfs": (lambda: b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    "gif": (lambda: animation("GIF"), "a GIF, expected"),
    "tiff": (lambda: animation("TIFF"), "a TIFF, expected"),
    "apng": (lambda: animation("PNG"), "animation of 3 frames"),
    "animated webp": (lambda: animation("WEBP"), "animation of 3 frames"),
    "16-bit grey": (lambda: png(depth=16, colour=0), "more than 8 bits"),
    "16-bit colour": (lambda: png(depth=16, colour=2), "more than 8 bits"),
    "too many pixels": (lambda: png(depth=8, colour=0, size=(9000, 9000)), "9000 x 9000 pixels, expected at most"),
    "bomb": (lambda: png(depth=8, colour=0, size=(60_000, 60_000)), "truncated or corrupt|pixels"),
    "cut png": (lambda: whole_png()[:-900], "truncated or corrupt"),
    "cut jpeg": (lambda: jpeg()[:-200], "truncated or corrupt"),
    "head only": (lambda: whole_png()[:20], "truncated or corrupt|not an image"),
    "flipped": (lambda: whole_png()[:200] + bytes(8) + whole_png()[208:], "truncated or corrupt"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_decoded_faithfully_is_refused(tmp_path: Path, kind: str) -> None:
    make, said = REFUSED[kind]
    path = tmp_path / "some image.png"
    path.write_bytes(make())
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with pytest.raises(DataError, match=said) as caught:
            images.decode(path)
    assert str(path) in caught.value.message
    assert caught.value.hint


def test_damaged_bytes_never_raise_anything_else(tmp_path: Path) -> None:
    """200 random edits of each format: either an image or a DataError."""
    path = tmp_path / "x"
    for original in (whole_png(), jpeg(), animation("WEBP")):
        for _ in range(200):
            data = bytearray(original)
            for position in RNG.integers(0, len(data), 3):
                data[position] = RNG.integers(0, 256)
            path.write_bytes(data)
            with warnings.catch_warnings(), contextlib.suppress(DataError):
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                assert images.decode(path).dtype == np.uint8


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="not a regular file"):
        images.decode(tmp_path / "pipe")
    with pytest.raises(DataError, match="not a regular file"):
        images.decode(tmp_path)
    with pytest.raises(DataError, match=r"cannot be read \(No such file"):
        images.decode(tmp_path / "gone.png")
    with pytest.raises(DataError, match="cannot be read"):
        images.decode(tmp_path / "nul\0.png")
