"""Texts to token ids, and back.

n: texts of a batch. N: texts of a split. t: tokens.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING, Any

import numpy as np
import tokenizers
from tokenizers import Tokenizer, processors

from bmctl.core.columns import Column
from bmctl.errors import DataError, PackageError, RecipeError, ResourceError
from bmctl.inputs.text.spec import COLUMN, IDS, MASK, TOKENIZER, Config, Spec, TokenizerConfig
from bmctl.inputs.text.trained import FIRST, LAST, PAD, PARALLEL, parallel, train

if TYPE_CHECKING:
    from bmctl.inputs import Examples, Records, Resolved
    from bmctl.sources import Samples
    from bmctl.sources.samples import Indices

MULTIPLE = 8
"""Lengths are multiples of it: fewer shapes, and what tensor cores and vectors like."""
MOST_TOKENS = 512
"""Of texts, where neither recipe nor publisher says otherwise."""
_WHOLE = 0.99
_CHUNK = 1024


def resolve(
    asked: Config, examples: Examples, *, published: Mapping[str, Any], writes: bool
) -> tuple[Spec, dict[str, bytes]]:
    """See bmctl.inputs.text.resolve."""
    takes = published.get("max_tokens")
    if asked.max_tokens is not None and takes is not None and asked.max_tokens > takes:
        raise RecipeError(
            f"data.input.max_tokens: {asked.max_tokens}, but the model takes at most {takes}",
            hint=f"--set data.input.max_tokens={takes}",
        )
    path = published.get("files", {}).get(TOKENIZER)
    if path is None and published.get("vocab_size") is not None:
        raise RecipeError(
            f"model.name: the model brings no {TOKENIZER}, without which nobody knows what its tokens mean",
            hint="save one beside its config.json: AutoTokenizer.from_pretrained(NAME).save_pretrained(FOLDER)",
        )
    if path is not None and asked.tokenizer is not None:
        raise RecipeError(
            "data.input.tokenizer: the model brings its own, which its weights belong to",
            hint="remove data.input.tokenizer, or take an architecture by name, such as transformers:bert",
        )
    wanted = (asked.tokenizer or TokenizerConfig()).for_writing() if writes else asked.tokenizer or TokenizerConfig()
    text = _read(Path(path)) if path is not None else train(_texts(examples), config=wanted, writes=writes)
    tokenizer = open_tokenizer(text)
    marks: dict[str, Any] = _marks(tokenizer, published) if writes else {}
    if path is not None and writes:
        text = _beginning(text, marks["begin_id"])
        tokenizer = open_tokenizer(text)
    most = takes or MOST_TOKENS
    whole = 1.0 if writes else _WHOLE
    max_tokens = asked.max_tokens or (
        _enough(tokenizer, _texts(examples), most=most, whole=whole) if len(examples) else most
    )
    pad_id = published.get("pad_id", _pad_id(tokenizer))
    vocab_size = max(tokenizer.get_vocab().values()) + 1
    spec = Spec(max_tokens=max_tokens, vocab_size=vocab_size, pad_id=pad_id, **marks)
    return spec, {TOKENIZER: text.encode()}


def _texts(examples: Examples) -> Sequence[str]:
    (texts,) = examples.read(None).values()
    return texts


def _read(path: Path) -> str:
    """A tokenizer's file without what it says about lengths: that is Spec's."""
    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # tokenizers raises plain Exception
        raise PackageError(f"{path}: no tokenizer ({error})", hint="fetch the model again") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer.to_str()


def _enough(tokenizer: Tokenizer, texts: Sequence[str], *, most: int, whole: float) -> int:
    """So many tokens that this share of the texts stays whole; where it is all, others may be longer by an eighth."""
    lengths = [len(ids) for ids in _ids(tokenizer, texts)]
    found = int(np.quantile(lengths, whole, method="higher"))
    return min(most, _rounded(found + (found // 8 if whole == 1 else 0)))


def _rounded(num_tokens: int) -> int:
    return max(1, -(-num_tokens // MULTIPLE)) * MULTIPLE


def _pad_id(tokenizer: Tokenizer) -> int:
    return _known(tokenizer, PAD, "<pad>", "<|endoftext|>", "</s>") or 0


def _known(tokenizer: Tokenizer, *names: str) -> int | None:
    """The first of these tokens that there is."""
    return next((each for each in map(tokenizer.token_to_id, names) if each is not None), None)


def _marks(tokenizer: Tokenizer, published: Mapping[str, Any]) -> dict[str, int]:
    """The tokens before and after a text; one may be both.

    Raises:
        RecipeError: It has none.
    """
    end = published.get("end_id", _known(tokenizer, LAST, "<|endoftext|>", "</s>", "<eos>"))
    begin = published.get("begin_id", _known(tokenizer, FIRST, "<s>", "<bos>"))
    begin, end = begin if begin is not None else end, end if end is not None else begin
    if begin is None or end is None:
        raise RecipeError(
            f"model.name: its {TOKENIZER} has no token that a text begins or ends with",
            hint="say bos_token_id and eos_token_id in its config.json",
        )
    return {"begin_id": begin, "end_id": end}


def _beginning(text: str, begin_id: int) -> str:
    """A publisher's tokenizer, with this token before each text and none after it."""
    tokenizer = Tokenizer.from_str(text)
    begin = tokenizer.id_to_token(begin_id)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, begin_id)])
    return tokenizer.to_str()


# -- encoding ---------------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def open_tokenizer(text: str, *, max_tokens: int | None = None) -> Tokenizer:
    """A tokenizer that cuts off what comes after `max_tokens`, its own tokens at the end counted in.

    Args:
        text: What `tokenizer.json` holds.
    """
    tokenizer = Tokenizer.from_str(text)
    if max_tokens is not None:
        tokenizer.enable_truncation(max_tokens)
    return tokenizer


def _of(given: Resolved) -> Tokenizer:
    most = given.spec.max_tokens if given.spec.begin_id is None else None
    return open_tokenizer(given.files[TOKENIZER].decode(), max_tokens=most)


def _ids(tokenizer: Tokenizer, texts: Sequence[str]) -> Iterator[list[int]]:
    """Of each text, in order; never without any token, which no model takes."""
    for start in range(0, len(texts), _CHUNK):
        with parallel(True):
            found = tokenizer.encode_batch([str(text) for text in texts[start : start + _CHUNK]])
        yield from (each.ids for each in found)


def _checked(ids: list[int], *, given: Resolved) -> list[int]:
    """Raises:
    DataError: More tokens than the model takes: what is cut off would be neither read nor counted.
    """
    if len(ids) > given.spec.max_tokens:
        raise DataError(
            f"a text has {len(ids)} tokens, and the model takes {given.spec.max_tokens}",
            hint="shorter texts, or train for longer ones: data.source.piece and data.input.max_tokens",
        )
    return ids


def decode(ids: Sequence[int], *, given: Resolved) -> str:
    """See bmctl.inputs.text.decode."""
    spec = given.spec
    none_of_text = {spec.pad_id, spec.begin_id, spec.end_id}
    found: str = _of(given).decode([each for each in ids if each not in none_of_text])
    return found


def encode(records: Records, *, given: Resolved) -> dict[str, np.ndarray]:
    """See bmctl.inputs.text.encode."""
    (texts,) = records.values()
    rows: list[Any] = list(texts)
    strings = [index for index, text in enumerate(rows) if isinstance(text, str)]
    if strings:
        if PARALLEL not in os.environ:
            os.environ[PARALLEL] = "false"
        found = _of(given).encode_batch([rows[index] for index in strings])
        for index, each in zip(strings, found, strict=True):
            rows[index] = _checked(each.ids, given=given)
    longest = max((len(row) for row in rows), default=0)
    length = min(_rounded(longest), given.spec.max_tokens)
    ids = np.full((len(rows), length), given.spec.pad_id, np.int32)
    mask = np.zeros((len(rows), length), np.uint8)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = row
        mask[index, : len(row)] = 1
    return {IDS: ids, MASK: mask}


# -- once for all -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class EncodedTexts:
    """Samples whose texts are token ids.

    Attributes:
        samples: With texts.
        names: Of the columns that are encoded.
        ids: int32, of all texts of all these columns, one after another.
        starts: int64 [len(names), N + 1], where each text begins and the last one ends.
    """

    samples: Samples
    names: tuple[str, ...]
    ids: np.ndarray
    starts: np.ndarray

    @property
    def columns(self) -> Mapping[str, Column]:
        return self.samples.columns

    @property
    def fingerprint(self) -> str:
        return self.samples.fingerprint

    @property
    def in_memory(self) -> bool:
        return True

    @property
    def sequential(self) -> bool:
        return False

    @property
    def parts(self) -> np.ndarray | None:
        return self.samples.parts

    @property
    def window(self) -> int | None:
        return self.samples.window

    @property
    def opens_files(self) -> bool:
        return self.samples.opens_files

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, indices: Indices, *, only: Collection[str] | None = None) -> dict[str, Sequence[Any]]:
        """As the samples give it, texts as int32 [t]."""
        wanted = set(self.columns if only is None else only)
        others = wanted - set(self.names)
        found = self.samples.read(indices, only=tuple(others)) if others else {}
        for name, starts in zip(self.names, self.starts, strict=True):
            if name in wanted:
                found[name] = [self.ids[starts[index] : starts[index + 1]] for index in indices]
        return found

    def read_each(self, batches: Sequence[Indices]) -> Iterator[dict[str, Sequence[Any]]]:
        return map(self.read, batches)

    def name(self, index: int) -> str:
        return self.samples.name(index)

    def sketches(self) -> np.ndarray:
        return self.samples.sketches()

    def identities(self, indices: Indices) -> list[bytes]:
        return self.samples.identities(indices)


def prepare(samples: Samples, *, given: Resolved, folder: Path | None) -> Samples:
    """See bmctl.inputs.text.prepare; with a folder the ids lie there, and are mapped rather than read.

    Raises:
        ResourceError: The folder cannot be written to.
    """
    names = tuple(name for name, column in samples.columns.items() if column.kind == COLUMN)
    if samples.sequential or not names:
        return samples
    if folder is None:
        parts, starts = _all(samples, names, given=given)
        return EncodedTexts(samples, names, np.concatenate([*parts, np.zeros(0, np.int32)]), starts)
    told = f"{samples.fingerprint} {len(samples)} {names} {given.spec.max_tokens} {tokenizers.__version__} 1\n"
    key = hashlib.sha256(told.encode() + given.files[TOKENIZER]).hexdigest()[:32]
    ids, starts_at = folder / f"{key}.ids.npy", folder / f"{key}.starts.npy"
    try:
        if not starts_at.exists():  # it is written last
            folder.mkdir(parents=True, exist_ok=True)
            parts, starts = _all(samples, names, given=given)
            _save(ids, np.concatenate([*parts, np.zeros(0, np.int32)]))
            _save(starts_at, starts)
        return EncodedTexts(samples, names, np.load(ids, mmap_mode="r"), np.load(starts_at, mmap_mode="r"))
    except OSError as error:
        raise ResourceError(
            f"{folder}: cannot keep encoded texts there ({error.strerror or error})", hint="free some space"
        ) from error
    except ValueError as error:
        raise ResourceError(f"{starts_at}: damaged ({error})", hint=f"rm {starts_at}") from error


def _all(samples: Samples, names: tuple[str, ...], *, given: Resolved) -> tuple[list[np.ndarray], np.ndarray]:
    """Ids of all texts, and where each begins."""
    tokenizer = _of(given)
    parts: list[np.ndarray] = []
    starts = np.zeros((len(names), len(samples) + 1), np.int64)
    end = 0
    for column, name in enumerate(names):
        starts[column, 0] = end
        for first in range(0, len(samples), _CHUNK):
            indices = np.arange(first, min(first + _CHUNK, len(samples)))
            texts = samples.read(indices, only=(name,))[name]
            rows = [_checked(ids, given=given) for ids in _ids(tokenizer, texts)]
            lengths = np.cumsum([len(row) for row in rows])
            starts[column, first + 1 : first + 1 + len(rows)] = end + lengths
            end += int(lengths[-1])
            parts.append(np.array([each for row in rows for each in row], np.int32))
    return parts, starts


def _save(path: Path, array: np.ndarray) -> None:
    """Whole or not at all: processes of one training may do it at the same time."""
    with NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        np.save(file, array, allow_pickle=False)
    Path(file.name).replace(path)
