"""Images to be predicted: a file, a folder, a list, decoded and prepared as they are needed."""

from __future__ import annotations

import csv
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

import bmctl
from bmctl.core.images import read_file
from bmctl.core.requests import OnBad, Requested, Requests, path_name
from bmctl.errors import DataError
from bmctl.inputs.image.pixels import prepare
from bmctl.inputs.image.spec import FIELD, Spec
from bmctl.schema import Emit

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
MAX_NAMED = 50
SAMPLES = "bundled:samples"


def requests(source: str | Path, spec: Spec, *, batch_size: int, on_bad: OnBad, emit: Emit) -> Requests:
    """Find the images; they are decoded as they are read.

    Args:
        source: An image; a folder, searched through for images in the order of their paths; a .csv with a column
            `path`, relative to the file; or ``bundled:samples``.
        spec: The training's.
        batch_size: Samples per batch; the last one may be smaller.
        on_bad: `refuse` reads on after the first bad image, without giving batches, to name all of them; `skip` leaves
            them out and says so.
        emit: Takes a note of what is not read.

    Raises:
        DataError: Nothing there, or no images. While reading: bad images.
    """
    path = Path(source)
    if str(source) == SAMPLES:
        folder = Path(bmctl.__file__).parent / "bundled" / "samples"
        images = [(f"{SAMPLES}/{file.name}", file) for file in sorted(folder.glob("*.png"))]
    elif path.is_dir():
        images = _find_images(path, emit=emit)
    elif not path.exists():
        raise DataError(f"{path} does not exist", hint="name an image, a folder, an .npz, a .csv or bundled:samples")
    elif path.suffix.lower() == ".csv":
        images = _read_list(path)
    else:
        images = [(path_name(path), path)]
    return Requests(len(images), _decode_all(images, spec, batch_size=batch_size, on_bad=on_bad, emit=emit))


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
    return [(path_name(path), path) for path in sorted(found)]


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
    images: Sequence[tuple[str, Path]], spec: Spec, *, batch_size: int, on_bad: OnBad, emit: Emit
) -> Iterator[Requested]:
    """Decode and prepare in threads, two batches ahead; Pillow lets go of the interpreter meanwhile."""
    bad: list[DataError] = []
    names: list[str] = []
    arrays: list[np.ndarray] = []
    with ThreadPoolExecutor(max_workers=min(8, len(os.sched_getaffinity(0)))) as pool:
        for label, future in _ahead(pool, images, spec, ahead=2 * batch_size):
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
                yield Requested(names=names, fields={FIELD: np.concatenate(arrays)})
                names, arrays = [], []
    if bad and (on_bad == "refuse" or len(bad) == len(images)):
        raise _all_bad(bad, num_images=len(images))
    if names:
        yield Requested(names=names, fields={FIELD: np.concatenate(arrays)})


def _ahead(
    pool: ThreadPoolExecutor, images: Sequence[tuple[str, Path]], spec: Spec, *, ahead: int
) -> Iterator[tuple[str, Future[np.ndarray]]]:
    """Images in their order, with at most `ahead` of them held."""
    waiting: deque[tuple[str, Future[np.ndarray]]] = deque()
    for label, path in images:
        waiting.append((label, pool.submit(_read_image, path, spec)))
        if len(waiting) > ahead:
            yield waiting.popleft()
    yield from waiting


def _read_image(path: Path, spec: Spec) -> np.ndarray:
    return prepare([read_file(path)], spec)


def _all_bad(bad: Sequence[DataError], *, num_images: int) -> DataError:
    if num_images == 1:
        return bad[0]
    named = "".join(f"\n  {error.message}" for error in bad[:MAX_NAMED])
    more = f"\n  and {len(bad) - MAX_NAMED} more" if len(bad) > MAX_NAMED else ""
    return DataError(
        f"{len(bad)} of {num_images} images cannot be read:{named}{more}",
        hint="mend these files or move them away",
    )
