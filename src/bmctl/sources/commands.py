"""Short commands to a machine at home, put together from a small grammar: 6 classes, 480 train, 204 val, 480 test.

Made on the spot, the same everywhere; no text is in two splits. Single words do not tell the classes apart: one turns
on lamps as well as radios, and what is said beside a command is often of another class.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Literal

from bmctl.core.columns import Class, Column, Text
from bmctl.schema import Strict
from bmctl.sources.samples import ArraySamples

INPUT = "text"
PER_CLASS = {"train": 80, "val": 34, "test": 80}

_WORDS: Mapping[str, tuple[str, ...]] = {
    "please": ("", "please", "could you", "I would like you to", "hey", "well"),
    "room": ("kitchen", "bedroom", "hall", "bathroom", "cellar", "study", "garden"),
    "lamp": ("lamp", "light", "ceiling light", "reading lamp", "chandelier"),
    "player": ("radio", "record player", "loudspeaker", "jazz channel", "playlist"),
    "town": ("Oslo", "Lisbon", "Turin", "Ghent", "Gdansk", "Porto", "Graz", "Leeds"),
    "day": ("today", "tomorrow", "on Monday", "on Friday", "at the weekend", "tonight"),
    "minutes": ("five minutes", "ten minutes", "half an hour", "an hour", "ninety seconds"),
    "food": ("bread", "milk", "apples", "rice", "lentils", "butter", "coffee", "oats"),
    "much": ("some", "two packs of", "enough", "a little", "more"),
    "how": ("on", "off", "up", "down"),
}
_GRAMMAR: Mapping[str, tuple[str, ...]] = {
    "light": ("{please} turn {how} the {lamp} in the {room}", "{please} make the {room} brighter {day}",
              "is the {lamp} in the {room} still on", "{please} dim the {lamp} for {minutes}"),
    "music": ("{please} turn {how} the {player} in the {room}", "{please} play something from {town} in the {room}",
              "is the {player} in the {room} still on", "{please} put on the {player} for {minutes}"),
    "shopping": ("{please} put {much} {food} on the list", "{please} order {much} {food} {day}",
                 "do we have {much} {food} in the {room}", "is there still {food} in the {room}"),
    "timer": ("{please} wake me in {minutes}", "{please} tell me when {minutes} are over",
              "{please} remind me of the {food} in {minutes}", "{please} count down {minutes} in the {room}"),
    "travel": ("{please} find a train to {town} {day}", "when does the bus to {town} leave {day}",
               "how do I get to {town} {day} in {minutes}", "{please} book a seat to {town} {day}"),
    "weather": ("will it rain in {town} {day}", "{please} tell me if it is cold in {town} {day}",
                "how warm is it going to get in {town} {day}", "do I need a coat in the {room} {day}"),
}  # fmt: skip
_ASIDES = (
    "", "", "the {player} is too loud", "the {lamp} in the {room} went out", "we are out of {food}",
    "it is cold in {town} {day}", "the train from {town} is late", "I have to leave in {minutes}",
    "somebody turned {how} the {player}", "they want {food} {day}",
)  # fmt: skip
CLASS_NAMES = tuple(_GRAMMAR)


class Config(Strict):
    kind: Literal["commands"] = "commands"


def open(config: Config, *, split: str) -> ArraySamples:
    """The samples of `train`, `val` or `test`: columns `text` and `label`; neighbours are of different classes."""
    return _load(split)


@lru_cache
def _load(split: str) -> ArraySamples:
    import hashlib

    import numpy as np

    start = {"train": 0, "val": PER_CLASS["train"], "test": PER_CLASS["train"] + PER_CLASS["val"]}[split]
    chosen = [_texts(name)[start : start + PER_CLASS[split]] for name in CLASS_NAMES]
    texts = np.array([text for row in zip(*chosen, strict=True) for text in row], object)
    labels = np.arange(len(texts)) % len(CLASS_NAMES)
    digest = hashlib.sha256("\n".join(texts).encode())
    for array in (texts, labels):
        array.flags.writeable = False
    columns: dict[str, Column] = {"text": Text(), "label": Class(CLASS_NAMES)}
    return ArraySamples(columns, {"text": texts, "label": labels}, digest.hexdigest())


def _texts(name: str) -> list[str]:
    """As many texts of a class as all splits need, each once."""
    from itertools import count

    found: dict[str, None] = {}
    for number in count():
        if len(found) == sum(PER_CLASS.values()):
            return list(found)
        luck = _luck(f"{name} {number}")
        command, aside = _filled(_GRAMMAR[name], luck), _filled(_ASIDES, luck)
        parts = [command, aside] if next(luck) % 2 else [aside, command]
        found[", ".join(part for part in parts if part)] = None
    raise AssertionError


def _luck(key: str) -> Iterator[int]:
    """Numbers that a text decides."""
    import hashlib

    return iter(hashlib.sha256(key.encode()).digest())


def _filled(templates: Sequence[str], luck: Iterator[int]) -> str:
    text = templates[next(luck) % len(templates)]
    for name, words in _WORDS.items():
        if f"{{{name}}}" in text:
            text = text.replace(f"{{{name}}}", words[next(luck) % len(words)])
    return " ".join(text.split())
