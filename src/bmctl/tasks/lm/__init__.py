"""Causal language models: the next token after any beginning; bits per byte, and texts that are gone on with.

One graph does it all: it takes new tokens and a cache of what came before, and gives logits at the places that are
asked for. Whole texts are scored with an empty cache, prompts are read at once, and then each token is a call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bmctl.core.columns import Column, Real
from bmctl.core.evaluation import Evaluation, Metric
from bmctl.core.runner import Runner
from bmctl.errors import DataError, UnsupportedError
from bmctl.schema import BATCH, Signature, Span, TensorSpec
from bmctl.tasks.lm.spec import AT, BZIP2, IDS, MASK, NUM_BYTES, Config, Facts, Generate

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

__all__ = ["COLUMNS", "GIVES", "METRICS", "Config", "Facts", "Generate"]

METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("bits_per_byte", "lower", "bits"),
        Metric("perplexity", "lower"),
        Metric("loss", "lower", "nats"),
    )
}
SCORED = "bits_per_byte"
NATS, TOKENS, BYTES = range(3)
"""Columns of an evaluation's counts."""
GIVES = ("logits",)
COLUMNS = ("text", "stopped")
WRITES = True
PART = "model"
SHOWN = 60
"""Characters of a text that are shown of a prediction."""


# -- data -------------------------------------------------------------------------------------------


def needs(config: Config) -> tuple[str, ...]:
    """Columns that the targets are taken from: the model does not see them."""
    return (NUM_BYTES, BZIP2)


def facts(columns: Mapping[str, Column], config: Config, told: Mapping[str, Any]) -> Facts | None:
    """The vocabulary; None where it is not decided yet.

    Raises:
        DataError: The source does not say how many bytes its texts have, or the input makes no tokens of them.
    """
    if not all(isinstance(columns.get(name), Real) for name in needs(config)):
        raise DataError(
            f"data.source: its samples have {', '.join(columns)}, and a language model learns from running text",
            hint="set data.source.kind to corpus, or take another task",
        )
    if not told:
        return None
    return Facts(vocab_size=told["vocab_size"], max_tokens=told["max_tokens"], end_id=told["end_id"])


def balance(config: Config) -> None:
    """There are no classes."""


def targets(records: Mapping[str, Sequence[Any]], *, config: Config, facts: Facts) -> dict[str, np.ndarray]:
    """``num_bytes`` and ``bzip2_bytes``: float32 [n]."""
    import numpy as np

    return {name: np.asarray(records[name], np.float32) for name in needs(config)}


def told(facts: Facts) -> dict[str, Any]:
    """That the model is to give logits of the next token."""
    return {"head": "causal"}


# -- training ---------------------------------------------------------------------------------------


def loss(
    outputs: Mapping[str, torch.Tensor],
    batch: Mapping[str, torch.Tensor],
    *,
    config: Config,
    facts: Facts | None = None,
) -> torch.Tensor:
    """Mean cross-entropy of the next token, in float32; padding is left out.

    Args:
        outputs: ``logits`` [N, T, V].
        batch: Ids and mask int64 [N, T].
        config: Not used: it is about what a trained model writes.
        facts: Not used.
    """
    from bmctl.tasks.lm import training

    nats_NT, is_token_NT = training.nats(outputs["logits"], batch[IDS], batch[MASK])
    return nats_NT.sum() / is_token_NT.sum().clamp(min=1)


def score(
    outputs: Mapping[str, torch.Tensor], batch: Mapping[str, torch.Tensor], *, facts: Facts | None = None
) -> torch.Tensor:
    """float32 [N]: bits per byte of each text."""
    import math

    from bmctl.tasks.lm import training

    nats_NT, _ = training.nats(outputs["logits"], batch[IDS], batch[MASK])
    return nats_NT.sum(1) / math.log(2) / batch[NUM_BYTES]


def distill_loss(
    student: Mapping[str, torch.Tensor], teacher: Mapping[str, torch.Tensor], *, temperature: float
) -> torch.Tensor:
    """T^2 KL(teacher || student) of the next token, both softened by T, mean over all places, padding among them.

    Args:
        student: ``logits`` [N, T, V].
        teacher: ``logits`` [N, T, V].
        temperature: T.

    Source: Hinton, Vinyals, Dean 2015, https://arxiv.org/abs/1503.02531
    """
    from bmctl.tasks.lm import training

    return training.distilled(student["logits"], teacher["logits"], temperature=temperature)


# -- graphs -----------------------------------------------------------------------------------------


def signatures(given: Sequence[TensorSpec], facts: Facts, model: Any = None) -> dict[str, Signature]:
    """One graph: new tokens, a mask of old and new ones, places, and the cache, to logits and the cache with the new.

    Raises:
        UnsupportedError: There is no model that says what its cache holds.
    """
    cache = getattr(model, "cache", None)
    if cache is None:
        raise UnsupportedError(
            "a language model's graph cannot be told from its file", hint="train it here: bmctl train --recipe RECIPE"
        )
    ids, mask = given
    mask = mask.model_copy(update={"shape": (BATCH, "past + tokens")})
    at = TensorSpec(name=AT, dtype="int64", shape=(BATCH, "kept"), meaning="places of which logits are wanted")
    logits = TensorSpec(
        name="logits",
        dtype="float32",
        shape=(BATCH, "kept", facts.vocab_size),
        role="scores",
        meaning="scores of the next token",
    )

    def state(prefix: str, axis: str) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(
                name=f"{prefix}.{layer}.{what}", dtype="float32", shape=(BATCH, heads, axis, numbers), role="state"
            )
            for layer, (heads, numbers) in enumerate(cache)
            for what in ("key", "value")
        )

    inputs = (ids, mask, at, *state("past", "past"))
    return {PART: Signature(inputs=inputs, outputs=(logits, *state("present", "past + tokens")))}


def axes(facts: Facts) -> dict[str, Span]:
    """Most calls are of one new token after a text of half the length."""
    most = facts.max_tokens
    return {
        "tokens": Span(min=1, opt=1, max=most),
        "past": Span(min=0, opt=most // 2, max=most),
        "kept": Span(min=1, opt=1, max=most),
    }


def modules(model: nn.Module) -> dict[str, nn.Module]:
    """The model, called with a cache."""
    from bmctl.tasks.lm.training import WithCache

    return {PART: WithCache(model)}


def predict(
    runners: Mapping[str, Runner],
    batch: Mapping[str, np.ndarray],
    *,
    config: Config,
    facts: Facts,
    decode: Callable[[Sequence[int]], str],
) -> Iterator[dict[str, Any]]:
    """What follows each prompt: `text`, its `tokens`, and whether it `stopped` at its `end` or for its `length`.

    Args:
        runners: ``{"model": ...}``.
        batch: Ids and mask int64 [n, t]: prompts, padded anywhere.
        config: How to choose tokens, and how many.
        facts: The token that ends a text, and how long texts may be.
        decode: Makes text of tokens.

    Raises:
        DataError: A prompt leaves no room for a token.
        DivergedError: A logit is nan or infinite.
    """
    from bmctl.tasks.lm import generation

    found = generation.generate(runners[PART], batch[IDS], batch[MASK], how=config.generate, facts=facts)
    for tokens in found:
        ended = bool(tokens) and tokens[-1] == facts.end_id
        yield {"text": decode(tokens), "tokens": tokens, "stopped": "end" if ended else "length"}


def rehearse(runners: Mapping[str, Runner], batch: Mapping[str, np.ndarray], *, config: Config, facts: Facts) -> None:
    """Every way in which the graph is called, on texts of the data: what comes first, what follows, single tokens.

    Args:
        runners: ``{"model": ...}``.
        batch: Ids and mask int64 [n, t].
        config: Not used.
        facts: Not used.
    """
    from bmctl.tasks.lm import generation

    generation.rehearse(runners[PART], batch[IDS], batch[MASK])


def words(prediction: Mapping[str, Any]) -> str:
    """The beginning of the text, on one line."""
    line = " ".join(prediction["text"].split())
    return line if len(line) <= SHOWN else f"{line[: SHOWN - 3]}..."


# -- evaluation -------------------------------------------------------------------------------------


def evaluate(
    runners: Mapping[str, Runner],
    batches: Iterable[Mapping[str, np.ndarray]],
    *,
    config: Config,
    facts: Facts | None = None,
) -> Evaluation:
    """Bits per byte, perplexity and loss of one split, each text by itself; bzip2 on the split is to be beaten.

    Args:
        runners: ``{"model": ...}``.
        batches: Ids and mask int64 [n, t], ``num_bytes`` and ``bzip2_bytes`` [n].
        config: Not used.
        facts: Not used.

    Raises:
        DataError: No samples.
    """
    import numpy as np

    from bmctl.tasks.lm import generation

    rows, compressed = [], 0.0
    for batch in batches:
        nats, tokens = generation.nats(runners[PART], batch[IDS], batch[MASK])
        rows.append(np.stack([nats, tokens, batch[NUM_BYTES]], axis=1, dtype=np.float64))
        compressed += float(batch[BZIP2].sum(dtype=np.float64))
    if not rows:
        raise DataError("there is nothing to evaluate: the split is empty")
    counts = np.concatenate(rows)
    return Evaluation("lm", counts, metrics(counts), baseline=8 * compressed / float(counts[:, BYTES].sum()))


def metrics(counts: np.ndarray) -> dict[str, float]:
    """Every metric of METRICS: of all texts together, long ones count for more.

    Args:
        counts: float64 [N, 3], columns NATS, TOKENS and BYTES.
    """
    import math

    nats, tokens, num_bytes = (float(total) for total in counts.sum(axis=0))
    loss = nats / tokens
    return {"bits_per_byte": nats / math.log(2) / num_bytes, "perplexity": math.exp(min(loss, 700)), "loss": loss}


def means(counts: np.ndarray) -> dict[str, np.ndarray]:
    """None of them is a mean over texts."""
    return {}
