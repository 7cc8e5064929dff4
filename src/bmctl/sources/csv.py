"""A list of image files, CSV, TSV or JSONL: columns `path`, `label` and, if wanted, `split` (train, val or test).

Other columns are passed over. Paths are relative to the list. Without `split`, val and test are carved by ratio, chosen
by a hash of the path.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from bmctl.errors import DataError
from bmctl.schema import Many, Strict, resolve_env
from bmctl.sources.samples import FileSamples, ListedImage, file_samples

SPLITS = ("train", "val", "test")
INPUT = "image"


class Config(Strict):
    """Attributes:
    path: The list; relative to where bmctl is started.
    val: Share that validates, where there is no column split.
    test: Share that tests, where there is no column split.
    seed: Of that choice.
    class_names: The labels there may be, in order; without, those that occur, sorted (whole numbers by value).
    """

    kind: Literal["csv"] = "csv"
    path: str
    val: Annotated[float, Field(gt=0, lt=0.5)] = 0.1
    test: Annotated[float, Field(gt=0, lt=0.5)] = 0.1
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    class_names: Many[str] | None = None


def open(config: Config, *, split: str) -> FileSamples:
    """The samples of `train`, `val` or `test`.

    Raises:
        DataError: The list or one of its files is missing or unreadable; a column, label or split is missing or
            unknown; a path stands in it twice.
    """
    from bmctl.core.tables import read_rows

    path = Path(resolve_env(config.path))
    if not path.is_file():
        raise DataError(f"data.source.path: {str(path)!r} is not a file", hint="--set data.source.path=FILE.csv")
    lines = list(read_rows(path, wanted=("path", "label"), hint="let the first line be: path,label"))
    if not lines:
        raise DataError(f"{path}: no rows after the first line")
    rows: list[ListedImage] = []
    seen: dict[Path, int] = {}
    for number, fields in lines:
        where = f"{path}, line {number}"
        label, part = fields["label"].strip(), fields.get("split", "").strip()
        if not label:
            raise DataError(f"{where}: the label is missing")
        if config.class_names is not None and label not in config.class_names:
            raise DataError(f"{where}: label {label!r} is not one of data.source.class_names")
        if "split" in fields and part not in SPLITS:
            raise DataError(f"{where}: split {part!r}, expected train, val or test")
        image = Path(os.path.normpath(path.parent / fields["path"]))
        if image in seen:
            raise DataError(
                f"{where}: {fields['path']!r} stands in line {seen[image]} already",
                hint="keep one of the two: a repeated image would leak from one split into another",
            )
        seen[image] = number
        rows.append(ListedImage(image, _size(image, where=where), label, split=part or None))
    return file_samples(rows, split=split, config=config, base=path.parent, class_names=config.class_names)


def _size(image: Path, *, where: str) -> int:
    """Bytes of the image file."""
    try:
        known = image.stat()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise DataError(
            f"{where}: {str(image)!r} cannot be read ({reason})", hint="paths are relative to the CSV file"
        ) from error
    if not stat.S_ISREG(known.st_mode):
        raise DataError(f"{where}: {str(image)!r} is not a regular file")
    return known.st_size
