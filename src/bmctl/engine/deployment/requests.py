"""What is to be predicted: an image, a folder, an .npz or a .csv, as batches that a runner takes.

n: samples of a batch. H, W: pixels. C: channels.
"""

from __future__ import annotations

import csv
import os
import zipfile
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

import bmctl
from bmctl.core.images import decode, prepare
from bmctl.errors import DataError
from bmctl.schema import Emit, Preprocess, TensorSpec

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
MAX_NPZ_BYTES = 4 * 2**30
MAX_NAMED = 50
SAMPLES = "bundled:samples"

OnBad = Literal["refuse", "skip"]
"""What happens when images of a folder or a list cannot be decoded."""


@dataclass(frozen=True)
class Batch:
    """Attributes:
    names: Of each sample, [n].
    feed: Array [n, ...] per input name.
    """

    names: Sequence[str]
    feed: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Requests:
    """Attributes:
    num_samples: How many there are.
    batches: To be read once.
    """

    num_samples: int
    batches: Iterator[Batch]


def open_requests(
    source: str | Path,
    *,
    inputs: Sequence[TensorSpec],
    preprocess: Preprocess | None,
    batch_size: int,
    on_bad: OnBad = "refuse",
    emit: Emit,
) -> Requests:
    """Find the samples; images are decoded as they are read.

    Args:
        source: An image; a folder, searched through for images in the order of their paths; an .npz with an array per
            input: preprocessed float32, or images uint8 [n, H, W] or [n, H, W, 3]; a .csv with a column `path`,
            relative to the file; or ``bundled:samples``.
        inputs: What the runner takes.
        preprocess: The training's, from the manifest; None takes prepared arrays only.
        batch_size: Samples per batch; the last one may be smaller.
        on_bad: `refuse` reads on after the first bad image, without giving batches, to name all of them; `skip` leaves
            them out and says so.

    Raises:
        DataError: Nothing there, or nothing that fits. While reading: bad images.
    """
    path = Path(source)
    if str(source) != SAMPLES and path.suffix.lower() == ".npz" and not path.is_dir():
        return _of_arrays(path, inputs=inputs, preprocess=preprocess, batch_size=batch_size, emit=emit)
    if str(source) == SAMPLES:
        folder = Path(bmctl.__file__).parent / "bundled" / "samples"
        images = [(f"{SAMPLES}/{file.name}", file) for file in sorted(folder.glob("*.png"))]
    elif path.is_dir():
        images = _find_images(path, emit=emit)
    elif path.suffix.lower() == ".csv":
        images = _read_list(path)
    elif path.exists():
        images = [(_name(path), path)]
    else:
        raise DataError(f"{path} does not exist", hint="name an image, a folder, an .npz, a .csv or bundled:samples")
    spec = _image_input(inputs, preprocess, source=str(source))
    assert preprocess is not None
    batches = _decode_all(images, preprocess, name=spec.name, batch_size=batch_size, on_bad=on_bad, emit=emit)
    return Requests(num_samples=len(images), batches=batches)


# -- images -----------------------------------------------------------------------------------------


def _image_input(inputs: Sequence[TensorSpec], preprocess: Preprocess | None, *, source: str) -> TensorSpec:
    if preprocess is None or len(inputs) != 1:
        wants = ", ".join(f"{spec.name!r} {spec.dtype} {['n', *spec.shape[1:]]}" for spec in inputs)
        raise DataError(
            f"{source} holds images, but this model has no record of how images are prepared for it",
            hint=f"give an .npz with prepared arrays: {wants}",
        )
    return inputs[0]


def _find_images(folder: Path, *, emit: Emit) -> list[tuple[str, Path]]:
    found: list[Path] = []
    num_others = 0

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror})") from error

    for root, _, files in os.walk(folder, onerror=refuse):  # links to folders are not followed: they may be loops
        images = [Path(root, file) for file in files if Path(file).suffix.lower() in SUFFIXES]
        num_others += len(files) - len(images)
        found += images
    if not found:
        raise DataError(f"{folder} has no images ({', '.join(sorted(SUFFIXES))})")
    if num_others:
        emit({"event": "note", "stage": "infer", "text": f"{folder}: {num_others} files are not images, not read"})
    return [(_name(path), path) for path in sorted(found)]


def _read_list(path: Path) -> list[tuple[str, Path]]:
    """The column `path`, as it stands there, with what it means."""
    images: list[tuple[str, Path]] = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            if "path" not in (reader.fieldnames or ()):
                raise DataError(f"{path} has the columns {reader.fieldnames or []}, expected one named 'path'")
            for row in reader:
                if not row["path"]:
                    raise DataError(f"{path}:{reader.line_num}: the path is missing")
                images.append((row["path"], path.parent / row["path"]))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is not a CSV file in UTF-8: {error}") from error
    if not images:
        raise DataError(f"{path} lists no images")
    return images


def _decode_all(
    images: Sequence[tuple[str, Path]], preprocess: Preprocess, *, name: str, batch_size: int, on_bad: OnBad, emit: Emit
) -> Iterator[Batch]:
    """Decode and prepare in threads, two batches ahead; Pillow lets go of the interpreter meanwhile."""
    bad: list[DataError] = []
    names: list[str] = []
    arrays: list[np.ndarray] = []
    with ThreadPoolExecutor(max_workers=min(8, len(os.sched_getaffinity(0)))) as pool:
        for label, future in _ahead(pool, images, preprocess, ahead=2 * batch_size):
            try:
                array = future.result()
            except DataError as error:
                bad.append(error)
                if on_bad == "skip":
                    emit({"event": "note", "stage": "infer", "text": f"skipped: {error.message}"})
                continue
            if bad and on_bad == "refuse":
                continue
            names.append(label)
            arrays.append(array)
            if len(names) == batch_size:
                yield Batch(names=names, feed={name: np.concatenate(arrays)})
                names, arrays = [], []
    if bad and (on_bad == "refuse" or len(bad) == len(images)):
        raise _all_bad(bad, num_images=len(images))
    if names:
        yield Batch(names=names, feed={name: np.concatenate(arrays)})


def _ahead(
    pool: ThreadPoolExecutor, images: Sequence[tuple[str, Path]], preprocess: Preprocess, *, ahead: int
) -> Iterator[tuple[str, Future[np.ndarray]]]:
    """Images in their order, with at most `ahead` of them held."""
    waiting: deque[tuple[str, Future[np.ndarray]]] = deque()
    for label, path in images:
        waiting.append((label, pool.submit(_read_image, path, preprocess)))
        if len(waiting) > ahead:
            yield waiting.popleft()
    yield from waiting


def _read_image(path: Path, preprocess: Preprocess) -> np.ndarray:
    return prepare([decode(path)], preprocess)


def _all_bad(bad: Sequence[DataError], *, num_images: int) -> DataError:
    if num_images == 1:
        return bad[0]
    named = "".join(f"\n  {error.message}" for error in bad[:MAX_NAMED])
    more = f"\n  and {len(bad) - MAX_NAMED} more" if len(bad) > MAX_NAMED else ""
    return DataError(
        f"{len(bad)} of {num_images} images cannot be read:{named}{more}",
        hint="mend these files or move them away",
    )


def _name(path: Path) -> str:
    """The path as text that any encoding takes: bytes that are no UTF-8 come out as \\xNN."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


# -- arrays -----------------------------------------------------------------------------------------


def _of_arrays(
    path: Path, *, inputs: Sequence[TensorSpec], preprocess: Preprocess | None, batch_size: int, emit: Emit
) -> Requests:
    names = [spec.name for spec in inputs]
    arrays, others = _load_arrays(path, names)
    if others:
        emit({"event": "note", "stage": "infer", "text": f"{path}: {', '.join(others)} not read"})
    sizes = {name: array.shape[0] if array.ndim else 0 for name, array in arrays.items()}
    if len(set(sizes.values())) != 1 or 0 in sizes.values():
        raise DataError(f"{path}: the arrays hold {sizes} samples, expected the same number, at least 1")
    num_samples = next(iter(sizes.values()))
    pixels = arrays[names[0]]
    images = pixels.dtype == np.uint8 and inputs[0].dtype != "uint8"
    if images:
        _image_input(inputs, preprocess, source=str(path))
        if not (pixels.ndim == 3 or (pixels.ndim == 4 and pixels.shape[-1] == 3)) or 0 in pixels.shape:
            raise DataError(
                f"{path}: {names[0]!r} is uint8 {list(pixels.shape)}, expected images [n, H, W] or [n, H, W, 3]"
            )

    def batches() -> Iterator[Batch]:
        for start in range(0, num_samples, batch_size):
            stop = min(start + batch_size, num_samples)
            feed = {name: array[start:stop] for name, array in arrays.items()}
            if images:
                assert preprocess is not None
                feed = {names[0]: prepare(pixels[start:stop], preprocess)}
            yield Batch(names=[f"{_name(path)}#{i}" for i in range(start, stop)], feed=feed)

    return Requests(num_samples=num_samples, batches=batches())


def _load_arrays(path: Path, names: Sequence[str]) -> tuple[dict[str, np.ndarray], list[str]]:
    """The arrays called `names`, and what else the file holds; never unpickles."""
    try:
        with zipfile.ZipFile(path) as archive:
            size_bytes = sum(entry.file_size for entry in archive.infolist())
        if size_bytes > MAX_NPZ_BYTES:
            raise DataError(f"{path} unpacks to {size_bytes:,} bytes, expected at most {MAX_NPZ_BYTES:,}")
        with np.load(path, allow_pickle=False) as arrays:
            missing = sorted(set(names) - set(arrays.files))
            if missing:
                raise DataError(
                    f"{path} has the arrays {sorted(arrays.files)}, expected {sorted(names)}",
                    hint=f"numpy.savez('inputs.npz', **{{{names[0]!r}: array}})",
                )
            return {name: arrays[name] for name in names}, sorted(set(arrays.files) - set(names))
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, NotImplementedError) as error:
        raise DataError(f"{path} is not an .npz file of plain arrays: {error}") from error
