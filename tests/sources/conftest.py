"""Small sets of images: files, tar archives, lines."""

from __future__ import annotations

import base64
import gzip
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SaveImages = Callable[..., list[Path]]


@pytest.fixture
def save_images() -> SaveImages:
    """Writes `count` different grey PNGs of 6x6 into a folder."""
    rng = np.random.default_rng(0)

    def save(folder: Path, count: int) -> list[Path]:
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{index}.png" for index in range(count)]
        for path in paths:
            Image.fromarray(rng.integers(0, 256, (6, 6), np.uint8)).save(path)
        return paths

    return save


def png(seed: int, *, side: int = 6) -> bytes:
    """A grey PNG, another one for each seed."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]], *, format: int = tarfile.USTAR_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as archive:
        for name, body in members:
            info = tarfile.TarInfo(name)
            info.size = len(body)
            archive.addfile(info, io.BytesIO(body))
    return path


def write_shards(folder: Path, *, files: int, samples: int, classes: int = 3) -> Path:
    """``train-000000.tar`` and so on, every sample with a .cls."""
    for part in range(files):
        members = []
        for index in range(part * samples, (part + 1) * samples):
            members += [(f"{index:06}.png", png(index)), (f"{index:06}.cls", str(index % classes).encode())]
        write_tar(folder / f"train-{part:06}.tar", members)
    return folder


def write_lines(path: Path, *, count: int, classes: int = 3, first: int = 0) -> Path:
    """Gzipped JSON lines with base64 images."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"image": base64.b64encode(png(index)).decode(), "label": index % classes})
        for index in range(first, first + count)
    ]
    path.write_bytes(gzip.compress("\n".join([*lines, ""]).encode(), mtime=0))
    return path
