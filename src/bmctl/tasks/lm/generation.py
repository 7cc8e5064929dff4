"""Going on with texts, on anything that runs the graph: a plain loop in NumPy.

n: texts of a batch. t: tokens of the longest. s: tokens in the cache. V: size of the vocabulary.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from bmctl.core.runner import Runner
from bmctl.errors import DataError, DivergedError
from bmctl.schema import BATCH
from bmctl.tasks.lm.spec import AT, IDS, MASK

if TYPE_CHECKING:
    from bmctl.tasks.lm.spec import Facts, Generate

STEPS = 4
"""Single tokens of a rehearsal."""


class Reader:
    """Texts that a graph has read so far: its cache, and which places of it are taken.

    Attributes:
        mask: int64 [n, s], 0 where a place holds padding.
    """

    def __init__(self, runner: Runner, num: int) -> None:
        self._runner = runner
        self._past = [spec for spec in runner.signature.inputs if spec.role == "state"]
        self._present = [spec.name for spec in runner.signature.outputs if spec.role == "state"]
        sizes = {BATCH: num, "past": 0}
        self._cache = {
            spec.name: np.zeros([sizes[axis] if isinstance(axis, str) else axis for axis in spec.shape], spec.dtype)
            for spec in self._past
        }
        self.mask = np.zeros((num, 0), np.int64)

    def read(self, ids: np.ndarray, mask: np.ndarray, *, at: np.ndarray) -> np.ndarray:
        """Logits [n, g, V] at the places `at` [n, g] among new tokens [n, t], which are in the cache from now on."""
        self.mask = np.concatenate([self.mask, mask], axis=1)
        outputs = self._runner.run({IDS: ids, MASK: self.mask, AT: at, **self._cache})
        self._cache = {spec.name: outputs[name] for spec, name in zip(self._past, self._present, strict=True)}
        return outputs["logits"]

    def keep(self, rows: np.ndarray) -> None:
        """Go on with some of the texts."""
        self.mask = self.mask[rows]
        self._cache = {name: array[rows] for name, array in self._cache.items()}

    def squeeze(self) -> None:
        """Leave out padding between tokens: where a token stands is in its key, not in its place in the cache."""
        order = np.argsort(self.mask == 0, axis=1, kind="stable")[:, : int(self.mask.sum(axis=1).max())]
        self.mask = np.take_along_axis(self.mask, order, axis=1)
        self._cache = {
            name: np.take_along_axis(array, order[:, None, :, None], axis=2) for name, array in self._cache.items()
        }


def nats(runner: Runner, ids: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cross-entropy of each text's tokens but the first, summed, float64 [n]; and how many these are."""
    num, length = ids.shape
    at = np.tile(np.arange(length, dtype=np.int64), (num, 1))
    logits = Reader(runner, num).read(ids, mask, at=at)[:, :-1]
    wanted, is_token = ids[:, 1:, None], mask[:, 1:] != 0
    highest = logits.max(axis=-1, keepdims=True)
    lost = np.log(np.exp(logits - highest).sum(axis=-1)) - np.take_along_axis(logits - highest, wanted, -1)[..., 0]
    return np.where(is_token, lost, 0).sum(axis=1, dtype=np.float64), is_token.sum(axis=1)


def rehearse(runner: Runner, ids: np.ndarray, mask: np.ndarray) -> None:
    """The first half of the texts, the second half, and single tokens after it."""
    num, length = ids.shape
    reader, half = Reader(runner, num), length // 2
    for part in (slice(0, half), slice(half, length)):
        last = np.maximum(mask[:, part].sum(axis=1) - 1, 0)
        logits = reader.read(ids[:, part], mask[:, part], at=np.stack([np.zeros_like(last), last], axis=1))
    for _ in range(STEPS):
        logits = reader.read(logits[:, -1:].argmax(-1), np.ones((num, 1), np.int64), at=np.zeros((num, 1), np.int64))


@dataclass
class _Text:
    """One that is gone on with.

    Attributes:
        room: New tokens that there may be.
    """

    tokens: list[int]
    room: int
    luck: np.random.Generator


def generate(runner: Runner, ids: np.ndarray, mask: np.ndarray, *, how: Generate, facts: Facts) -> list[list[int]]:
    """New tokens of each prompt, the one that ends the text included; none depends on what else is in the batch.

    Args:
        ids: Prompts, int64 [n, t], padded anywhere.
        mask: int64 [n, t], 0 for padding.

    Raises:
        DataError: A prompt leaves no room for a token.
        DivergedError: A logit is nan or infinite.
    """
    lengths = mask.sum(axis=1)
    if lengths.max() >= facts.max_tokens:
        raise DataError(
            f"a prompt has {lengths.max()} tokens, and the model takes {facts.max_tokens}, what follows among them",
            hint="shorten the prompt",
        )
    texts = [
        _Text([], min(how.max_tokens, facts.max_tokens - int(length)), _luck(how.seed, row[kept != 0]))
        for row, kept, length in zip(ids, mask, lengths, strict=True)
    ]
    reader, going = Reader(runner, len(ids)), list(texts)
    places = np.arange(mask.shape[1], dtype=np.int64)
    logits = reader.read(ids, mask, at=(places * (mask != 0)).max(axis=1, keepdims=True))
    while True:
        for text, row in zip(going, logits[:, 0], strict=True):
            text.tokens.append(choose(row, how=how, luck=text.luck))
        rows = [i for i, text in enumerate(going) if len(text.tokens) < text.room and text.tokens[-1] != facts.end_id]
        if not rows:
            return [text.tokens for text in texts]
        if len(rows) < len(going):
            going = [going[i] for i in rows]
            reader.keep(np.array(rows))
        if reader.mask.shape[1] >= facts.max_tokens:
            reader.squeeze()
        new = np.array([[text.tokens[-1]] for text in going], np.int64)
        logits = reader.read(new, np.ones_like(new), at=np.zeros_like(new))


def choose(logits: np.ndarray, *, how: Generate, luck: np.random.Generator) -> int:
    """A token: the likeliest, or one that is drawn; equal ones in their order.

    Args:
        logits: [V].

    Raises:
        DivergedError: They are not finite.
    """
    if not np.isfinite(logits).all():
        raise DivergedError("the model's outputs hold nan or inf", hint="bmctl evaluate tells which stage broke it")
    if how.temperature == 0:
        return int(logits.argmax())
    order = np.argsort(-logits, kind="stable")[: how.top_k]
    scaled = logits[order].astype(np.float64) / how.temperature
    chances = np.exp(scaled - scaled[0])
    reached = np.cumsum(chances / chances.sum())
    if how.top_p is not None:
        reached = reached[: int(np.searchsorted(reached, how.top_p)) + 1]
    drawn = int(np.searchsorted(reached, luck.random() * reached[-1], side="right"))
    return int(order[min(drawn, len(reached) - 1)])


def _luck(seed: int, prompt: np.ndarray) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(prompt.astype("<i8").tobytes())])
