"""Small sets of image files."""

from __future__ import annotations

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
