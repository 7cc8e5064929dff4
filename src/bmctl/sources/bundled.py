"""The part of Fashion-MNIST that comes with bmctl: 28x28 grey, 10 classes, 12,000 train, 2,000 val, 5,000 test.

Source: Xiao, Rasul, Vollgraf 2017, https://arxiv.org/abs/1708.07747; how it was cut: bmctl/bundled/make.py.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Literal

from bmctl.schema import Strict
from bmctl.sources.samples import ArraySamples, array_samples

SIDE = 28
COLUMNS = 100
CLASS_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
PER_CLASS = {"train": 1200, "val": 200, "test": 500}
FOLDER = Path(__file__).parents[1] / "bundled"
SAMPLES = FOLDER / "samples"
"""One image file per class that is in none of the splits: what `infer` shows off with."""

INPUT = "image"


class Config(Strict):
    kind: Literal["bundled"] = "bundled"


def open(config: Config, *, split: str) -> ArraySamples:
    """The samples of `train`, `val` or `test`; neighbours are of different classes.

    Raises:
        DataError: The installed file is damaged.
    """
    return _load(split)


@lru_cache
def _load(split: str) -> ArraySamples:
    import numpy as np
    from PIL import Image

    from bmctl.errors import DataError

    path = FOLDER / f"{split}.png"
    shape = (PER_CLASS[split] * len(CLASS_NAMES) // COLUMNS, SIDE, COLUMNS, SIDE)
    try:
        with Image.open(path, formats=("PNG",)) as file:
            rows = np.asarray(file).reshape(shape)
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(
            f"{path}: the bundled data is damaged ({error})", hint="pip install --force-reinstall bmctl"
        ) from error
    by_class = rows.transpose(0, 2, 1, 3).reshape(len(CLASS_NAMES), -1, SIDE, SIDE)
    images = by_class.transpose(1, 0, 2, 3).reshape(-1, SIDE, SIDE)
    labels = np.arange(len(images)) % len(CLASS_NAMES)
    return array_samples(images, labels, class_names=CLASS_NAMES)
