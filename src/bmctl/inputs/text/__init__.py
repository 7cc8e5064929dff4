"""Texts: cut into tokens by a tokenizer that the package keeps; int64 ids and their mask to the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from bmctl.schema import BATCH, Count, Emit, Span, Strict, TensorSpec

if TYPE_CHECKING:
    import numpy as np
    import torch

    from bmctl.core.chance import Luck
    from bmctl.core.requests import OnBad, Requests
    from bmctl.inputs import Examples, Records, Resolved

COLUMN = "text"
IDS, MASK = "input_ids", "attention_mask"
TOKENIZER = "tokenizer.json"


class TokenizerConfig(Strict):
    """A tokenizer that is trained on the training texts.

    Attributes:
        kind: How words are cut up: `wordpiece` as BERT does, or `bpe` as GPT-2 does, on bytes.
        vocab_size: Number of tokens at most; fewer where the texts do not hold so many.
        lowercase: Capitals are read as small letters.
    """

    kind: Literal["wordpiece", "bpe"] = "wordpiece"
    vocab_size: Annotated[int, Field(ge=300, le=1_000_000)] = 8192
    lowercase: bool = True


class Config(Strict):
    """Each None is filled in from the model's publisher, else from the training data; see Spec.

    Attributes:
        tokenizer: None takes the model's own; a model that brings none gets one that is trained.
    """

    kind: Literal["text"] = "text"
    max_tokens: Annotated[int, Field(ge=4, le=65536)] | None = None
    tokenizer: TokenizerConfig | None = None


class Spec(Strict):
    """From a text to the model's input, exactly as in training.

    Attributes:
        max_tokens: Longer texts are cut off.
        vocab_size: Number of token ids.
        pad_id: The token that fills shorter texts up, where the mask is 0.
    """

    kind: Literal["text"] = "text"
    max_tokens: Count
    vocab_size: Count
    pad_id: Annotated[int, Field(ge=0)]


def check(given: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Nothing in it has to fit together."""
    return iter(())


def resolve(asked: Config, examples: Examples, *, published: Mapping[str, Any]) -> tuple[Spec, dict[str, bytes]]:
    """The model's tokenizer, or one that is trained on the training texts; it is kept as ``tokenizer.json``.

    Without `max_tokens`, 99 of 100 training texts stay whole, as far as the model takes so many tokens; all that it
    takes where there are no texts.

    Raises:
        RecipeError: More tokens than the model takes; a tokenizer to train for a model that has one, or none for one
            that needs its own.
        PackageError: The model's tokenizer cannot be read.
    """
    from bmctl.inputs.text.tokens import resolve

    return resolve(asked, examples, published=published)


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
    """``vocab_size``, ``max_tokens`` and ``pad_id``."""
    told: dict[str, int] = given.spec.model_dump(exclude={"kind"})
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
