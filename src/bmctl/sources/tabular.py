"""Rows of a table with something to predict: CSV, TSV, JSONL or Parquet; one file, or one for each split.

A column is one of numbers where every training row has a number or nothing in it, else one of words. Without a file of
their own, val and test are carved from the training file by ratio, chosen by a hash of the row, so that a new row does
not move the others, and equal rows stay together.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from bmctl.core.columns import Class, Column, Real, Text
from bmctl.errors import DataError
from bmctl.schema import Many, Strict, resolve_env
from bmctl.sources.samples import ArraySamples, in_order, pick

if TYPE_CHECKING:
    import numpy as np

INPUT = "tabular"
MAX_CLASSES = 10_000
LABEL, VALUE = "label", "value"
"""Names of the columns that tasks take their targets from, whatever the table calls them."""


class Config(Strict):
    """Attributes:
    path: The table, relative to where bmctl is started.
    val_path: A table of its own that validates.
    test_path: A table of its own that tests.
    label: The column with the classes to tell apart.
    value: The column with the number to predict.
    features: The columns to predict from; None takes all others.
    drop: Columns to leave out, such as names and row numbers.
    categories: Columns of numbers that are names, such as codes.
    columns: Names of the columns, in order, where the first line does not say them.
    skip: Lines to pass over at the beginning of each file.
    val: Share that validates, without a file.
    test: Share that tests, without a file.
    seed: Of that choice.
    class_names: The classes there may be, in order; without, those that occur, sorted (whole numbers by value).
    """

    kind: Literal["tabular"] = "tabular"
    path: str
    val_path: str | None = None
    test_path: str | None = None
    label: str | None = None
    value: str | None = None
    features: Many[str] | None = None
    drop: Many[str] = ()
    categories: Many[str] = ()
    columns: Many[str] | None = None
    skip: Annotated[int, Field(ge=0, le=1000)] = 0
    val: Annotated[float, Field(gt=0, lt=0.5)] = 0.1
    test: Annotated[float, Field(gt=0, lt=0.5)] = 0.1
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    class_names: Many[str] | None = None

    @model_validator(mode="after")
    def one_target(self) -> Self:
        """Either classes are told apart, or a number is predicted."""
        if (self.label is None) == (self.value is None):
            raise ValueError("give either label: COLUMN, of classes, or value: COLUMN, of numbers")
        return self

    @property
    def target(self) -> str:
        return str(self.label if self.label is not None else self.value)


class _Row(NamedTuple):
    fields: dict[str, str]
    split: str
    where: str


def open(config: Config, *, split: str) -> ArraySamples:
    """The rows of `train`, `val` or `test`: the features by their own names, and `label` or `value`.

    Raises:
        DataError: A file is missing, damaged or not UTF-8; a column is missing; a target is, or is no number or no
            known class; no number where training has nothing but numbers.
    """
    import hashlib

    import numpy as np

    files = {"train": config.path, "val": config.val_path, "test": config.test_path}
    paths = {name: Path(resolve_env(path)) for name, path in files.items() if path is not None}
    rows = [row for name, path in paths.items() for row in _read(path, config, split=name)]
    features = _features(config, rows[0])
    targets, column = _classes(rows, config) if config.label is not None else _values(rows, config)
    names = column.names if isinstance(column, Class) else ("rows",)
    keys = [_key(hashlib.sha256(), row, features) for row in rows]
    splits = np.array([row.split for row in rows])
    chosen = pick(
        targets if isinstance(column, Class) else np.zeros(len(rows), np.int64),
        keys,
        splits,
        split=split,
        config=config,
        class_names=names,
        base=paths["train"],
        what="rows",
    )
    columns: dict[str, Column] = {}
    arrays: dict[str, np.ndarray] = {}
    for name in features:
        columns[name], whole = _typed(name, rows, config)
        arrays[name] = whole[chosen]
    target = LABEL if isinstance(column, Class) else VALUE
    columns[target], arrays[target] = column, targets[chosen]
    return _frozen(columns, arrays)


def _read(path: Path, config: Config, *, split: str) -> list[_Row]:
    from bmctl.core.tables import read_rows

    named = (*(config.features or ()), *config.drop, *config.categories, config.target)
    hint = "--set data.source.value=NAME or data.source.label=NAME; data.source.columns names them where no line does"
    found: list[_Row] = []
    for line, fields in read_rows(path, wanted=None, names=config.columns, skip=config.skip, hint=hint):
        if not found and (missing := [name for name in named if name not in fields]):
            raise DataError(
                f"{path}: no column {' and '.join(missing)}; its columns are {', '.join(fields)}", hint=hint
            )
        found.append(_Row(fields, split, f"{path}, line {line}"))
    if not found:
        raise DataError(f"{path}: no rows in it", hint="is data.source.skip too large?" if config.skip else "")
    return found


def _features(config: Config, row: _Row) -> tuple[str, ...]:
    """Names of the columns to predict from, in the order of the table."""
    left = (config.target, *config.drop)
    found = tuple(name for name in row.fields if name not in left and name in (config.features or row.fields))
    reserved = LABEL if config.label is not None else VALUE
    if reserved in found:
        raise DataError(
            f"{config.path}: the feature {reserved!r} has the name that what is predicted goes by",
            hint=f"rename it, or leave it out: --set 'data.source.drop=[{reserved}]'",
        )
    if not found:
        raise DataError(f"{config.path}: no column is left to predict from", hint="see data.source.features and drop")
    return found


def _key(digest: Any, row: _Row, features: tuple[str, ...]) -> int:
    """What a row is known by: its features, so that equal ones fall into one split."""
    for name in features:
        body = row.fields[name].encode()
        digest.update(b"%d\n%s" % (len(body), body))
    return int.from_bytes(digest.digest()[:8])


# -- columns ----------------------------------------------------------------------------------------


def _typed(name: str, rows: list[_Row], config: Config) -> tuple[Column, np.ndarray]:
    """A column's kind, which training rows decide, and its values: float32, nan where missing, or texts."""
    import numpy as np

    from bmctl.core.tables import as_number

    texts = [row.fields[name].strip() for row in rows]
    if name not in config.categories:
        numbers = [as_number(text) for text in texts]
        training = [number for number, row in zip(numbers, rows, strict=True) if row.split == "train"]
        if None not in training and any(number == number for number in training):
            for number, row, text in zip(numbers, rows, texts, strict=True):
                if number is None:
                    raise DataError(f"{row.where}: {name} is {text[:40]!r}; in training it is a number in every row")
            return Real(), np.array(numbers, np.float32)
    return Text(), np.array(texts, object)


def _values(rows: list[_Row], config: Config) -> tuple[np.ndarray, Real]:
    """float32 [N], and the column with mean and deviation of the training file."""
    import math

    import numpy as np

    from bmctl.core.tables import as_number

    values = []
    for row in rows:
        text = row.fields[config.target].strip()
        number = as_number(text)
        if number is None or math.isnan(number):
            said = f"is {text[:40]!r}, expected a number" if text else "is missing"
            raise DataError(
                f"{row.where}: {config.target}, which is to be predicted, {said}",
                hint="remove the row, or predict classes: data.source.label",
            )
        values.append(number)
    of_training = np.array([value for value, row in zip(values, rows, strict=True) if row.split == "train"])
    std = float(of_training.std())
    if std == 0:
        raise DataError(f"{config.path}: {config.target} is {values[0]} in every row: there is nothing to predict")
    return np.array(values, np.float32), Real(mean=float(of_training.mean()), std=std)


def _classes(rows: list[_Row], config: Config) -> tuple[np.ndarray, Class]:
    """int64 [N], and the column with the classes: those that occur in training, where the recipe does not say them."""
    import numpy as np

    texts = [row.fields[config.target].strip() for row in rows]
    of_training = {text for text, row in zip(texts, rows, strict=True) if row.split == "train"}
    names = tuple(config.class_names or in_order(of_training))
    if len(set(names)) < 2:
        raise DataError(f"{config.path}: all rows are of one class, {names[0]!r}; expected at least two")
    if len(names) > MAX_CLASSES:
        raise DataError(
            f"{config.path}: {config.target} has {len(names):,} different values, more than {MAX_CLASSES:,}",
            hint=f"to predict a number: --set data.source.label=null --set data.source.value={config.target}",
        )
    index = {name: position for position, name in enumerate(names)}
    for text, row in zip(texts, rows, strict=True):
        if text not in index:
            said = f"the class {text[:40]!r} is not one of " if text else "the class is missing; expected one of "
            among = "data.source.class_names" if config.class_names else "the classes of the training file"
            raise DataError(f"{row.where}: {said}{among}")
        if not text:
            raise DataError(f"{row.where}: {config.target} is missing", hint="remove the row, or label it")
    return np.array([index[text] for text in texts], np.int64), Class(names)


def _frozen(columns: dict[str, Column], arrays: dict[str, np.ndarray]) -> ArraySamples:
    import hashlib

    digest = hashlib.sha256(repr(columns).encode())
    for name, array in arrays.items():
        digest.update(name.encode() + b"\0")
        if array.dtype == object:
            for text in array:
                body = text.encode()
                digest.update(b"%d\n%s" % (len(body), body))
        else:
            digest.update(array.astype(array.dtype.newbyteorder("<")).tobytes())
        array.flags.writeable = False
    return ArraySamples(columns, arrays, digest.hexdigest())
