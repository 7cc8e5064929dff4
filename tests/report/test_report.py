"""A report says what lies in a run's directory: no more, no less, and the right one against the right other."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.core import regression

from bmctl import package, report, store
from bmctl.core import scores
from bmctl.core.evaluation import Evaluation
from bmctl.core.stats import paired_interval, ratio_interval
from bmctl.errors import PackageError
from bmctl.report import numbers, rows
from bmctl.tasks import TASKS, classify

NUMBER = 400
SLOW = tuple(27.0 + 0.1 * i for i in range(15))
FAST = tuple(9.0 + 0.1 * ((7 * i) % 15) for i in range(15))


def classified(hits: np.ndarray) -> Evaluation:
    """Of ten classes; a miss is taken for the next one, and a loss of 0.1 or 2.1."""
    target = np.arange(len(hits)) % 10
    counts = np.stack([target, np.where(hits == 1, target, (target + 1) % 10), 2.1 - 2 * hits], axis=1)
    return Evaluation("classify", counts.astype(np.float64), classify.metrics(counts), 0.1)


class Run:
    """A run's directory, filled piece by piece."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.hits = {"train": np.ones(NUMBER), "ptq": np.ones(NUMBER)}
        self.hits["train"][:40] = 0
        self.hits["ptq"][2:50] = 0

    def package(self, name: str, *, frozen: bool = False, **metrics: Any) -> str:
        folder = self.path / "packages" / name
        content = folder / ("graphs/model.onnx" if frozen else "weights.safetensors")
        content.parent.mkdir(parents=True)
        content.write_bytes(b"w" * (300 if frozen else 1200))
        (folder / "recipe.yaml").write_text("name: r\n")
        manifest = package.Manifest(
            stage=name[3:],
            key=name,
            frozen=frozen,
            notes=metrics.pop("notes", ()),
            metrics=metrics,
            files=store.records(folder),
        )
        store.write_manifest(folder, manifest)
        return store.manifest_hash(folder)

    def artifact(self, name: str, *, of: str, **fields: Any) -> str:
        folder = self.path / "deploy" / name
        folder.mkdir(parents=True)
        parts = {"encoder": b"e" * 100, "model": of.encode()}
        for part, content in parts.items():
            (folder / f"{part}.onnx").write_bytes(content)
        (folder / "files").mkdir()
        (folder / "files" / "model.json").write_bytes(b"j" * 2000)
        (folder / "sample.safetensors").write_bytes(b"s" * 5000)
        files = {file: record.model_dump() for file, record in store.records(folder).items()}
        manifest = {"backend": folder.name, "package": of, "precision": "fp32", "status": "ran", "files": files}
        manifest["parts"] = {part: {"artifact": f"{part}.onnx"} for part in parts}
        (folder / "manifest.json").write_text(json.dumps(manifest | fields))
        return store.manifest_hash(folder)

    def evaluation(self, artifact: str, hits: np.ndarray, *, split: str = "test", data: str = "d") -> None:
        self.file(artifact, classified(hits), split=split, data=data)

    def file(self, artifact: str, found: Evaluation, *, split: str = "test", data: str = "d") -> None:
        key = scores.Key(
            artifact=artifact, backend="b", data=data, split=split, limit=None, task={"kind": found.task}, input={}
        )
        path = scores.path_of(self.path, artifact=artifact, split=split)
        path.parent.mkdir(exist_ok=True)
        path.write_text(scores.pack(found, key=key).model_dump_json())

    def timings(self, *, peak: int | None = None, **artifacts: tuple[tuple[float, ...], str | None]) -> None:
        timed = {
            name.replace("__", "/"): rows.Timing(
                p50_ms=float(np.median(samples)),
                p90_ms=float(np.quantile(samples, 0.9)),
                p99_ms=float(np.quantile(samples, 0.99)),
                samples_ms=samples,
                throughput=64_000 / float(np.median(samples)),
                artifact=artifact,
                peak_memory_bytes=peak,
            )
            for name, (samples, artifact) in artifacts.items()
        }
        found = rows.Measurements(batch_size=64, machine={"processor": "Xeon"}, artifacts=timed)
        (self.path / "measurements.json").write_text(found.model_dump_json())


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "fashion")


@pytest.fixture
def whole(run: Run) -> Run:
    """Trained and quantized, both on two runtimes, and an engine that was not run."""
    train = run.package("00-train", num_params=315_146, macs=31_200_000, size_bytes=1_259_000, precision="fp32")
    ptq = run.package(
        "01-ptq", frozen=True, num_params=80_123, macs=8_200_000, size_bytes=300, notes=("calibrated on 300 samples",)
    )
    for artifact, name in ((train, "train"), (ptq, "ptq")):
        run.evaluation(artifact, run.hits[name])
    hashes = {}
    for backend in ("onnxruntime", "openvino"):
        hashes[f"baseline__{backend}"] = run.artifact(f"baseline/{backend}", of=train)
        hashes[backend] = run.artifact(backend, of=ptq, precision="int8")
        run.evaluation(hashes[f"baseline__{backend}"], run.hits["train"])
        run.evaluation(hashes[backend], run.hits["ptq"])
    run.artifact(
        "tensorrt_rtx", of=ptq, precision="int8", status="built, not run", reason="no GPU", command_elsewhere="bmctl X"
    )
    times = {"baseline__onnxruntime": SLOW, "onnxruntime": tuple(s / 2 for s in SLOW)}
    times |= {"baseline__openvino": FAST, "openvino": tuple(f / 3 for f in FAST)}
    run.timings(**{name: (samples, hashes[name]) for name, samples in times.items()})
    return run


def rows_of(found: rows.Report) -> dict[str, rows.Row]:
    return {row.name: row for row in found.rows}


def test_there_is_one_row_per_package_and_artifact_in_order(whole: Run) -> None:
    found = report.collect(whole.path)
    assert [row.name for row in found.rows] == [
        "packages/00-train",
        "packages/01-ptq",
        "deploy/baseline/onnxruntime",
        "deploy/onnxruntime",
        "deploy/baseline/openvino",
        "deploy/openvino",
        "deploy/tensorrt_rtx",
    ]
    assert [row.is_original for row in found.rows] == [True, False, True, False, True, False, False]


def test_sizes_and_counts_are_of_what_computes(whole: Run) -> None:
    found = rows_of(report.collect(whole.path))
    assert found["packages/00-train"].size_bytes == 1_259_000  # as the manifest records it
    assert found["packages/01-ptq"].size_bytes == 300
    assert found["deploy/openvino"].size_bytes == 100 + 64  # of both parts, not of the sample
    assert found["deploy/openvino"].num_params == 80_123
    assert found["deploy/baseline/openvino"].macs == 31_200_000


def test_metrics_carry_their_interval_and_the_trivial_one(whole: Run) -> None:
    metric = rows_of(report.collect(whole.path))["packages/00-train"].test
    assert metric is not None
    assert (metric.name, metric.value, metric.num_samples, metric.trivial) == ("accuracy", 0.9, NUMBER, 0.1)
    assert metric.low == pytest.approx(0.8668, abs=1e-3)
    assert metric.high == pytest.approx(0.9258, abs=1e-3)


def test_a_drop_is_paired_with_the_first_package(whole: Run) -> None:
    found = rows_of(report.collect(whole.path))
    assert found["packages/00-train"].drop is None
    drop = found["deploy/openvino"].drop
    assert drop is not None
    assert drop.value == pytest.approx(0.02)  # 40 wrong before, 48 wrong now
    assert (drop.low, drop.high) == paired_interval(whole.hits["train"], whole.hits["ptq"])
    assert (drop.versus, drop.split) == ("packages/00-train", "test")
    assert found["deploy/baseline/openvino"].drop.value == 0


def test_speedups_are_against_the_original_in_the_same_rounds(whole: Run) -> None:
    found = rows_of(report.collect(whole.path))
    openvino, onnxruntime = found["deploy/openvino"], found["deploy/onnxruntime"]
    assert openvino.speedup.value == pytest.approx(3.0)
    assert openvino.speedup.versus == "deploy/baseline/openvino"
    over = openvino.speedup_over_onnxruntime
    assert over is not None
    assert over.value == pytest.approx(np.median(SLOW) / (np.median(FAST) / 3))
    assert (over.low, over.high) == pytest.approx(ratio_interval(SLOW, [f / 3 for f in FAST]))
    assert onnxruntime.speedup == onnxruntime.speedup_over_onnxruntime
    assert found["deploy/baseline/openvino"].speedup is None
    assert found["deploy/baseline/onnxruntime"].speedup_over_onnxruntime is None
    assert openvino.latency == rows.LatencyRow(
        pytest.approx(np.median(FAST) / 3),
        pytest.approx(np.quantile(FAST, 0.9) / 3),
        pytest.approx(np.quantile(FAST, 0.99) / 3),
        num_rounds=15,
    )
    assert openvino.samples_per_s == pytest.approx(64_000 / np.median(FAST) * 3)


def test_what_was_not_run_says_so(whole: Run) -> None:
    engine = rows_of(report.collect(whole.path))["deploy/tensorrt_rtx"]
    assert (engine.status, engine.reason, engine.command_elsewhere) == ("built, not run", "no GPU", "bmctl X")
    assert engine.test is None
    assert engine.latency is None


def test_an_empty_run_has_an_empty_report(tmp_path: Path) -> None:
    found = report.collect(tmp_path)
    assert found.rows == ()
    assert "How to read" in report.to_markdown(found)


def test_manifest_metrics_stand_in_where_no_scores_were_kept(run: Run) -> None:
    said = {"metric": "rmse", "value": 0.8, "low": 0.75, "high": 0.84, "baseline": 0.1, "better": "lower", "unit": "m"}
    run.package("00-train", val=said)
    score = report.collect(run.path).rows[0].val
    assert score == rows.Score("rmse", 0.8, 0.75, 0.84, None, 0.1, better="lower", unit="m")


def test_validation_is_compared_where_there_is_no_test(run: Run) -> None:
    for name, stage in (("00-train", "train"), ("01-ptq", "ptq")):
        run.evaluation(run.package(name), run.hits[stage], split="val")
    drop = report.collect(run.path).rows[1].drop
    assert drop is not None
    assert drop.split == "val"


def test_other_samples_are_not_compared(run: Run) -> None:
    run.evaluation(run.package("00-train"), run.hits["train"])
    run.evaluation(run.package("01-ptq"), run.hits["ptq"], data="other")
    found = report.collect(run.path)
    assert found.rows[1].drop is None
    assert any("other test samples" in note for note in found.notes)


def test_a_rebuilt_artifact_does_not_inherit_a_speed(run: Run) -> None:
    package_hash = run.package("00-train")
    run.artifact("onnxruntime", of=package_hash)
    run.timings(onnxruntime=(FAST, "0" * 64), openvino=(FAST, None))
    found = report.collect(run.path)
    assert rows_of(found)["deploy/onnxruntime"].latency is None
    assert any("built again" in note for note in found.notes)
    assert any("openvino, which is no longer there" in note for note in found.notes)


def test_rounds_that_differ_in_number_are_not_compared(run: Run) -> None:
    package_hash = run.package("00-train")
    for name in ("onnxruntime", "baseline/onnxruntime"):
        run.artifact(name, of=package_hash)
    run.timings(onnxruntime=(FAST, None), baseline__onnxruntime=(SLOW[:4], None))
    found = report.collect(run.path)
    assert rows_of(found)["deploy/onnxruntime"].speedup is None
    assert any("not timed in the same rounds" in note for note in found.notes)
    assert any("fewer than 6 rounds" in note for note in found.notes)


def test_an_artifact_of_a_package_that_is_gone_is_said(run: Run) -> None:
    run.package("00-train")
    run.artifact("onnxruntime", of="f" * 64)
    assert any("no longer in this run" in note for note in report.collect(run.path).notes)


def test_a_damaged_evaluation_is_left_out_and_said(whole: Run) -> None:
    path = next((whole.path / "evaluations").glob("*.json"))
    path.write_text("{")
    assert any(path.name in note for note in report.collect(whole.path).notes)


@pytest.mark.parametrize(
    "name", ["packages/00-train/manifest.json", "deploy/openvino/manifest.json", "measurements.json"]
)
@pytest.mark.parametrize("text", ["{", "[1]", '{"files": 3}', ""])
def test_a_damaged_manifest_is_an_error(whole: Run, name: str, text: str) -> None:
    (whole.path / name).write_text(text)
    with pytest.raises(PackageError, match=name.rpartition("/")[2]):
        report.collect(whole.path)


def test_a_drop_on_validation_is_marked_beside_those_on_test(run: Run) -> None:
    train, ptq = run.package("00-train"), run.package("01-ptq")
    run.evaluation(train, run.hits["train"])
    for artifact, name in ((train, "train"), (ptq, "ptq")):
        run.evaluation(artifact, run.hits[name], split="val")
    text = report.to_markdown(report.collect(run.path))
    assert re.search(r"\| 01-ptq .*\| 2\.0 \[[\d., -]+\] on val \|", text)


@pytest.mark.parametrize(("value", "text"), [(2.72, "2.7x"), (0.3, "0.30x"), (0.023, "0.02x"), (12.0, "12.0x")])
def test_ratios_below_one_keep_their_digits(value: float, text: str) -> None:
    assert numbers.ratio_text(rows.Comparison(value, None, None, "x")) == text


# -- its forms --------------------------------------------------------------------------------------


def gated(whole: Run) -> rows.Report:
    result = rows.GateResult(
        "max_drop", "deploy/openvino", 0.01, 0.02, False, "2.00 [0.36, 3.62] points", "1.00 points"
    )
    return report.with_gates(report.collect(whole.path), (result,))


def test_json_has_stable_keys_with_units(whole: Run) -> None:
    document = json.loads(report.to_json(gated(whole)))
    assert set(document) == {"format", "run", "bmctl", "batch_size", "machine", "rows", "gates", "notes"}
    assert set(document["rows"][0]) == {
        "name", "kind", "stage", "backend", "is_original", "precision", "num_params", "macs", "size_bytes", "val",
        "test", "drop", "latency", "samples_per_s", "speedup", "speedup_over_onnxruntime",
        "peak_memory_bytes", "status", "reason", "command_elsewhere", "test_metrics", "test_drops",
    }  # fmt: skip
    assert set(document["rows"][5]["latency"]) == {"p50_ms", "p90_ms", "p99_ms", "num_rounds"}
    assert document["gates"][0]["passed"] is False


def test_json_has_null_for_what_has_no_number(whole: Run) -> None:
    found = report.collect(whole.path)
    odd = dataclasses.replace(found.rows[0], drop=rows.Comparison(math.nan, -math.inf, math.inf, "x"))
    document = json.loads(report.to_json(dataclasses.replace(found, rows=(odd,))), parse_constant=pytest.fail)
    assert document["rows"][0]["drop"] == {"value": None, "low": None, "high": None, "versus": "x", "split": None}


def test_the_page_says_what_matters(whole: Run) -> None:
    text = report.to_markdown(gated(whole))
    for piece in (
        "# fashion\n",
        "accuracy 90.0 % [86.7, 92.6] on 400 test samples; a trivial predictor gets 10.0 %",
        "Fastest here: openvino int8",
        "3.0x [3.0, 3.0] the original on the same runtime",
        "1 of 1 gates failed",
        "| 00-train | 315 k | 31.2 M | 1,259 kB | - | 90.0 % [86.7, 92.6] | - |",
        "| tensorrt_rtx | int8 | 164 B | not run |",
        "deploy/tensorrt_rtx: built, not run (no GPU); there: `bmctl X`",
        "packages/01-ptq: calibrated on 300 samples",
        "| FAIL | max_drop | openvino | 1.00 points | 2.00 [0.36, 3.62] points |",
        "Latency is of one batch of 64 samples, taken on: processor Xeon",
    ):
        assert piece in text, piece


def test_tables_of_the_page_are_tables(whole: Run) -> None:
    """Every line of a table has as many cells as its header."""
    block: list[int] = []
    for line in [*report.to_markdown(gated(whole)).split("\n"), ""]:
        if line.startswith("|"):
            block.append(line.count("|"))
        else:
            assert len(set(block)) <= 1
            block = []


def test_every_metric_is_compared_on_test_data(whole: Run) -> None:
    row = rows_of(report.collect(whole.path))["deploy/openvino"]
    assert list(row.test_metrics) == list(row.test_drops) == ["accuracy", "macro_f1", "loss"]
    assert (row.test_metrics["accuracy"], row.test_drops["accuracy"]) == (row.test, row.drop)
    f1 = row.test_drops["macro_f1"]
    before, now = (classify.metrics(classified(whole.hits[name]).counts) for name in ("train", "ptq"))
    assert f1.value == pytest.approx(before["macro_f1"] - now["macro_f1"])
    assert f1.low < f1.value < f1.high
    assert row.test_drops["loss"].value == pytest.approx(0.04)  # 8 of 400 more, 2.0 each: worse, so positive
    assert [score.interval for score in row.test_metrics.values()] == ["wilson", "bootstrap", "t"]


def test_further_metrics_have_their_own_table(whole: Run) -> None:
    text = report.to_markdown(report.collect(whole.path))
    assert "## Further metrics" in text
    assert re.search(r"\| deploy/openvino \| macro_f1 \| 88\.\d % \[.*\] \| drop [12]\.\d \[.*\] points \|", text)
    assert re.search(r"\| deploy/openvino \| loss \| 0\.3400 nats \[.*\] \| increase 0\.0400 \[.*\] nats \|", text)


def test_the_page_of_accuracy_says_what_it_always_did(whole: Run) -> None:
    text = report.to_markdown(gated(whole))
    for piece in (
        "| stage | params | MACs | size | val accuracy | test accuracy | drop, points |",
        "; accuracy drops by 2.0 [0.2, 3.7] points.",
        "Brackets hold 95 % intervals: Wilson's for a share of samples; the adjusted Wald interval of matched pairs "
        "for a drop, which compares the same samples with the first package; a bootstrap over interleaved rounds for a "
        "speedup, which compares samples per second with the original on the same runtime. A positive drop is a loss.",
    ):
        assert piece in text, piece


@pytest.fixture
def lower(run: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Trained and quantized, judged by a metric that is better when lower, and is no share."""
    kinds = {**TASKS, regression.KIND: regression}
    monkeypatch.setattr(report, "TASKS", kinds)
    monkeypatch.setattr(report.scoring, "TASKS", kinds)
    train, ptq = run.package("00-train"), run.package("01-ptq", frozen=True)
    run.file(train, regression.evaluation(regression.predicted()))
    built = run.artifact("openvino", of=ptq, precision="int8")
    run.file(built, regression.evaluation(regression.predicted(noise=0.8, seed=1)))
    run.timings(openvino=(FAST, built), peak=43_900_000)
    return run


def test_what_is_better_when_lower_rises(lower: Run) -> None:
    found = report.collect(lower.path)
    row = rows_of(found)["deploy/openvino"]
    assert row.drop is not None
    assert row.drop.value > row.drop.low > 0, "worse is positive"
    assert row.drop.value == pytest.approx(row.test.value - rows_of(found)["packages/00-train"].test.value)
    assert (row.test.name, row.test.better, row.test.unit, row.test.interval) == ("rmse", "lower", "", "bootstrap")
    text = report.to_markdown(found)
    for piece in (
        r"- train: rmse 0\.\d{4} \[0\.\d{4}, 0\.\d{4}\] on 400 test samples; a trivial predictor gets 1\.0000\.",
        r"; rmse increases by 0\.\d{4} \[0\.\d{4}, 0\.\d{4}\]\.",
        r"\| val rmse \| test rmse \| increase \|",
        r"\| deploy/openvino \| f1 \| \d\d\.\d % \[.*\] \| drop \d+\.\d \[.*\] points \|",
        r"\| deploy/openvino \| mae \| 0\.\d{4} cm \[.*\] \| increase 0\.\d{4} \[.*\] cm \|",
        r"a bootstrap over samples, and over matched pairs for an increase, .* A positive increase is a loss\.",
    ):
        assert re.search(piece, text), piece
    assert "rmse drops" not in text
    assert "Wilson" not in text


def test_peak_memory_is_shown_where_it_was_measured(lower: Run) -> None:
    assert "| peak memory |" in report.to_markdown(report.collect(lower.path))
    assert rows_of(report.collect(lower.path))["deploy/openvino"].peak_memory_bytes == 43_900_000
    assert re.search(r"^\| openvino .* \| 44 MB \|$", report.to_markdown(report.collect(lower.path)), re.MULTILINE)


def test_without_a_measurement_there_is_no_column_of_memory(whole: Run) -> None:
    assert "peak" not in report.to_markdown(report.collect(whole.path))


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.8951, "share", "89.5 %"),
        (0.31, "nats", "0.3100 nats"),
        (23.4567, "", "23.457"),
        (487.256, "", "487.26"),
        (123456.7, "m", "123,457 m"),
        (0.00123, "", "0.00123"),
        (-0.5, "", "-0.5000"),
        (0.0, "", "0.0000"),
        (math.inf, "", "inf"),
    ],
)
def test_values_keep_the_figures_that_matter(value: float, unit: str, text: str) -> None:
    assert numbers.value_text(value, unit) == text


def test_it_needs_no_torch(whole: Run) -> None:
    code = f"""
import sys; from pathlib import Path; from bmctl import report; from bmctl.report import gates
report.to_markdown(report.collect(Path({str(whole.path)!r})))
assert "torch" not in sys.modules, "torch"
"""
    subprocess.run([sys.executable, "-c", code], check=True)
