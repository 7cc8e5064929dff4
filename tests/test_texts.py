"""Texts the whole way, small: trained, compressed, exported with free lengths, inferred."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from bmctl.cli import main

SHORT = [
    "train.epochs=2", "train.batch_size=16", "model.args={width: 32, depth: 2, heads: 2}", "data.train.limit=240",
    "data.val.limit=60", "data.test.limit=60", "export.measure.rounds=3", "export.measure.batch_size=4",
    "export.backends=[onnxruntime]", "export.axes.batch={min: 1, opt: 4, max: 16}", "gates={}",
    "compress=[{method: structured, ratio: 0.25}, {method: svd, ratio: 0.8, min_weights: 1000}, "
    "{method: ptq, samples: 32}]",
]  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("texts") / "run"
    flags = [flag for override in SHORT for flag in ("--set", override)]
    assert main(["run", "--recipe", "commands", "--output", str(output), "--quiet", *flags]) == 0
    return output


def infer(whole: Path, data: str, capsys: pytest.CaptureFixture[str], *flags: str) -> list[dict]:
    assert main(["infer", data, "--model", str(whole), "--quiet", *flags]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_the_tokenizer_goes_along(whole: Path) -> None:
    for name in ("packages/00-train", "packages/01-structured", "packages/02-svd", "packages/03-ptq"):
        manifest = json.loads((whole / name / "manifest.json").read_text())
        assert manifest["input"]["kind"] == "text"
        assert "files/tokenizer.json" in manifest["files"]
    rows = {row["name"]: row for row in json.loads((whole / "report.json").read_text())["rows"]}
    assert rows["packages/00-train"]["test"]["value"] > 0.5
    assert rows["deploy/onnxruntime"]["test"]["num_samples"] == 60
    assert rows["packages/03-ptq"]["size_bytes"] < rows["packages/00-train"]["size_bytes"]


def test_the_graph_takes_any_length(whole: Path) -> None:
    import onnx

    (path,) = (whole / "packages/03-ptq").rglob("*.onnx")
    inputs = {each.name: each.type.tensor_type for each in onnx.load(path).graph.input}
    assert list(inputs) == ["input_ids", "attention_mask"]
    for each in inputs.values():
        assert [dim.dim_param for dim in each.shape.dim] == ["batch", "tokens"]
        assert each.elem_type == onnx.TensorProto.INT64


def test_eager_and_artifact_agree_on_texts(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["please turn on the lamp in the hall", "wake me in ten minutes", "will it rain in Oslo"]
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text"], *([text] for text in texts)])
    found = infer(whole, str(tmp_path / "a.csv"), capsys)
    assert [one["input"] for one in found] == ["a.csv:2", "a.csv:3", "a.csv:4"]
    (alone,) = infer(whole, texts[0], capsys)
    assert alone["input"] == texts[0]
    assert alone["class_name"] == found[0]["class_name"]
    eager = infer(whole / "packages/02-svd", str(tmp_path / "a.csv"), capsys, "--backend", "eager")
    assert all(abs(one["score"] - other["score"]) < 0.1 for one, other in zip(found, eager, strict=True))


def test_a_file_that_is_not_there(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["infer", "gone.txt", "--model", str(whole)]) == 4
    assert "there is no file gone.txt" in capsys.readouterr().err


def test_more_tokens_than_the_model_takes_are_no_span(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    axes = "export.axes.tokens={min: 1, opt: 8, max: 999}"
    assert main(["export", str(whole), "--backend", "onnxruntime", "--overwrite", "--set", axes]) == 3
    assert "export.axes.tokens.max: 999, but the model takes at most" in capsys.readouterr().err


def test_the_exporter_has_nothing_to_say_of_axes(whole: Path) -> None:
    assert json.loads((whole / "packages/03-ptq/manifest.json").read_text())["notes"] == []
