"""Pictures: brought to one size, augmented in training, normalised; float32 [n, C, H, W] to the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bmctl.inputs.image.spec import COLUMN, FIELD, Config, Spec
from bmctl.schema import BATCH, Emit, Span, TensorSpec

if TYPE_CHECKING:
    import numpy as np
    import torch

    from bmctl.core.chance import Luck
    from bmctl.core.requests import OnBad, Requests
    from bmctl.inputs import Examples, Records, Resolved

READS = (COLUMN,)

__all__ = ["COLUMN", "FIELD", "Config", "Spec"]


def check(given: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Sizes and numbers of channels that do not fit together: key, message and hint."""

    def of(key: str) -> list[Any]:
        return given[key] if isinstance(given.get(key), list) else []

    mean, std, channels = of("mean"), of("std"), given.get("channels")
    if mean and std and len(mean) != len(std):
        yield "std", f"{len(std)} values, mean has {len(mean)}", "give one per channel"
    for key, values in (("mean", mean), ("std", std)):
        if values and channels in (1, 3) and len(values) != channels:
            yield key, f"{len(values)} values for {channels} channel(s)", "give one per channel"
    if isinstance(given.get("size"), list) and len(of("size")) != 2:
        yield "size", f"must be one number or [height, width], got {len(of('size'))} numbers", "size: [224, 224]"


def resolve(asked: Config, examples: Examples, *, published: Mapping[str, Any]) -> tuple[Spec, dict[str, bytes]]:
    """What the recipe says, over what the model's publisher says, over what the training images say; and no files.

    Mean and std are taken from the training split alone, rounded to 4 digits.

    Raises:
        DataError: The images differ in size and no size is given, or are all of one colour.
        RecipeError: Channels that the model does not take, or not one mean and std per channel.
    """
    from bmctl.inputs.image.defaults import resolve

    return resolve(asked, examples, published=published), {}


def specs(spec: Spec) -> tuple[TensorSpec, ...]:
    """One field: the normalised image."""
    shape = (BATCH, spec.channels, *spec.size)
    return (TensorSpec(name=FIELD, dtype="float32", shape=shape, meaning="normalised image, channels first"),)


def fitted(asked: Config, inputs: Sequence[TensorSpec]) -> Config:
    """The recipe's Config, with the size and channels that a foreign graph's input fixes."""
    shape = inputs[0].shape if len(inputs) == 1 else ()
    if len(shape) != 4:
        return asked
    channels, size = shape[1], shape[2:]
    fixed: dict[str, Any] = {"channels": channels} if asked.channels is None and channels in (1, 3) else {}
    if asked.size is None and all(isinstance(each, int) for each in size):
        fixed["size"] = size
    return asked.model_copy(update=fixed)


def axes(spec: Spec) -> dict[str, Span]:
    """None: every image is of one size."""
    return {}


def told(given: Resolved) -> dict[str, Any]:
    """Nothing: models read channels and size from `specs`."""
    return {}


def prepare(samples: Any, *, given: Resolved, folder: Path | None) -> Any:
    """The samples as they are: decoded and scaled images would take too much room."""
    return samples


def encode(
    records: Records, *, given: Resolved, asked: Config | None = None, luck: Luck | None = None
) -> dict[str, np.ndarray]:
    """uint8 [n, H, W, c], where c is 1 for grey images even if the model takes 3 channels; augmented where asked."""
    from bmctl.inputs.image.augment import encode

    (pictures,) = records.values()
    return {FIELD: encode(pictures, given.spec, config=asked.augment if asked else None, luck=luck)}


def finish(
    fields: Mapping[str, torch.Tensor],
    *,
    given: Resolved,
    channels_last: bool = False,
    empty: Callable[[tuple[int, ...], torch.dtype], torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """float32 [n, C, H, W]: (pixel / 255 - mean) / std; in one pass on the host, a quarter of the bytes to a device."""
    from bmctl.inputs.image.device import finish

    return {FIELD: finish(fields[FIELD], given.spec, channels_last=channels_last, empty=empty)}


def unprepared(arrays: Mapping[str, np.ndarray], *, given: Resolved, name: str) -> dict[str, Sequence[Any]] | None:
    """The pictures, where the only array is uint8; one of the model's own dtype is prepared.

    Raises:
        DataError: uint8, but no pictures.
    """
    from bmctl.errors import DataError

    if len(arrays) != 1:
        return None
    ((field, pixels),) = arrays.items()
    if pixels.dtype.name != "uint8":
        return None
    if not (pixels.ndim == 3 or (pixels.ndim == 4 and pixels.shape[-1] == 3)) or 0 in pixels.shape:
        raise DataError(f"{name}: {field!r} is uint8 {list(pixels.shape)}, expected images [n, H, W] or [n, H, W, 3]")
    return {COLUMN: pixels}  # type: ignore[dict-item]


def requests(source: str | Path, *, given: Resolved, batch_size: int, on_bad: OnBad = "refuse", emit: Emit) -> Requests:
    """An image; a folder, searched through; a .csv with a column `path`; or ``bundled:samples``.

    Raises:
        DataError: Nothing there, or no images. While reading: bad images.
    """
    from bmctl.inputs.image.files import requests

    return requests(source, given.spec, batch_size=batch_size, on_bad=on_bad, emit=emit)
