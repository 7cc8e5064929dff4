"""Commands that are made on the spot."""

from __future__ import annotations

import numpy as np

from bmctl.sources import commands


def test_sizes_classes_and_splits() -> None:
    seen: list[str] = []
    for split, num in (("train", 480), ("val", 204), ("test", 480)):
        samples = commands.open(commands.Config(), split=split)
        found = samples.read(range(len(samples)))
        assert len(samples) == num
        assert (np.bincount(found["label"]) == num // 6).all()
        seen += found["text"].tolist()
    assert len(set(seen)) == len(seen) == 1164
    assert not [text for text in seen if "{" in text or "  " in text or text != text.strip()]


def test_the_same_everywhere() -> None:
    train = commands.open(commands.Config(), split="train")
    assert train.fingerprint == "832f85a2e850bb82331700fc21ff6b386bff07cc6a901df424710653f8220df5"
    assert train.read([0])["text"][0] == "I would like you to make the cellar brighter tomorrow"


def test_no_word_tells_a_class_alone() -> None:
    """Counting words one by one leaves errors: there is something to learn."""
    train, test = (commands.open(commands.Config(), split=split) for split in ("train", "test"))
    texts, labels = (train.read(range(len(train)))[name] for name in ("text", "label"))
    words = {word for text in texts for word in text.split()}
    classes = {
        word: {label for text, label in zip(texts, labels, strict=True) if word in text.split()} for word in words
    }
    assert sum(len(each) > 1 for each in classes.values()) > len(words) / 2
    assert all(text not in set(texts) for text in test.read(range(len(test)))["text"])
