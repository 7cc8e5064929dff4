"""Tokenizers that are brought or trained, and texts that are encoded by them; nothing is fetched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from bmctl.core.columns import Text
from bmctl.errors import DataError, PackageError, RecipeError
from bmctl.inputs import Resolved, text
from bmctl.inputs.text import tokens
from bmctl.sources.samples import ArraySamples

WORDS = ["ship", "grain", "wheat", "Crude", "oil", "barrel", "trade", "money", "bank", "rate", "élan", "naïve"]
TEXTS = [" ".join(WORDS[(start * step) % 12] for start in range(3 + step)) + f" no. {step}" for step in range(40)]


class Examples:
    """Training texts."""

    columns: Mapping[str, Any] = {"text": Text()}
    in_memory = True

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts

    def __len__(self) -> int:
        return len(self.texts)

    def read(self, most: int | None = None) -> dict[str, list[str]]:
        return {"text": self.texts[:most]}


def resolve(published: Mapping[str, Any] | None = None, texts: list[str] = TEXTS, **asked: Any) -> Resolved:
    found = text.resolve(text.Config.model_validate(asked), Examples(texts), published=published or {})
    return Resolved(*found)


def written(texts: list[str] = TEXTS, published: Mapping[str, Any] | None = None, **asked: Any) -> Resolved:
    """As for a task that writes texts."""
    config = text.Config.model_validate(asked)
    return Resolved(*text.resolve(config, Examples(texts), published=published or {}, writes=True))


def decoded(given: Resolved, ids: np.ndarray) -> str:
    tokenizer: Tokenizer = Tokenizer.from_str(given.files["tokenizer.json"].decode())
    return tokenizer.decode(ids.tolist())


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_a_trained_tokenizer_gives_texts_back(kind: str) -> None:
    given = resolve(tokenizer={"kind": kind, "lowercase": False})
    found = text.encode({"text": TEXTS[3:5]}, given=given)
    row, mask = found["input_ids"][0], found["attention_mask"][0]
    assert (row[0], row[mask.sum() - 1]) == (2, 3)
    assert decoded(given, row[mask == 1]).strip().replace(" .", ".") in (TEXTS[3], TEXTS[3].replace("é", "e"))
    lower = resolve(tokenizer={"kind": kind})
    same = text.encode({"text": ["CRUDE Oil", "crude oil"]}, given=lower)["input_ids"]
    assert np.array_equal(same[0], same[1])


SCRIPT = """
import hashlib, json, sys
from bmctl.inputs.text import TokenizerConfig
from bmctl.inputs.text.trained import train
texts = [f"{a}{b} {b}{c} {c}" for a in "abcdefgh" for b in "ijklmnop" for c in "qrstuvw"]
for kind in ("wordpiece", "bpe"):
    made = train(texts, config=TokenizerConfig(kind=kind, vocab_size=400))
    print(hashlib.sha256(made.encode()).hexdigest())
"""


def test_training_is_the_same_in_every_process() -> None:
    """The trainer's own hashes are seeded at random: ties must not go by them."""
    env = os.environ | {"PYTHONHASHSEED": "random"}
    found = {
        subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, check=True).stdout
        for _ in range(3)
    }
    assert len(found) == 1


def test_words_that_look_like_pieces_are_no_special_tokens() -> None:
    given = resolve()
    assert decoded(given, text.encode({"text": ["##s #s"]}, given=given)["input_ids"][0]) != "ss"
    known = json.loads(given.files["tokenizer.json"])["added_tokens"]
    assert [each["content"] for each in known] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def test_padding_goes_to_a_multiple_of_8_and_no_further_than_the_model() -> None:
    given = resolve(max_tokens=20)
    assert given.spec.max_tokens == 20
    short, long = "oil", " ".join(["oil"] * 50)
    for texts, length in (([short], 8), ([short, "oil " * 9], 16), ([short, long], 20)):
        found = text.encode({"text": texts}, given=given)
        assert found["input_ids"].shape == found["attention_mask"].shape == (len(texts), length)
        assert found["attention_mask"][0].tolist() == [1] * 3 + [0] * (length - 3)
        assert (found["input_ids"][0, 3:] == given.spec.pad_id).all()
    assert found["input_ids"][1, -1] == 3  # what is cut off still ends as texts do


def test_fields_are_as_the_model_takes_them() -> None:
    given = resolve()
    fields = {name: torch.from_numpy(array) for name, array in text.encode({"text": TEXTS}, given=given).items()}
    made = text.finish(fields, given=given)
    assert [(name, str(made[name].dtype)) for name in made] == [
        (spec.name, f"torch.{spec.dtype}") for spec in text.specs(given.spec)
    ]
    assert int(made["input_ids"].max()) < text.told(given)["vocab_size"]


def test_texts_stay_whole_as_far_as_the_model_goes() -> None:
    lengths = [len("oil " * 12), *[1] * 99]
    texts = ["oil " * 60 if length > 1 else "oil" for length in lengths]
    assert resolve(texts=[*texts, *texts]).spec.max_tokens == 64
    assert resolve(texts=["oil"] * 300 + ["oil " * 60]).spec.max_tokens == 8
    assert resolve(texts=["oil " * 900] * 5).spec.max_tokens == 512
    with pytest.raises(RecipeError, match=r"data\.input\.max_tokens: 40, but the model takes at most 32"):
        resolve({"max_tokens": 32}, max_tokens=40)


def publish(folder: Path) -> dict[str, Any]:
    """A tokenizer as its owner would have saved it, with lengths of its own."""
    tokenizer = Tokenizer.from_str(resolve().files["tokenizer.json"].decode())
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=99)
    tokenizer.save(str(folder / "tokenizer.json"))
    return {"files": {"tokenizer.json": str(folder / "tokenizer.json")}, "max_tokens": 32, "pad_id": 0}


def test_the_models_own_tokenizer(tmp_path: Path) -> None:
    published = publish(tmp_path)
    given, own = resolve(published), resolve()
    assert (given.spec.max_tokens, given.spec.vocab_size, given.files) == (32, own.spec.vocab_size, own.files)
    assert resolve(published, texts=[]).spec.max_tokens == 32
    with pytest.raises(RecipeError, match=r"data\.input\.tokenizer: the model brings its own"):
        resolve(published, tokenizer={"kind": "bpe"})
    with pytest.raises(RecipeError, match=r"brings no tokenizer\.json"):
        resolve({"files": {}, "vocab_size": 30522})
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(PackageError, match=r"tokenizer\.json: no tokenizer"):
        resolve(published)


# -- once for all -----------------------------------------------------------------------------------


def samples(texts: list[str] = TEXTS) -> ArraySamples:
    return ArraySamples({"text": Text()}, {"text": np.array(texts, object)}, "print")


@pytest.mark.parametrize("kept", [False, True])
def test_texts_are_encoded_once_and_give_the_same(tmp_path: Path, kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    given, folder = resolve(max_tokens=16), tmp_path / "made" if kept else None
    prepared = text.prepare(samples(), given=given, folder=folder)
    if kept:  # the second time nothing is encoded
        monkeypatch.setattr(tokens, "_all", None)
        prepared = text.prepare(samples(), given=given, folder=folder)
        assert isinstance(prepared.ids, np.memmap)
    expected = text.encode({"text": [TEXTS[7], TEXTS[0], TEXTS[39]]}, given=given)
    monkeypatch.setattr(tokens, "_of", None)
    found = text.encode(prepared.read([7, 0, 39]), given=given)
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    (again,) = prepared.read_each([[7, 0, 39]])
    assert [row.tolist() for row in again["text"]] == [row.tolist() for row in prepared.read([7, 0, 39])["text"]]
    assert len(prepared) == 40
    assert prepared.identities([3]) == samples().identities([3])


def test_another_tokenizer_or_length_is_encoded_anew(tmp_path: Path) -> None:
    for given in (resolve(max_tokens=16), resolve(max_tokens=8), resolve(max_tokens=8, tokenizer={"kind": "bpe"})):
        prepared = text.prepare(samples(), given=given, folder=tmp_path)
        expected = text.encode({"text": TEXTS[:5]}, given=given)["input_ids"]
        assert np.array_equal(text.encode(prepared.read(range(5)), given=given)["input_ids"], expected)
    assert len(list(tmp_path.glob("*.ids.npy"))) == 3
    assert not list(tmp_path.glob(".*"))


def test_threads_of_tokenizers_are_off_after_encoding() -> None:
    text.prepare(samples(), given=resolve(), folder=None)
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"


# -- what infer is pointed at -----------------------------------------------------------------------


def asked(source: str | Path, **options: Any) -> tuple[list[str], np.ndarray, list[str]]:
    notes: list[str] = []
    found = text.requests(
        source, given=resolve(), batch_size=2, emit=lambda event: notes.append(str(event["text"])), **options
    )
    batches = list(found.batches)
    names = [name for batch in batches for name in batch.names]
    assert len(names) == found.num_samples
    assert all(batch.fields["input_ids"].dtype == np.int64 for batch in batches)
    return names, batches[0].fields["input_ids"][0], notes


def test_lines_tables_and_texts_are_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("crude oil\nwheat\nship grain\n")
    (tmp_path / "a.jsonl").write_text('{"text": "crude oil"}\n{"text": "wheat"}\n')
    (tmp_path / "a.csv").write_text('id,text\n1,"crude oil"\n')
    first = asked("crude oil")[1]
    for source, names in (
        (tmp_path / "a.txt", ["a.txt:1", "a.txt:2", "a.txt:3"]),
        (str(tmp_path / "a.jsonl"), ["a.jsonl:1", "a.jsonl:2"]),
        (tmp_path / "a.csv", ["a.csv:2"]),
        ("crude \n oil", ["crude oil"]),
        ("x" * 5000, ["x" * 57 + "..."]),
        ("either/or, he said", ["either/or, he said"]),
    ):
        found = asked(source)
        assert found[0] == names
        if "x" * 9 not in names[0] and "/" not in names[0]:
            np.testing.assert_array_equal(found[1], first)


def test_a_path_that_exists_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("crude oil").write_text("wheat\n")
    assert asked("crude oil")[0] == ["crude oil:1"]


@pytest.mark.parametrize("source", ["gone.txt", "gone.csv", "folder/gone", "gone.jsonl.gz"])
def test_what_looks_like_a_file_must_be_one(source: str) -> None:
    with pytest.raises(DataError, match="there is no file"):
        asked(source)


def test_texts_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("crude oil\n \nwheat\n\n")
    with pytest.raises(DataError, match=r"no text in a\.txt:2, a\.txt:4"):
        asked(tmp_path / "a.txt")
    names, _, notes = asked(tmp_path / "a.txt", on_bad="skip")
    assert (names, len(notes)) == (["a.txt:1", "a.txt:3"], 1)
    (tmp_path / "a.txt").write_text("\n \n")
    with pytest.raises(DataError, match="there is no text in it"):
        asked(tmp_path / "a.txt", on_bad="skip")
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(DataError, match="is empty"):
        asked(tmp_path / "a.txt")
    with pytest.raises(DataError, match="is a folder"):
        asked(tmp_path)


def test_bytes_that_are_no_utf8(tmp_path: Path) -> None:
    """As Python hands them over: in names of files they come out as \\xNN, texts are refused."""
    (tmp_path / "caf\udce9.txt").write_text("crude oil\n")
    assert asked(tmp_path / "caf\udce9.txt")[0] == ["caf\\xe9.txt:1"]
    with pytest.raises(DataError, match=r"the text 'caf\\udce9 au lait' is not UTF-8"):
        asked("caf\udce9 au lait")


def test_arrays_of_strings_are_texts() -> None:
    given = resolve()
    assert text.unprepared({"x": np.array(["a", "b"])}, given=given, name="a.npz") == {"text": ["a", "b"]}
    assert text.unprepared(text.encode({"text": TEXTS}, given=given), given=given, name="a.npz") is None


# -- texts that are written -------------------------------------------------------------------------

AWKWARD = [
    " two  spaces\tand\r\nlines \n\n", "É e\u0301 ﬁ 中文 🙂", "[CLS] [PAD] [SEP]", "\u200d\ufeff\x00\x7f", " ",
    "NO lowercase",
]  # fmt: skip


@pytest.mark.parametrize("awkward", AWKWARD)
def test_a_text_that_is_written_comes_back_byte_for_byte(awkward: str) -> None:
    given = written()
    found = text.encode({"text": [awkward]}, given=given)
    ids = found["input_ids"][0][found["attention_mask"][0] == 1]
    assert ids[0] == given.spec.begin_id
    assert given.spec.end_id not in ids
    assert not {given.spec.begin_id, given.spec.pad_id} & set(ids[1:].tolist()), (
        "names of tokens are text like any other"
    )
    assert text.decode(ids.tolist(), given=given) == awkward
    assert text.decode([*ids.tolist(), given.spec.end_id, given.spec.pad_id], given=given) == awkward


def test_texts_that_are_written_are_whole_or_refused() -> None:
    given = written()
    longest = max(len(row) for row in text.encode({"text": TEXTS}, given=given)["input_ids"])
    assert given.spec.max_tokens > longest, "others may be a little longer"
    short = written(max_tokens=8)
    with pytest.raises(DataError, match=r"a text has \d+ tokens, and the model takes 8"):
        text.encode({"text": TEXTS}, given=short)
    samples = ArraySamples({"text": Text()}, {"text": np.array(TEXTS, object)}, "f")
    with pytest.raises(DataError, match="and the model takes 8"):
        text.prepare(samples, given=short, folder=None)


@pytest.mark.parametrize(
    ("tokenizer", "pattern"),
    [({"kind": "wordpiece"}, "kind: wordpiece loses spaces"), ({"lowercase": True}, "lowercase: True loses capitals")],
)
def test_a_tokenizer_that_loses_something_is_refused_for_writing(tokenizer: dict[str, Any], pattern: str) -> None:
    with pytest.raises(RecipeError, match=pattern):
        written(tokenizer=tokenizer)


def test_a_publishers_tokenizer_gets_a_token_before_texts_and_none_after(tmp_path: Path) -> None:
    """As GPT-2's, which has one token for both; and where config.json says which, they are those."""
    own = json.loads(written().files["tokenizer.json"])
    own["post_processor"] = None
    own["model"]["vocab"]["<|endoftext|>"] = len(own["model"]["vocab"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(own))
    published = {"files": {"tokenizer.json": str(tmp_path / "tokenizer.json")}, "vocab_size": 900, "pad_id": 0}
    given = written(published=published)
    assert given.spec.end_id == 3 and given.spec.begin_id == 2, "[SEP] and [CLS]"
    said = written(published=published | {"begin_id": 40, "end_id": 41})
    ids = text.encode({"text": ["Crude oil"]}, given=said)["input_ids"][0].tolist()
    assert ids[0] == 40 and 41 not in ids
    assert text.decode(ids, given=said) == "Crude oil"
