"""Images in IDX files, as MNIST, Fashion-MNIST and their kin are published, gzipped or not.

`root` holds train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte, each
with or without .gz. Validation samples are carved from the training files.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from bmctl.errors import DataError
from bmctl.schema import Many, Strict, resolve_env
from bmctl.sources.samples import ArraySamples, array_samples

if TYPE_CHECKING:
    import numpy as np

MAX_BYTES = 4 * 1024**3
_PREFIX = {"train": "train", "val": "train", "test": "t10k"}
INPUT = "image"


class Config(Strict):
    """Attributes:
    root: The folder with the four files; relative to where bmctl is started.
    val: Share of the training files that validates, the same for each class.
    class_names: In the order of the labels; 0, 1, 2, ... without.
    """

    kind: Literal["idx"] = "idx"
    root: str
    val: Annotated[float, Field(gt=0, lt=1)] = 0.1
    class_names: Many[str] | None = None


def open(config: Config, *, split: str) -> ArraySamples:
    """The samples of `train`, `val` or `test`.

    Raises:
        DataError: A file is missing, cut short or not what its name says; labels without a class name.
    """
    import numpy as np

    from bmctl.core.chance import carve

    root, prefix = Path(resolve_env(config.root)), _PREFIX[split]
    if not root.is_dir():
        raise DataError(
            f"data.source.root: {config.root!r} is not a folder",
            hint="--set data.source.root=FOLDER with the IDX files",
        )
    images_file, labels_file = (_find(root, prefix=prefix, kind=kind) for kind in ("images-idx3", "labels-idx1"))
    images, labels = _read(images_file, num_dims=3), _read(labels_file, num_dims=1)
    if len(images) != len(labels):
        raise DataError(f"{images_file} holds {len(images)} images, but {labels_file} {len(labels)} labels")
    if len(labels) == 0:
        raise DataError(f"{labels_file}: no samples")
    # The training labels name the classes of every split.
    known = _read(_find(root, prefix="train", kind="labels-idx1"), num_dims=1)
    names = config.class_names or tuple(str(label) for label in range(int(known.max(initial=0)) + 1))
    if labels.max() >= len(names):
        raise DataError(
            f"{labels_file}: label {labels.max()}, expected 0 to {len(names) - 1}",
            hint="give data.source.class_names one name per class, or fetch the file again",
        )
    if prefix == "train":
        chosen = carve(np.arange(len(labels)), labels, ratios={"val": config.val}, seed=0, rest="train")[split]
        images, labels = images[chosen], labels[chosen]
    return array_samples(images, labels, class_names=names)


def _find(root: Path, *, prefix: str, kind: str) -> Path:
    stems = (f"{prefix}-{kind}-ubyte", f"{prefix}-{kind.replace('-', '.')}-ubyte")
    for name in (each + ending for each in stems for ending in ("", ".gz")):
        if (root / name).exists():
            return root / name
    raise DataError(
        f"{root / stems[0]}: there is no such file, with or without .gz",
        hint="put the four published IDX files there, or set data.source.root",
    )


def _read(path: Path, *, num_dims: int) -> np.ndarray:
    try:
        known = path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    return _parse(path, num_dims, known.st_size, known.st_mtime_ns)


@lru_cache(maxsize=8)
def _parse(path: Path, num_dims: int, size_bytes: int, mtime_ns: int) -> np.ndarray:
    """uint8 array of the file; size and time are here so that a changed file is read again."""
    import gzip
    import math
    import zlib

    import numpy as np

    if not path.is_file():
        raise DataError(f"{path}: not a regular file")
    opener = gzip.open if path.suffix == ".gz" else Path.open
    try:
        with opener(path, "rb") as file:
            header = file.read(4 + 4 * num_dims)
            if header[:4] != bytes((0, 0, 8, num_dims)) or len(header) < 4 + 4 * num_dims:
                raise DataError(
                    f"{path}: not an IDX file of bytes in {num_dims} dimensions (it starts with {header[:4].hex()!r})",
                    hint="fetch the file again",
                )
            shape = tuple(int(size) for size in np.frombuffer(header, ">u4", offset=4))
            expected = math.prod(shape)
            if expected > MAX_BYTES:
                raise DataError(f"{path}: the header promises {expected:,} bytes, expected at most {MAX_BYTES:,}")
            body = file.read(expected + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error})", hint="fetch the file again") from error
    if len(body) != expected:
        found = f"more than {expected:,}" if len(body) > expected else f"{len(body):,}"
        raise DataError(f"{path}: {found} bytes after the header, expected {expected:,}", hint="fetch the file again")
    return np.frombuffer(body, np.uint8).reshape(shape)
