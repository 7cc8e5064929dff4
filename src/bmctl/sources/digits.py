"""scikit-learn's handwritten digits: 1,797 grey images of 8x8 in 10 classes; about 70 % train, 10 % val, 20 % test.

Source: Alpaydin, Kaynak 1998, https://doi.org/10.24432/C50P49
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

from bmctl.schema import Strict
from bmctl.sources.samples import ArraySamples, array_samples

INPUT = "image"


class Config(Strict):
    kind: Literal["digits"] = "digits"


def open(config: Config, *, split: str) -> ArraySamples:
    """The samples of `train`, `val` or `test`.

    Raises:
        DependencyError: scikit-learn is not installed.
    """
    return _load()[split]


@lru_cache
def _load() -> dict[str, ArraySamples]:
    import numpy as np

    from bmctl.core.chance import carve
    from bmctl.errors import DependencyError

    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DependencyError(
            "the source `digits` needs scikit-learn, which is not installed", hint="pip install 'bmctl[sklearn]'"
        ) from error
    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)  # published as 0 to 16
    parts = carve(np.arange(len(pixels)), digits.target, ratios={"val": 0.1, "test": 0.2}, seed=0, rest="train")
    names = [str(name) for name in digits.target_names]
    return {
        name: array_samples(pixels[chosen], digits.target[chosen], class_names=names) for name, chosen in parts.items()
    }
