"""Tokenizers of our own, trained on the texts."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from bmctl.inputs.text.spec import TokenizerConfig

PAD, UNKNOWN, FIRST, LAST = "[PAD]", "[UNK]", "[CLS]", "[SEP]"
SPECIAL = [PAD, UNKNOWN, FIRST, LAST]
PARALLEL = "TOKENIZERS_PARALLELISM"


@contextmanager
def parallel(wanted: bool) -> Iterator[None]:
    """Threads of tokenizers or none; off afterwards: processes that are forked later would wait for them for ever."""
    os.environ[PARALLEL] = "true" if wanted else "false"
    try:
        yield
    finally:
        os.environ[PARALLEL] = "false"


def train(texts: Sequence[str], *, config: TokenizerConfig, writes: bool = False) -> str:
    """The same texts give the same tokenizer, in every process.

    Args:
        writes: Texts begin with a token and end with none, and what is decoded is what was encoded, byte for byte.

    Returns:
        What `tokenizer.json` holds.
    """
    tokenizer = _bpe(texts, config, exact=writes) if config.kind == "bpe" else _wordpiece(texts, config)
    if writes:  # only named here, never looked for in texts, which may hold their names
        first = tokenizer.token_to_id(FIRST)
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{FIRST} $A", special_tokens=[(FIRST, first)])
        return tokenizer.to_str()
    tokenizer.add_special_tokens(SPECIAL)
    first, last = tokenizer.token_to_id(FIRST), tokenizer.token_to_id(LAST)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{FIRST} $A {LAST}",
        pair=f"{FIRST} $A {LAST} $B:1 {LAST}:1",
        special_tokens=[(FIRST, first), (LAST, last)],
    )
    return tokenizer.to_str()


def _wordpiece(texts: Sequence[str], config: TokenizerConfig) -> Tokenizer:
    """As BERT's: words and punctuation, cut into pieces of which all but a word's first begin with ##."""
    normalizer = normalizers.BertNormalizer(lowercase=config.lowercase is not False)
    letters = sorted({letter for text in texts for letter in normalizer.normalize_str(str(text)) if letter.strip()})
    # Left to the trainer, letters inside words get their ids in the order of a random hash, which decides ties.
    inner = [f"##{letter}" for letter in letters]
    trainer = trainers.WordPieceTrainer(
        vocab_size=config.vocab_size, special_tokens=[*SPECIAL, *inner], show_progress=False
    )

    def empty(model: Any) -> Tokenizer:
        tokenizer = Tokenizer(model)
        tokenizer.normalizer = normalizer
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        return tokenizer

    trained = empty(models.WordPiece(unk_token=UNKNOWN))
    with parallel(False):
        trained.train_from_iterator(map(str, texts), trainer, length=len(texts))
    # Anew from the vocabulary: what is given as special would be found in texts before they are cut into words.
    return empty(models.WordPiece(trained.get_vocab(), unk_token=UNKNOWN))


def _bpe(texts: Sequence[str], config: TokenizerConfig, *, exact: bool) -> Tokenizer:
    """As GPT-2's: on bytes, so that nothing is unknown; `exact` changes nothing of a text before it is cut up."""
    tokenizer = _empty_bpe(models.BPE(), config, exact=exact)
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with parallel(False):
        tokenizer.train_from_iterator(map(str, texts), trainer, length=len(texts))
    if not exact:
        return tokenizer
    # Anew from the merges: what is given as special would be found in texts before they are cut into words.
    found = json.loads(tokenizer.to_str())["model"]
    return _empty_bpe(models.BPE(found["vocab"], [tuple(pair) for pair in found["merges"]]), config, exact=True)


def _empty_bpe(model: Any, config: TokenizerConfig, *, exact: bool) -> Tokenizer:
    tokenizer = Tokenizer(model)
    if not exact:
        small = [normalizers.Lowercase()] if config.lowercase is not False else []
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), *small])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=not exact)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
