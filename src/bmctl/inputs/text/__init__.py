"""Texts: cut into tokens by a tokenizer that the package keeps; int64 ids and their mask to the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bmctl.inputs.text.spec import COLUMN, IDS, MASK, TOKENIZER, Config, Spec, TokenizerConfig
from bmctl.schema import BATCH, Emit, Span, TensorSpec

if TYPE_CHECKING:
    import numpy as np
    import torch

    from bmctl.core.chance import Luck
    from bmctl.core.requests import OnBad, Requests
    from bmctl.inputs import Examples, Records, Resolved


READS = (COLUMN,)

__all__ = ["COLUMN", "IDS", "MASK", "TOKENIZER", "Config", "Spec", "TokenizerConfig"]


def check(given: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Nothing in it has to fit together."""
    return iter(())


def resolve(
    asked: Config, examples: Examples, *, published: Mapping[str, Any], writes: bool = False
) -> tuple[Spec, dict[str, bytes]]:
    """The model's tokenizer, or one that is trained on the training texts; it is kept as ``tokenizer.json``.

    Without `max_tokens`, 99 of 100 training texts stay whole, as far as the model takes so many tokens; all that it
    takes where there are no texts. A task that `writes` gets texts with a token before them and none after them, whole
    or not at all, and a tokenizer that loses nothing.

    Raises:
        RecipeError: More tokens than the model takes; a tokenizer to train for a model that has one, or none for one
            that needs its own; one that loses capitals or spaces, for a task that writes.
        PackageError: The model's tokenizer cannot be read.
    """
    from bmctl.inputs.text.tokens import resolve

    return resolve(asked, examples, published=published, writes=writes)


def decode(ids: Sequence[int], *, given: Resolved) -> str:
    """The text that tokens stand for, without those that are none of any text."""
    from bmctl.inputs.text.tokens import decode

    return decode(ids, given=given)


def specs(spec: Spec) -> tuple[TensorSpec, ...]:
    """Ids, and where they are not padding."""
    shape = (BATCH, "tokens")
    return (
        TensorSpec(name=IDS, dtype="int64", shape=shape, meaning=f"token ids below {spec.vocab_size}"),
        TensorSpec(name=MASK, dtype="int64", shape=shape, meaning="1 for tokens, 0 for padding"),
    )


def axes(spec: Spec) -> dict[str, Span]:
    """``tokens``: up to the longest text, most often half of it."""
    return {"tokens": Span(min=1, opt=max(1, spec.max_tokens // 2), max=spec.max_tokens)}


def told(given: Resolved) -> dict[str, int]:
    """``vocab_size``, ``max_tokens`` and ``pad_id``; where texts are written also ``begin_id`` and ``end_id``."""
    told: dict[str, int] = given.spec.model_dump(exclude={"kind"}, exclude_none=True)
    return told


def prepare(samples: Any, *, given: Resolved, folder: Path | None) -> Any:
    """The same samples with each text as its ids, int32 [t]: tokenizers are slow, and threads of theirs do not fork."""
    from bmctl.inputs.text.tokens import prepare

    return prepare(samples, given=given, folder=folder)


def encode(
    records: Records, *, given: Resolved, asked: Config | None = None, luck: Luck | None = None
) -> dict[str, np.ndarray]:
    """int32 ids and uint8 mask, both [n, t], as long as the longest text, up to a multiple of 8."""
    from bmctl.inputs.text.tokens import encode

    return encode(records, given=given)


def finish(
    fields: Mapping[str, torch.Tensor],
    *,
    given: Resolved,
    channels_last: bool = False,
    empty: Callable[[tuple[int, ...], torch.dtype], torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """int64 ids and mask, [n, t]."""
    return {name: fields[name].long() for name in (IDS, MASK)}


def unprepared(arrays: Mapping[str, np.ndarray], *, given: Resolved, name: str) -> dict[str, Any] | None:
    """The texts, where the only array holds strings; ids and mask are prepared."""
    if len(arrays) != 1:
        return None
    ((_, texts),) = arrays.items()
    return {COLUMN: texts.tolist()} if texts.dtype.kind == "U" and texts.ndim == 1 else None


def requests(source: str | Path, *, given: Resolved, batch_size: int, on_bad: OnBad = "refuse", emit: Emit) -> Requests:
    """A file with a text on each line; a .csv, .tsv or .jsonl with a column `text`; what is no file is a text itself.

    Raises:
        DataError: What looks like a file's name is none, or there are no texts. While reading: bad texts.
    """
    from bmctl.inputs.text.files import requests

    return requests(source, given=given, batch_size=batch_size, on_bad=on_bad, emit=emit)
