"""Texts to token ids, and tokenizers that are trained.

n: texts of a batch. N: texts of a split. t: tokens.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING, Any

import numpy as np
import tokenizers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from bmctl.core.columns import Column
from bmctl.errors import PackageError, RecipeError, ResourceError
from bmctl.inputs.text.spec import COLUMN, IDS, MASK, TOKENIZER, Config, Spec, TokenizerConfig

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
_PAD, _UNKNOWN, _FIRST, _LAST = "[PAD]", "[UNK]", "[CLS]", "[SEP]"
_SPECIAL = [_PAD, _UNKNOWN, _FIRST, _LAST]
_PARALLEL = "TOKENIZERS_PARALLELISM"


def resolve(asked: Config, examples: Examples, *, published: Mapping[str, Any]) -> tuple[Spec, dict[str, bytes]]:
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
    wanted = asked.tokenizer or TokenizerConfig()
    text = _read(Path(path)) if path is not None else train(_texts(examples), config=wanted)
    tokenizer = open_tokenizer(text)
    most = takes or MOST_TOKENS
    max_tokens = asked.max_tokens or (_enough(tokenizer, _texts(examples), most=most) if len(examples) else most)
    pad_id = published.get("pad_id", _pad_id(tokenizer))
    spec = Spec(max_tokens=max_tokens, vocab_size=max(tokenizer.get_vocab().values()) + 1, pad_id=pad_id)
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


def _enough(tokenizer: Tokenizer, texts: Sequence[str], *, most: int) -> int:
    """So many tokens that nearly all texts stay whole."""
    lengths = [len(ids) for ids in _ids(tokenizer, texts)]
    return min(most, _rounded(int(np.quantile(lengths, _WHOLE, method="higher"))))


def _rounded(num_tokens: int) -> int:
    return max(1, -(-num_tokens // MULTIPLE)) * MULTIPLE


def _pad_id(tokenizer: Tokenizer) -> int:
    known = (tokenizer.token_to_id(name) for name in (_PAD, "<pad>", "<|endoftext|>", "</s>"))
    return next((each for each in known if each is not None), 0)


# -- a tokenizer of our own -------------------------------------------------------------------------


def train(texts: Sequence[str], *, config: TokenizerConfig) -> str:
    """The same texts give the same tokenizer, in every process.

    Returns:
        What `tokenizer.json` holds.
    """
    tokenizer = _wordpiece(texts, config) if config.kind == "wordpiece" else _bpe(texts, config)
    tokenizer.add_special_tokens(_SPECIAL)
    first, last = tokenizer.token_to_id(_FIRST), tokenizer.token_to_id(_LAST)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{_FIRST} $A {_LAST}",
        pair=f"{_FIRST} $A {_LAST} $B:1 {_LAST}:1",
        special_tokens=[(_FIRST, first), (_LAST, last)],
    )
    return tokenizer.to_str()


def _wordpiece(texts: Sequence[str], config: TokenizerConfig) -> Tokenizer:
    """As BERT's: words and punctuation, cut into pieces of which all but a word's first begin with ##."""
    normalizer = normalizers.BertNormalizer(lowercase=config.lowercase)
    letters = sorted({letter for text in texts for letter in normalizer.normalize_str(str(text)) if letter.strip()})
    # Left to the trainer, letters inside words get their ids in the order of a random hash, which decides ties.
    inner = [f"##{letter}" for letter in letters]
    trainer = trainers.WordPieceTrainer(
        vocab_size=config.vocab_size, special_tokens=[*_SPECIAL, *inner], show_progress=False
    )

    def empty(model: Any) -> Tokenizer:
        tokenizer = Tokenizer(model)
        tokenizer.normalizer = normalizer
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        return tokenizer

    trained = empty(models.WordPiece(unk_token=_UNKNOWN))
    with parallel(False):
        trained.train_from_iterator(map(str, texts), trainer, length=len(texts))
    # Anew from the vocabulary: what is given as special would be found in texts before they are cut into words.
    return empty(models.WordPiece(trained.get_vocab(), unk_token=_UNKNOWN))


def _bpe(texts: Sequence[str], config: TokenizerConfig) -> Tokenizer:
    """As GPT-2's: on bytes, so that nothing is unknown."""
    tokenizer = Tokenizer(models.BPE())
    small = [normalizers.Lowercase()] if config.lowercase else []
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), *small])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with parallel(False):
        tokenizer.train_from_iterator(map(str, texts), trainer, length=len(texts))
    return tokenizer


# -- encoding ---------------------------------------------------------------------------------------


@contextmanager
def parallel(wanted: bool) -> Iterator[None]:
    """Threads of tokenizers or none; off afterwards: processes that are forked later would wait for them for ever."""
    os.environ[_PARALLEL] = "true" if wanted else "false"
    try:
        yield
    finally:
        os.environ[_PARALLEL] = "false"


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
    return open_tokenizer(given.files[TOKENIZER].decode(), max_tokens=given.spec.max_tokens)


def _ids(tokenizer: Tokenizer, texts: Sequence[str]) -> Iterator[list[int]]:
    """Of each text, in order; never without any token, which no model takes."""
    for start in range(0, len(texts), _CHUNK):
        with parallel(True):
            found = tokenizer.encode_batch([str(text) for text in texts[start : start + _CHUNK]])
        yield from (each.ids for each in found)


def encode(records: Records, *, given: Resolved) -> dict[str, np.ndarray]:
    """See bmctl.inputs.text.encode."""
    (texts,) = records.values()
    rows: list[Any] = list(texts)
    strings = [index for index, text in enumerate(rows) if isinstance(text, str)]
    if strings:
        if _PARALLEL not in os.environ:
            os.environ[_PARALLEL] = "false"
        found = _of(given).encode_batch([rows[index] for index in strings])
        for index, each in zip(strings, found, strict=True):
            rows[index] = each.ids
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
            rows = list(_ids(tokenizer, samples.read(indices, only=(name,))[name]))
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
