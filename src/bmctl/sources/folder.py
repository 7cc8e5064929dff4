"""Image files in folders: ``root/CLASS/*.png``, or ``root/{train,val,test}/CLASS/*.png``.

The folders' names, sorted, are the classes. Where there is no folder for val or test, they are carved from the training
images by ratio, chosen by a hash of the file's name, so that a new file does not move the others.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from bmctl.errors import DataError
from bmctl.schema import Strict, resolve_env
from bmctl.sources.samples import FileSamples, ListedImage, file_samples

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
SPLITS = ("train", "val", "test")
INPUT = "image"


class Config(Strict):
    """Attributes:
    root: Relative to where bmctl is started.
    val: Share that validates, where there is no folder val.
    test: Share that tests, where there is no folder test.
    seed: Of that choice.
    """

    kind: Literal["folder"] = "folder"
    root: str
    val: Annotated[float, Field(gt=0, lt=0.5)] = 0.1
    test: Annotated[float, Field(gt=0, lt=0.5)] = 0.1
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0


def open(config: Config, *, split: str) -> FileSamples:
    """The samples of `train`, `val` or `test`.

    Raises:
        DataError: Missing or unreadable folders, an empty class, something that is no image, splits with other classes.
    """
    root = Path(resolve_env(config.root))
    if not root.is_dir():
        raise DataError(
            f"data.source.root: {config.root!r} is not a folder", hint="--set data.source.root=FOLDER with your images"
        )
    inside = {entry.name: entry for entry in _entries(root)}
    if "train" not in inside:
        return file_samples(_rows(root, base=root), split=split, config=config, base=root)
    strange = sorted(set(inside) - set(SPLITS))
    if strange:
        raise DataError(
            f"{root / strange[0]}: beside train there may only be val and test",
            hint="rename the folder, or move it away",
        )
    rows = [
        ListedImage(row.path, row.size_bytes, row.label, split=name)
        for name in SPLITS
        if name in inside
        for row in _rows(root / name, base=root)
    ]
    return file_samples(rows, split=split, config=config, base=root)


def _rows(folder: Path, *, base: Path) -> list[ListedImage]:
    """Every image below the class folders of `folder`."""
    rows = []
    classes = _entries(folder)
    for entry in classes:
        if not _is_folder(entry):
            raise DataError(
                f"{entry.path}: expected a folder of images, one per class", hint="sort the images into class folders"
            )
    if not classes:
        raise DataError(f"{folder}: no class folders in it", hint=f"put images into {folder}/CLASS/")
    for entry in classes:
        files = _entries(Path(entry.path))
        if not files:
            raise DataError(f"{entry.path}: no images of this class", hint="add some, or remove the folder")
        rows += [_row(file, label=entry.name) for file in files]
    return rows


def _row(entry: os.DirEntry[str], *, label: str) -> ListedImage:
    """Refuses what is no image by its name or kind; the contents are looked at when they are decoded."""
    try:
        if not entry.is_file():
            kind = "a folder inside a class folder" if entry.is_dir() else "not a regular file, or a broken link"
            raise DataError(f"{entry.path}: {kind}", hint="move it out of the data set")
        if not entry.name.lower().endswith(SUFFIXES):
            raise DataError(
                f"{entry.path}: expected an image ({' '.join(SUFFIXES)})", hint="move it out of the data set"
            )
        return ListedImage(Path(entry.path), entry.stat().st_size, label)
    except OSError as error:
        raise DataError(
            f"{entry.path}: cannot be read ({error.strerror})", hint="move it out of the data set"
        ) from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:  # a link that leads to itself
        raise DataError(f"{entry.path}: cannot be read ({error.strerror})", hint="remove the link") from error


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """Everything in a folder but hidden files, by name."""
    try:
        with os.scandir(folder) as found:
            return sorted((entry for entry in found if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror})", hint="check its permissions") from error
