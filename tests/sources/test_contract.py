"""What every source has to hold, over the whole table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bmctl.core.columns import Class, Real
from bmctl.errors import DependencyError
from bmctl.inputs import INPUTS
from bmctl.schema import Strict
from bmctl.sources import SOURCES, digits

from .conftest import SaveImages, write_lines, write_shards
from .test_idx import write

COLUMNS = {
    "image": ("picture", "label"),
    "text": ("text", "label"),
    "tabular": ("size", "label"),
    "observation": ("episode", "seed"),
    "corpus": ("text", "num_bytes"),
}
"""What a sample is seen by, and what a task is told of it."""


@pytest.fixture
def configs(tmp_path: Path, save_images: SaveImages) -> dict[str, Strict]:
    paths = [path for name in ("a", "b") for path in save_images(tmp_path / "data" / name, 12)]
    lines = [f"{path},{path.parent.name}" for path in paths]
    (tmp_path / "list.csv").write_text("\n".join(["path,label", *lines]))
    for prefix in ("train", "t10k"):
        write(tmp_path / f"{prefix}-images-idx3-ubyte", np.random.default_rng(0).integers(0, 256, (30, 5, 5), np.uint8))
        write(tmp_path / f"{prefix}-labels-idx1-ubyte", np.arange(30, dtype=np.uint8) % 3)
    texts = [f"the {index}th text\t{'ab'[index % 2]}" for index in range(40)]
    (tmp_path / "texts.tsv").write_text("\n".join(["text\tlabel", *texts]))
    rows = [f"{index % 9},{'ab'[index % 2]}" for index in range(40)]
    (tmp_path / "rows.csv").write_text("\n".join(["size,kind", *rows]))
    fields = {
        "tabular": {"path": str(tmp_path / "rows.csv"), "label": "kind"},
        "corpus": {"path": str(tmp_path / "texts.tsv"), "piece": 16, "val": 0.1, "test": 0.1},
        "table": {"path": str(tmp_path / "texts.tsv")},
        "gymnasium": {"env": "CartPole-v1"},
        "folder": {"root": str(tmp_path / "data")},
        "csv": {"path": str(tmp_path / "list.csv")},
        "idx": {"root": str(tmp_path)},
        "webdataset": {"shards": str(write_shards(tmp_path / "tars", files=2, samples=15))},
        "stream": {"path": str(write_lines(tmp_path / "part.jsonl.gz", count=30))},
    }
    return {
        kind: source.Config.model_validate({"kind": kind, **fields.get(kind, {})}) for kind, source in SOURCES.items()
    }


@pytest.mark.parametrize("kind", SOURCES)
def test_samples_are_the_same_every_time_and_fit_together(configs: dict[str, Strict], kind: str) -> None:
    seen = set()
    for split in ("train", "val", "test"):
        samples = SOURCES[kind].open(configs[kind], split=split)
        again = SOURCES[kind].open(configs[kind], split=split)
        assert samples.fingerprint == again.fingerprint
        assert len(samples) > 0
        last = len(samples) - 1
        records = samples.read([last, 0, last])
        what, *others = samples.columns
        assert (what, others[0]) == COLUMNS[kind if kind == "corpus" else SOURCES[kind].INPUT]
        assert list(records) == list(samples.columns)
        targets = samples.read(range(len(samples)), only=others)
        assert list(targets) == others
        for name in others:
            column = samples.columns[name]
            assert targets[name].dtype == (np.float32 if isinstance(column, Real) else np.int64)
            assert targets[name][[last, 0, last]].tolist() == records[name].tolist()
            if not isinstance(column, Real):
                most = len(column.names) if isinstance(column, Class) else column.size
                assert targets[name].min() >= 0 and targets[name].max() < most
        values = [np.asarray(value) for value in records[what]]
        if what == "picture":
            assert all(image.dtype == np.uint8 and image.ndim in (2, 3) for image in values)
        elif what == "text":
            assert all(isinstance(text, str) for text in records[what])
        else:
            assert all(value.dtype.kind in "if" for value in values)
        assert np.array_equal(values[0], values[2])
        assert np.array_equal(values[0], samples.read([last])[what][0])
        seen.add(samples.fingerprint)
    assert len(seen) == 3


@pytest.mark.parametrize("kind", SOURCES)
def test_reading_step_by_step_gives_what_reading_gives(configs: dict[str, Strict], kind: str) -> None:
    samples = SOURCES[kind].open(configs[kind], split="train")
    steps = [[0, 1, 2], [], [5, 7]]
    for step, found in zip(steps, samples.read_each(steps), strict=True):
        expected = samples.read(step)
        what, target, *_ = samples.columns
        assert list(found[target]) == list(expected[target])
        pairs = zip(found[what], expected[what], strict=True)
        assert all(np.array_equal(np.asarray(one), np.asarray(other)) for one, other in pairs)


@pytest.mark.parametrize("kind", SOURCES)
def test_equal_samples_are_told_by_their_identities(configs: dict[str, Strict], kind: str) -> None:
    samples = SOURCES[kind].open(configs[kind], split="train")
    again = SOURCES[kind].open(configs[kind], split="train")
    identities = samples.identities([3, 0, 4])
    assert len(set(identities)) == 3
    assert again.identities([4, 3]) == [identities[2], identities[0]]
    assert len(samples.sketches()) == len(samples)
    assert samples.sketches().dtype == np.uint64
    assert samples.name(0) != samples.name(1)


@pytest.mark.parametrize("kind", SOURCES)
def test_its_config_names_it(kind: str) -> None:
    assert SOURCES[kind].Config.model_fields["kind"].default == kind
    assert SOURCES[kind].INPUT in INPUTS


def test_digits_are_about_1800_in_known_shares() -> None:
    sizes = [len(digits.open(digits.Config(), split=split)) for split in ("train", "val", "test")]
    assert sum(sizes) == 1797
    assert 0.68 < sizes[0] / 1797 < 0.72
    assert digits.open(digits.Config(), split="test").arrays["picture"].max() == 255


def test_digits_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    digits._load.cache_clear()
    try:
        with pytest.raises(DependencyError) as caught:
            digits.open(digits.Config(), split="train")
        assert caught.value.hint == "pip install 'bmctl[sklearn]'"
    finally:
        digits._load.cache_clear()
