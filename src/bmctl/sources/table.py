"""Texts with a label in a table: CSV, TSV or JSONL, gzipped or not; one file, or one for each split.

Without a file of their own, val and test are carved from the training file by ratio, chosen by a hash of the text, so
that a new row does not move the others.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

from pydantic import Field

from bmctl.core.columns import Class, Column, Text
from bmctl.errors import DataError
from bmctl.schema import Many, Strict, resolve_env
from bmctl.sources.samples import ArraySamples, in_order, pick

if TYPE_CHECKING:
    import numpy as np

INPUT = "text"
SPLITS = ("train", "val", "test")
MAX_CLASSES = 10_000


class Config(Strict):
    """Attributes:
    path: The table, relative to where bmctl is started.
    val_path: A table of its own that validates.
    test_path: A table of its own that tests.
    text: The column with the texts.
    label: The column with the labels.
    columns: Names of the columns, in order, where the first line does not say them.
    skip: Lines to pass over at the beginning of each file.
    val: Share that validates, without a file.
    test: Share that tests, without a file.
    seed: Of that choice.
    class_names: The labels there may be, in order; without, those that occur, sorted (whole numbers by value).
    """

    kind: Literal["table"] = "table"
    path: str
    val_path: str | None = None
    test_path: str | None = None
    text: str = "text"
    label: str = "label"
    columns: Many[str] | None = None
    skip: Annotated[int, Field(ge=0, le=1000)] = 0
    val: Annotated[float, Field(gt=0, lt=0.5)] = 0.1
    test: Annotated[float, Field(gt=0, lt=0.5)] = 0.1
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    class_names: Many[str] | None = None


class _Sample(NamedTuple):
    text: str
    label: str
    split: str
    where: str


def open(config: Config, *, split: str) -> ArraySamples:
    """The samples of `train`, `val` or `test`: columns `text` and `label`.

    Raises:
        DataError: A file is missing, damaged or not UTF-8; a column, a text or a label is missing; a label is unknown.
    """
    import hashlib

    import numpy as np

    files = {"train": config.path, "val": config.val_path, "test": config.test_path}
    paths = {name: Path(resolve_env(path)) for name, path in files.items() if path is not None}
    samples = [sample for name, path in paths.items() for sample in _read(path, config, split=name)]
    base = paths["train"]
    names = _class_names(samples, config, base=base)
    index = {name: position for position, name in enumerate(names)}
    labels = np.array([index[sample.label] for sample in samples], np.int64)
    splits = np.array([sample.split for sample in samples])
    keys = [int.from_bytes(hashlib.sha256(sample.text.encode()).digest()[:8]) for sample in samples]
    chosen = pick(labels, keys, splits, split=split, config=config, class_names=names, base=base, what="texts")
    texts = np.array([samples[i].text for i in chosen.tolist()], object)
    return _frozen(texts, labels[chosen], names)


def _read(path: Path, config: Config, *, split: str) -> list[_Sample]:
    from bmctl.core.tables import read_rows

    wanted = (config.text, config.label)
    hint = "--set data.source.text=NAME, data.source.label=NAME; data.source.columns names them where no line does"
    found = []
    for line, fields in read_rows(path, wanted=wanted, names=config.columns, skip=config.skip, hint=hint):
        where = f"{path}, line {line}"
        text, label = fields[config.text], fields[config.label].strip()
        if not text.strip():
            raise DataError(f"{where}: the text is empty", hint="remove the line")
        if not label:
            raise DataError(f"{where}: the label is missing", hint="remove the line, or label it")
        found.append(_Sample(text, label, split, where))
    if not found:
        raise DataError(f"{path}: no texts in it", hint="is data.source.skip too large?" if config.skip else "")
    return found


def _class_names(samples: list[_Sample], config: Config, *, base: Path) -> tuple[str, ...]:
    """The classes; those that occur in training, where the recipe does not say them."""
    known = config.class_names or in_order({sample.label for sample in samples if sample.split == "train"})
    if len(set(known)) < 2:
        raise DataError(f"{base}: all texts are of one class, {known[0]!r}; expected at least two")
    if len(known) > MAX_CLASSES:
        raise DataError(
            f"{base}: {len(known)} different labels, more than {MAX_CLASSES}", hint="is it the wrong column?"
        )
    classes = set(known)
    for sample in samples:
        if sample.label not in classes:
            among = "data.source.class_names" if config.class_names else "the labels of the training file"
            raise DataError(f"{sample.where}: label {sample.label[:40]!r} is not one of {among}")
    return tuple(known)


def _frozen(texts: np.ndarray, labels: np.ndarray, names: tuple[str, ...]) -> ArraySamples:
    import hashlib

    digest = hashlib.sha256(repr(names).encode())
    for text in texts:
        body = text.encode()
        digest.update(b"%d\n%s" % (len(body), body))
    digest.update(labels.astype("<i8").data)
    texts.flags.writeable = False
    labels.flags.writeable = False
    columns: dict[str, Column] = {"text": Text(), "label": Class(names)}
    return ArraySamples(columns, {"text": texts, "label": labels}, digest.hexdigest())
