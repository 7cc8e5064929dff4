"""What is to be predicted: an .npz of arrays, or what the model's input can read, as batches that a runner takes.

n: samples of a batch.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bmctl.core.requests import OnBad, Requested, Requests, path_name
from bmctl.core.runner import shown
from bmctl.errors import DataError
from bmctl.inputs import INPUTS, Resolved
from bmctl.schema import Emit, TensorSpec

MAX_NPZ_BYTES = 4 * 2**30


def open_requests(
    source: str | Path,
    *,
    inputs: Sequence[TensorSpec],
    given: Resolved | None,
    batch_size: int,
    on_bad: OnBad = "refuse",
    emit: Emit,
) -> Requests:
    """Find the samples; files are read as they are needed.

    Args:
        source: What the model's input reads, such as an image or a folder of them; or an .npz with an array per input:
            prepared, or such as the input encodes.
        inputs: What the runner takes.
        given: The training's, from the manifest; None takes prepared arrays only.
        batch_size: Samples per batch; the last one may be smaller.
        on_bad: `refuse` reads on after the first bad file, without giving batches, to name all of them; `skip` leaves
            them out and says so.
        emit: Takes a note of what is not read.

    Raises:
        DataError: Nothing there, or nothing that fits. While reading: bad files.
    """
    path = Path(source)
    if path.suffix.lower() == ".npz" and not path.is_dir():
        return _of_arrays(path, inputs=inputs, given=given, batch_size=batch_size, emit=emit)
    known = _input_of(inputs, given, source=str(source))
    found: Requests = INPUTS[known.spec.kind].requests(
        source, given=known, batch_size=batch_size, on_bad=on_bad, emit=emit
    )
    batches = (Requested(each.names, _named(each.fields, inputs)) for each in found.batches)
    return Requests(found.num_samples, batches)


def _input_of(inputs: Sequence[TensorSpec], given: Resolved | None, *, source: str) -> Resolved:
    if given is None or len(INPUTS[given.spec.kind].specs(given.spec)) != len(inputs):
        wants = ", ".join(f"{spec.name!r} {spec.dtype} {shown(spec)}" for spec in inputs)
        raise DataError(
            f"{source} holds no prepared arrays, and this model has no record of how they are made for it",
            hint=f"give an .npz with prepared arrays: {wants}",
        )
    return given


def _named(fields: Mapping[str, np.ndarray], inputs: Sequence[TensorSpec]) -> dict[str, np.ndarray]:
    """The fields under the names that the graph has for them, in the order in which the model takes them; then others.

    Others are the task's, such as the seeds of episodes.
    """
    taken = {spec.name: array for spec, array in zip(inputs, fields.values(), strict=False)}
    return taken | dict(list(fields.items())[len(inputs) :])


# -- arrays -----------------------------------------------------------------------------------------


def _of_arrays(
    path: Path, *, inputs: Sequence[TensorSpec], given: Resolved | None, batch_size: int, emit: Emit
) -> Requests:
    arrays, others = _load_arrays(path, [spec.name for spec in inputs])
    if others:
        emit({"event": "note", "stage": "infer", "text": f"{path}: {', '.join(others)} not read"})
    sizes = {name: array.shape[0] if array.ndim else 0 for name, array in arrays.items()}
    if len(set(sizes.values())) != 1 or 0 in sizes.values():
        raise DataError(f"{path}: the arrays hold {sizes} samples, expected the same number, at least 1")
    num_samples = next(iter(sizes.values()))
    records = None
    if any(arrays[spec.name].dtype.name != spec.dtype for spec in inputs):
        records = _records(path, arrays, inputs=inputs, given=given)

    def batches() -> Iterator[Requested]:
        for start in range(0, num_samples, batch_size):
            rows = slice(start, min(start + batch_size, num_samples))
            if records is None or given is None:
                fields = {name: array[rows] for name, array in arrays.items()}
            else:
                fields = _named(_encoded({name: values[rows] for name, values in records.items()}, given), inputs)
            yield Requested([f"{path_name(path)}#{i}" for i in range(rows.start, rows.stop)], fields)

    return Requests(num_samples, batches())


def _records(
    path: Path, arrays: Mapping[str, np.ndarray], *, inputs: Sequence[TensorSpec], given: Resolved | None
) -> Mapping[str, Sequence[Any]] | None:
    """What the model's input encodes, where the arrays are that and nothing prepared; None leaves it to the runner."""
    if given is None:
        if any(array.dtype == np.uint8 for array in arrays.values()):
            _input_of(inputs, given, source=str(path))
        return None
    found: Mapping[str, Sequence[Any]] | None = INPUTS[given.spec.kind].unprepared(arrays, given=given, name=str(path))
    return found


def _encoded(records: Mapping[str, Sequence[Any]], given: Resolved) -> dict[str, np.ndarray]:
    module = INPUTS[given.spec.kind]
    fields = {name: torch.from_numpy(array) for name, array in module.encode(records, given=given).items()}
    return {name: tensor.numpy() for name, tensor in module.finish(fields, given=given).items()}


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
