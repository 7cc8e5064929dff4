"""Language models: what is measured of them, and how texts are gone on with, whatever runs the graph."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from tests.specs import TEXT, causal_spec

from bmctl import models
from bmctl.backends import eager
from bmctl.core.columns import Class, Real, Text
from bmctl.core.runner import Batched, Bounds, Closing
from bmctl.errors import DataError, DivergedError, UnsupportedError
from bmctl.schema import Signature
from bmctl.tasks import lm
from bmctl.tasks.lm import generation

FACTS = lm.Facts(vocab_size=50, max_tokens=24, end_id=3)
CONFIG = lm.Config()
ARGS = {"width": 32, "depth": 2, "heads": 4, "kv_heads": 2, "tied": False}


@pytest.fixture(scope="module")
def runner() -> eager.EagerRunner:
    torch.manual_seed(0)
    spec = causal_spec("bmctl:decoder", args=ARGS, max_tokens=24)
    model = models.build(spec).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.4)
    return eager.open_module(lm.modules(model)["model"], signature=lm.signatures(TEXT, FACTS, model)["model"])


class Counts(Closing):
    """A graph that says of each text how many tokens it has seen: the next token is that number."""

    def __init__(self) -> None:
        model = type("Model", (), {"cache": ((1, 2),)})()
        self.signature: Signature = lm.signatures(TEXT, FACTS, model)["model"]
        self.bounds: dict[str, Bounds] = {}
        self.widths: list[int] = []

    def run(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        mask, at, past = feed["attention_mask"], feed["at"], feed["past.0.key"]
        self.widths.append(mask.shape[1])
        assert mask.shape[1] == past.shape[2] + feed["input_ids"].shape[1]
        seen = mask.cumsum(axis=1)[:, past.shape[2] :]
        logits = np.eye(50, dtype=np.float32)[np.take_along_axis(seen, at, axis=1)]
        grown = np.concatenate(
            [past, np.zeros((*past.shape[:2], at.shape[0] and seen.shape[1], 2), np.float32)], axis=2
        )
        return {"logits": logits, "present.0.key": grown, "present.0.value": grown}


def prompts(*rows: list[int]) -> tuple[np.ndarray, np.ndarray]:
    length = max(map(len, rows))
    ids = np.array([row + [0] * (length - len(row)) for row in rows], np.int64)
    mask = np.array([[1] * len(row) + [0] * (length - len(row)) for row in rows], np.int64)
    return ids, mask


# -- what is measured -------------------------------------------------------------------------------


def test_bits_per_byte_by_hand() -> None:
    """Two texts of 10 and 30 bytes in 4 and 6 tokens after the first."""
    counts = np.array([[math.log(2) * 20, 4, 10], [math.log(2) * 40, 6, 30]])
    found = lm.metrics(counts)
    assert list(found) == list(lm.METRICS)
    assert found["bits_per_byte"] == pytest.approx(60 / 40)
    assert found["loss"] == pytest.approx(math.log(2) * 60 / 10)
    assert found["perplexity"] == pytest.approx(2**6)
    assert lm.means(counts) == {}


def test_a_split_is_scored_without_padding_and_against_bzip2(runner: eager.EagerRunner) -> None:
    ids, mask = prompts([2, 7, 9, 11, 5], [2, 8, 6])
    batch = {
        "input_ids": ids,
        "attention_mask": mask,
        "num_bytes": np.float32([9, 5]),
        "bzip2_bytes": np.float32([4, 3]),
    }
    found = lm.evaluate({"model": runner}, [batch], config=CONFIG)
    with torch.no_grad():
        logits = runner._model.model(torch.from_numpy(ids), torch.from_numpy(mask)).log_softmax(-1)  # type: ignore[union-attr,operator]
    nats = [-sum(float(logits[row, i - 1, ids[row, i]]) for i in range(1, n)) for row, n in ((0, 5), (1, 3))]
    assert np.allclose(found.counts, [[nats[0], 4, 9], [nats[1], 2, 5]], rtol=1e-5)
    assert found.value == pytest.approx(sum(nats) / math.log(2) / 14, rel=1e-5)
    assert found.baseline == pytest.approx(8 * 7 / 14)
    with pytest.raises(DataError, match="the split is empty"):
        lm.evaluate({"model": runner}, [], config=CONFIG)


def test_the_loss_is_of_the_next_token_and_not_of_padding() -> None:
    ids, mask = (torch.from_numpy(each) for each in prompts([2, 7, 9, 11], [2, 8]))
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 50)
    expected = torch.stack([logits[0, i].log_softmax(-1)[ids[0, i + 1]] for i in range(3)])
    batch = {"input_ids": ids, "attention_mask": mask, "num_bytes": torch.tensor([6.0, 2.0])}
    one = -logits[1, 0].log_softmax(-1)[8]
    assert torch.allclose(lm.loss({"logits": logits}, batch, config=CONFIG), (one - expected.sum()) / 4)
    spoiled = logits.clone()
    spoiled[:, -1], spoiled[1, 1:] = 1e3, -1e3
    assert torch.equal(
        lm.loss({"logits": spoiled}, batch, config=CONFIG), lm.loss({"logits": logits}, batch, config=CONFIG)
    )
    scores = lm.score({"logits": logits}, batch)
    assert torch.allclose(scores, torch.stack([-expected.sum() / 6, one / 2]) / math.log(2))


def test_distillation_is_zero_for_equals_and_softened() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    p, q = torch.softmax(teacher / 4, -1), torch.softmax(student / 4, -1)
    expected = 16 * (p * (p.log() - q.log())).sum(-1).mean()
    assert lm.distill_loss({"logits": student}, {"logits": teacher}, temperature=4.0) == pytest.approx(float(expected))
    same = lm.distill_loss({"logits": teacher}, {"logits": teacher}, temperature=2.0)
    assert float(same) == pytest.approx(0, abs=1e-6)


def test_it_needs_running_text_and_a_model_with_a_cache() -> None:
    told = {"vocab_size": 50, "max_tokens": 24, "pad_id": 0, "begin_id": 2, "end_id": 3}
    columns = {"text": Text(), "num_bytes": Real(), "bzip2_bytes": Real()}
    assert lm.facts(columns, CONFIG, told) == FACTS
    assert lm.facts(columns, CONFIG, {}) is None, "nothing is decided yet"
    with pytest.raises(DataError, match="a language model learns from running text"):
        lm.facts({"text": Text(), "label": Class(("a", "b"))}, CONFIG, told)
    with pytest.raises(UnsupportedError, match="cannot be told from its file"):
        lm.signatures(TEXT, FACTS)


# -- going on with texts ----------------------------------------------------------------------------


def go_on(runner: Any, *rows: list[int], **how: Any) -> list[list[int]]:
    ids, mask = prompts(*rows)
    return generation.generate(runner, ids, mask, how=lm.Generate.model_validate(how), facts=FACTS)


def test_each_token_is_that_of_the_whole_text_so_far(runner: eager.EagerRunner) -> None:
    (found,) = go_on(runner, [2, 7, 9], max_tokens=12)
    text = [2, 7, 9]
    for token in found:
        with torch.no_grad():
            logits = runner._model.model(torch.tensor([text]), torch.ones(1, len(text), dtype=torch.int64))  # type: ignore[union-attr,operator]
        assert int(logits[0, -1].argmax()) == token
        text.append(token)
    assert len(found) == 12 or found[-1] == FACTS.end_id
    assert len(set(found)) > 2, "it does not say the same thing over and over: the comparison means something"


@pytest.mark.parametrize("how", [{}, {"temperature": 1.0, "seed": 5}, {"temperature": 2.0, "top_k": 9, "top_p": 0.8}])
def test_a_text_does_not_depend_on_the_others(runner: eager.EagerRunner, how: dict[str, Any]) -> None:
    rows = [[2, 7, 9], [2, *range(10, 29)], [2], [2, 7, 9, 30, 31], [2, 7, 9]]
    alone = [go_on(runner, row, max_tokens=16, **how)[0] for row in rows]
    assert go_on(runner, *rows, max_tokens=16, **how) == alone
    assert go_on(Batched(runner), *rows[::-1], max_tokens=16, **how) == alone[::-1]
    assert alone[0] == alone[4], "the same prompt"


def test_prompts_may_be_padded_anywhere(runner: eager.EagerRunner) -> None:
    ids, mask = prompts([2, 7, 9], [2, 5, 6, 7, 8, 9])
    left = np.array([[0, 0, 0, 2, 7, 9], ids[1]]), np.array([[0, 0, 0, 1, 1, 1], mask[1]])
    how = lm.Generate(max_tokens=10)
    assert generation.generate(runner, ids, mask, how=how, facts=FACTS) == generation.generate(
        runner, *left, how=how, facts=FACTS
    )


def test_it_stops_at_the_end_at_its_length_and_where_the_model_ends() -> None:
    graph = Counts()
    assert go_on(graph, [2], [2, 4, 4, 4], max_tokens=3) == [[1, 2, 3], [4, 5, 6]], "3 ends a text"
    assert go_on(graph, [2], max_tokens=9) == [[1, 2, 3]]
    graph = Counts()
    found = go_on(graph, [2] * 20, [2] * 5, [2] * 23, max_tokens=100)
    assert found == [[20, 21, 22, 23], list(range(5, 24)), [23]]
    assert max(graph.widths) <= FACTS.max_tokens, "an engine takes no more"
    with pytest.raises(DataError, match="a prompt has 24 tokens, and the model takes 24"):
        go_on(graph, [2], [2] * 24)


def test_what_is_predicted_says_why_it_stopped() -> None:
    ids, mask = prompts([2], [2, 4, 4, 4])
    config = lm.Config(generate=lm.Generate(max_tokens=3))
    found = list(
        lm.predict(
            {"model": Counts()}, {"input_ids": ids, "attention_mask": mask}, config=config, facts=FACTS,
            decode=lambda tokens: "-".join(map(str, tokens)),
        )
    )  # fmt: skip
    assert found[0] == {"text": "1-2-3", "tokens": [1, 2, 3], "stopped": "end"}
    assert found[1] == {"text": "4-5-6", "tokens": [4, 5, 6], "stopped": "length"}
    assert lm.words({"text": " a\n b "}) == "a b"
    assert len(lm.words({"text": "word " * 100})) == lm.SHOWN


# -- choosing a token -------------------------------------------------------------------------------

LOGITS = np.log(np.array([0.1, 0.4, 0.3, 0.15, 0.05], np.float32))


def shares(**how: Any) -> np.ndarray:
    luck, asked = np.random.default_rng(0), lm.Generate.model_validate({"temperature": 1.0, **how})
    drawn = [generation.choose(LOGITS, how=asked, luck=luck) for _ in range(4000)]
    return np.bincount(drawn, minlength=5) / 4000


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({"temperature": 0.0}, [0, 1, 0, 0, 0]),
        ({}, [0.1, 0.4, 0.3, 0.15, 0.05]),
        ({"top_k": 1}, [0, 1, 0, 0, 0]),
        ({"top_k": 2}, [0, 4 / 7, 3 / 7, 0, 0]),
        ({"top_p": 0.65}, [0, 4 / 7, 3 / 7, 0, 0]),
        ({"top_p": 0.75}, [0, 8 / 17, 6 / 17, 3 / 17, 0]),
        ({"top_p": 0.01}, [0, 1, 0, 0, 0]),
        ({"top_p": 1.0, "top_k": 99}, [0.1, 0.4, 0.3, 0.15, 0.05]),
        ({"temperature": 0.5}, np.array([0.01, 0.16, 0.09, 0.0225, 0.0025]) / 0.285),
        ({"temperature": 1e-6}, [0, 1, 0, 0, 0]),
    ],
)
def test_tokens_are_drawn_as_they_are_likely(how: dict[str, Any], expected: Any) -> None:
    assert np.allclose(shares(**how), expected, atol=0.03)
    assert ((shares(**how) > 0) <= (np.asarray(expected) > 0)).all()


def test_equal_tokens_are_taken_in_order_and_broken_ones_refused() -> None:
    luck = np.random.default_rng(0)
    assert generation.choose(np.zeros(5), how=lm.Generate(), luck=luck) == 0
    with pytest.raises(DivergedError, match="nan or inf"):
        generation.choose(np.array([0, np.nan]), how=lm.Generate(), luck=luck)
