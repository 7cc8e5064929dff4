"""Rows of a table the whole way, small: a number predicted, compressed, exported, inferred in its own unit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bmctl.cli import main

CITIES = ("Bonn", "Oslo", "Rome")
SHORT = [
    "data.source.value=price", "train.epochs=6", "train.batch_size=32", "train.optimizer.lr=1e-2",
    "model.args={hidden: [32, 16], embedding: 3}", "export.measure.rounds=3", "export.measure.batch_size=4",
    "export.backends=[onnxruntime, openvino]", "export.axes.batch={min: 1, opt: 4, max: 16}", "gates={}",
    "compress=[{method: magnitude, sparsity: 0.2}, {method: ptq}]", "infer=null",
]  # fmt: skip


def price(size: float, city: str) -> float:
    return 1000 * size + 50_000 * CITIES.index(city)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tables")
    rng = np.random.default_rng(0)
    rows = [(round(float(size), 1), CITIES[i % 3]) for i, size in enumerate(rng.uniform(20, 200, 900))]
    body = "".join(f"{size},{city},{price(size, city)}\n" for size, city in rows)
    (folder / "homes.csv").write_text("size,city,price\n" + body)
    overrides = [f"data.source.path={folder / 'homes.csv'}", "data.source.drop=[]", *SHORT]
    flags = [flag for override in overrides for flag in ("--set", override)]
    assert main(["run", "--recipe", "diamonds", "--output", str(folder / "run"), "--quiet", *flags]) == 0
    return folder / "run"


def test_every_artifact_is_judged_in_the_values_own_unit(whole: Path) -> None:
    rows = {row["name"]: row for row in json.loads((whole / "report.json").read_text())["rows"]}
    for name in ("packages/00-train", "deploy/onnxruntime", "deploy/openvino"):
        test = rows[name]["test"]
        assert (test["name"], test["better"]) == ("rmse", "lower")
        assert test["trivial"] > 50_000
        assert test["value"] < 15_000


def test_a_row_is_enough_to_predict(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["infer", '{"size": 100, "city": "Oslo"}', "--model", str(whole), "--quiet"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["input"] == "row"
    assert abs(found["value"] - 150_000) < 20_000
    assert main(["infer", '{"size": "wide", "city": "Oslo"}', "--model", str(whole)]) == 4
    assert "size is 'wide', expected a number" in capsys.readouterr().err


def test_bad_rows_are_left_out_where_that_is_asked_for(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "new.csv").write_text("city,size\nBonn,50\nRome,wide\n")
    infer = ["infer", str(tmp_path / "new.csv"), "--model", str(whole)]
    assert main(infer) == 4
    assert "leave them out with --on-bad skip" in capsys.readouterr().err
    assert main([*infer, "--on-bad", "skip"]) == 0
    found = capsys.readouterr()
    assert [json.loads(line)["input"] for line in found.out.splitlines()] == ["new.csv:2"]
    assert "left out: new.csv:3: size is 'wide'" in found.err
    assert main([*infer, "--on-bad", "ignore"]) == 2


def test_predictions_of_a_table_as_csv(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "new.csv").write_text("city,size\nBonn,50\nRome,150\n")
    assert main(["infer", str(tmp_path / "new.csv"), "--model", str(whole), "--quiet", "--format", "csv"]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header == "input,value"
    assert [line.split(",")[0] for line in lines] == ["new.csv:2", "new.csv:3"]


def test_another_task_on_such_data_is_refused_in_words(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = whole.parent / "homes.csv"
    sets = [f"data.source.path={table}", "data.source.value=price", "data.source.drop=[]", "task=classify", "gates={}"]
    flags = [flag for one in sets for flag in ("--set", one)]
    assert main(["train", "--recipe", "diamonds", "--output", str(whole.parent / "other"), *flags]) == 4
    assert "its samples have size, city, value, and no label to classify by" in capsys.readouterr().err
