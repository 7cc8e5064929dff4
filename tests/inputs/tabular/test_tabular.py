"""Rows of a table, from what a source or a user gives to what a model takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from bmctl.core.columns import Class, Real, Text
from bmctl.errors import DataError
from bmctl.inputs import Resolved, tabular

COLUMNS = {"size": Real(), "rooms": Real(), "city": Text(), "kind": Class(("flat", "house"))}
RECORDS: dict[str, Any] = {
    "size": np.array([40, 60, 80, 100], np.float32),
    "rooms": np.array([1, np.nan, 3, 4], np.float32),
    "city": np.array(["Oslo", "Bonn", "", "Bonn"], object),
    "kind": np.array([0, 1, 1, 0]),
}


class Examples:
    columns: ClassVar = COLUMNS
    in_memory = True

    def __len__(self) -> int:
        return 4

    def read(self, most: int | None = None) -> dict[str, Any]:
        return RECORDS


@pytest.fixture
def given() -> Resolved:
    return Resolved(*tabular.resolve(tabular.Config(), Examples(), published={}))


def predicted(source: str | Path, given: Resolved, **options: Any) -> tuple[list[str], dict[str, np.ndarray], list]:
    events: list[dict[str, object]] = []
    found = tabular.requests(source, given=given, batch_size=2, emit=events.append, **options)
    batches = list(found.batches)
    fields = {name: np.concatenate([batch.fields[name] for batch in batches]) for name in batches[0].fields}
    return [name for batch in batches for name in batch.names], fields, events


def test_numbers_are_standardised_missing_ones_flagged_and_words_counted_from_one(given: Resolved) -> None:
    found = tabular.encode(RECORDS, given=given)
    size = (RECORDS["size"] - 70) / np.sqrt(500)
    rooms = (np.array([1, 8 / 3, 3, 4]) - 8 / 3) / np.std([1, 3, 4])
    assert np.allclose(found["numbers"], np.stack([size, rooms, [0, 1, 0, 0]], axis=1), atol=1e-6)
    assert found["categories"].tolist() == [[3, 1], [2, 2], [1, 2], [2, 1]]
    assert tabular.told(given) == {"category_sizes": (4, 3)}


def test_a_column_that_never_changes_is_no_division_by_zero() -> None:
    class Still(Examples):
        columns: ClassVar = {"size": Real()}

        def read(self, most: int | None = None) -> dict[str, Any]:
            return {"size": np.full(4, 7, np.float32)}

    given = Resolved(*tabular.resolve(tabular.Config(), Still(), published={}))
    assert tabular.encode({"size": np.array([7.0, 8.0])}, given=given)["numbers"].tolist() == [[0.0], [1.0]]
    assert [spec.name for spec in tabular.specs(given.spec)] == ["numbers"]


def test_too_many_words_are_names() -> None:
    with pytest.raises(DataError, match="'city' has 3 different values, such as '', 'Bonn', 'Oslo'"):
        tabular.resolve(tabular.Config(max_categories=2), Examples(), published={})


def test_a_row_on_the_command_line_is_read_as_one_of_a_table(given: Resolved, tmp_path: Path) -> None:
    row = {"city": "Bonn", "rooms": None, "size": 60, "kind": "house", "more": [1]}
    names, fields, events = predicted(json.dumps(row), given)
    assert names == ["row"]
    assert events == []
    of_training = tabular.encode({name: values[1:2] for name, values in RECORDS.items()}, given=given)
    for name, array in of_training.items():
        assert np.array_equal(fields[name], array)
    table = tmp_path / "a.csv"
    table.write_text("kind,size,rooms,city\nflat,40,1,Oslo\nhouse,60,NA,Bonn\nhouse,80,3,\n")
    names, fields, _ = predicted(table, given)
    assert names == ["a.csv:2", "a.csv:3", "a.csv:4"]
    assert np.array_equal(fields["categories"], tabular.encode(RECORDS, given=given)["categories"][:3])


def test_words_that_training_never_saw_are_unknown_and_told(given: Resolved) -> None:
    _, fields, events = predicted('{"size": 1, "rooms": 2, "city": "Rome", "kind": "flat"}', given)
    assert fields["categories"].tolist() == [[0, 1]]
    assert [event["text"] for event in events] == ["city: training never saw 'Rome'; read as unknown"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ('{"size": 1', "the row is not JSON"),
        ('{"size": 1}', "the row has no rooms, no city, no kind"),
        ('{"size": "big", "rooms": 2, "city": "Rome", "kind": "flat"}', "size is 'big', expected a number"),
        ('{"size": null, "rooms": 2, "city": "Rome", "kind": "flat"}', "size is missing"),
        ('{"size": [1], "rooms": 2, "city": "Rome", "kind": "flat"}', r"size is \[1\], expected a text or a number"),
    ],
)
def test_bad_rows_are_refused(given: Resolved, row: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        predicted(row, given)


def test_bad_rows_are_named_together_or_left_out(given: Resolved, tmp_path: Path) -> None:
    table = tmp_path / "a.csv"
    table.write_text("kind,size,rooms,city\nflat,,1,Oslo\nhouse,60,2,Bonn\nhouse,wide,3,\n")
    with pytest.raises(DataError, match=r"a\.csv:2: size is missing; a\.csv:4: size is 'wide'"):
        predicted(table, given)
    names, _, events = predicted(table, given, on_bad="skip")
    assert names == ["a.csv:3"]
    assert "left out: a.csv:2" in str(events[0]["text"])


def test_a_number_missing_where_none_was(given: Resolved) -> None:
    with pytest.raises(DataError, match="'size' has no number in 1 of 4 rows"):
        tabular.encode(RECORDS | {"size": np.array([1, 2, np.nan, 4])}, given=given)


def test_arrays_by_the_names_of_columns(given: Resolved) -> None:
    arrays = {name: np.asarray(RECORDS[name], str if name == "city" else None) for name in ("size", "rooms", "city")}
    arrays["kind"] = np.array(["flat", "house", "house", "flat"])
    found = tabular.unprepared(arrays, given=given, name="a.npz")
    assert found is not None
    assert np.array_equal(
        tabular.encode(found, given=given)["categories"], tabular.encode(RECORDS, given=given)["categories"]
    )
    assert tabular.unprepared({"numbers": np.zeros((2, 3), np.float32)}, given=given, name="a.npz") is None
    with pytest.raises(DataError, match=r"'size' is .* expected a vector of numbers"):
        tabular.unprepared(arrays | {"size": np.array(["a"])}, given=given, name="a.npz")
