"""An input: a text such as ``0.5 -1 3`` is one sample; float32 [n, F], normalised by the training data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bmctl.errors import DataError
from bmctl.schema import BATCH, Many, Positive, Span, Strict, TensorSpec

if TYPE_CHECKING:
    import numpy as np

    from bmctl.core.requests import Requests
    from bmctl.inputs import Examples, Records, Resolved

COLUMN = "text"
READS = (COLUMN,)
FIELD = "numbers"


class Config(Strict):
    kind: Literal["numbers"] = "numbers"
    normalise: bool = True


class Spec(Strict):
    kind: Literal["numbers"] = "numbers"
    mean: Many[float]
    std: Many[Positive]


def check(given: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    return iter(())


def resolve(asked: Config, examples: Examples, *, published: Mapping[str, Any]) -> tuple[Spec, dict[str, bytes]]:
    (texts,) = examples.read().values()
    rows = _parsed(texts)
    mean, std = rows.mean(axis=0), rows.std(axis=0) + 1e-6
    if not asked.normalise:
        mean, std = 0 * mean, 0 * std + 1
    return Spec(mean=tuple(mean.tolist()), std=tuple(std.tolist())), {}


def specs(spec: Spec) -> tuple[TensorSpec, ...]:
    return (TensorSpec(name=FIELD, dtype="float32", shape=(BATCH, len(spec.mean))),)


def fitted(asked: Config, inputs: Sequence[TensorSpec]) -> Config:
    return asked


def axes(spec: Spec) -> dict[str, Span]:
    return {}


def told(given: Resolved) -> dict[str, Any]:
    return {}


def prepare(samples: Any, *, given: Resolved, folder: Path | None) -> Any:
    return samples


def encode(records: Records, *, given: Resolved, asked: Any = None, luck: Any = None) -> dict[str, np.ndarray]:
    import numpy as np

    (texts,) = records.values()
    rows = (_parsed(texts, width=len(given.spec.mean)) - given.spec.mean) / given.spec.std
    return {FIELD: rows.astype(np.float32)}


def finish(fields: Mapping[str, Any], *, given: Resolved, channels_last: bool = False, empty: Any = None) -> Any:
    return {FIELD: fields[FIELD]}


def unprepared(arrays: Mapping[str, np.ndarray], *, given: Resolved, name: str) -> None:
    return None


def requests(source: str | Path, *, given: Resolved, batch_size: int, on_bad: str = "refuse", emit: Any) -> Requests:
    from bmctl.core.requests import Requested, Requests
    from bmctl.core.tables import read_lines

    path = Path(source)
    lines = list(read_lines(path))

    def batches() -> Iterator[Requested]:
        for start in range(0, len(lines), batch_size):
            some = lines[start : start + batch_size]
            fields = encode({COLUMN: [line for _, line in some]}, given=given)
            yield Requested([f"{path.name}:{number}" for number, _ in some], fields)

    return Requests(len(lines), batches())


def _parsed(texts: Sequence[str], *, width: int | None = None) -> np.ndarray:
    """float64 [n, F]."""
    import numpy as np

    rows = [[float(word) for word in text.split()] for text in texts]
    wanted = width or len(rows[0])
    if any(len(row) != wanted for row in rows):
        raise DataError(f"a sample has not {wanted} numbers", hint="give each as many")
    return np.array(rows, np.float64)
