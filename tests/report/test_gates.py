"""Gates judge shipped artifacts on what was measured; what was not measured does not pass."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from bmctl.core.evaluation import Metric
from bmctl.errors import GateError
from bmctl.recipe.sections import GatesConfig, MetricGates
from bmctl.report import gates
from bmctl.report.rows import Comparison, GateResult, LatencyRow, Report, Row, Score

METRICS = {
    "accuracy": Metric("accuracy", unit="share"),
    "f1": Metric("f1", unit="share"),
    "loss": Metric("loss", "lower", "nats"),
}
ACCURACY = Score("accuracy", 0.88, 0.87, 0.89, 5000, 0.1, unit="share")
DROP = Comparison(0.010, 0.004, 0.016, "packages/00-train", "test")
SHIPPED = Row(
    name="deploy/openvino",
    kind="artifact",
    stage="ptq",
    backend="openvino",
    is_original=False,
    precision="int8",
    num_params=80_000,
    macs=8_000_000,
    size_bytes=141_000,
    test=ACCURACY,
    drop=DROP,
    test_metrics={
        "accuracy": ACCURACY,
        "f1": Score("f1", 0.86, 0.84, 0.88, 5000, unit="share"),
        "loss": Score("loss", 0.40, 0.35, 0.45, 5000, better="lower", unit="nats"),
    },
    test_drops={
        "accuracy": DROP,
        "f1": Comparison(0.02, 0.01, 0.03, "packages/00-train", "test"),
        "loss": Comparison(0.05, 0.03, 0.07, "packages/00-train", "test"),
    },
    latency=LatencyRow(2.9, 3.5, 4.0, num_rounds=15),
    samples_per_s=22_000,
    speedup=Comparison(2.72, 2.5, 2.9, "deploy/baseline/openvino"),
)
UNRUN = dataclasses.replace(
    SHIPPED,
    name="deploy/tensorrt_rtx",
    test=None,
    drop=None,
    test_metrics={},
    test_drops={},
    latency=None,
    samples_per_s=None,
    speedup=None,
    status="built, not run",
    reason="no NVIDIA GPU here",
)


def judge(limits: dict[str, Any], *rows: Row) -> tuple[GateResult, ...]:
    report = Report(run="runs/x", bmctl="0", batch_size=64, machine={}, rows=rows or (SHIPPED,))
    return gates.check(GatesConfig.model_validate(limits), report, metrics=METRICS)


@pytest.mark.parametrize(
    ("limits", "passed"),
    [
        ({"max_drop": 0.011}, True),
        ({"max_drop": 0.0099}, False),
        ({"min_speedup": 2.7}, True),
        ({"min_speedup": 2.75}, False),
        ({"max_size_bytes": 141_000}, True),
        ({"max_size_bytes": 140_999}, False),
        ({"max_latency_ms": 2.9}, True),
        ({"max_latency_ms": 2.8}, False),
    ],
    ids=str,
)
def test_each_gate_is_judged_on_the_point_estimate(limits: dict[str, Any], passed: bool) -> None:
    (result,) = judge(limits)
    assert result.passed is passed
    assert result.name == next(iter(limits))
    assert result.limit == next(iter(limits.values()))
    assert result.artifact == "deploy/openvino"


def test_a_drop_of_exactly_the_limit_passes() -> None:
    """0.89 - 0.88 is 0.010000000000000009."""
    drop = Comparison(0.89 - 0.88, 0.0, 0.02, "packages/00-train", "test")
    row = dataclasses.replace(SHIPPED, test_drops={"accuracy": drop})
    assert judge({"max_drop": 0.01}, row)[0].passed


def test_a_close_call_says_so() -> None:
    assert "1.00 [0.40, 1.60] points (close: the interval holds the limit)" in judge({"max_drop": 0.011})[0].why
    assert "close" not in judge({"max_drop": 0.02})[0].why
    assert "close" in judge({"min_speedup": 2.75})[0].why
    assert "close" not in judge({"min_speedup": 3.0})[0].why


def test_only_what_ships_is_judged() -> None:
    original = dataclasses.replace(SHIPPED, name="deploy/baseline/openvino", is_original=True, size_bytes=10**9)
    package = dataclasses.replace(SHIPPED, name="packages/00-train", kind="package", size_bytes=10**9)
    results = judge({"max_size_bytes": 150_000}, package, original, SHIPPED)
    assert [result.artifact for result in results] == ["deploy/openvino"]


@pytest.mark.parametrize("limits", [{"max_drop": 1.0}, {"min_speedup": 0.1}, {"max_latency_ms": 1e9}], ids=str)
def test_what_was_not_run_fails_unless_the_recipe_allows_it(limits: dict[str, Any]) -> None:
    (result,) = judge(limits, UNRUN)
    assert not result.passed
    assert result.value is None
    assert result.why == "built, not run: no NVIDIA GPU here"
    (result,) = judge({**limits, "allow_unrun": True}, UNRUN)
    assert result.passed
    assert "gates.allow_unrun lets it pass" in result.why


def test_the_size_of_what_was_not_run_is_judged_all_the_same() -> None:
    (result,) = judge({"max_size_bytes": 100_000, "allow_unrun": True}, UNRUN)
    assert not result.passed
    assert result.value == 141_000


@pytest.mark.parametrize(
    ("limits", "without", "why"),
    [
        ({"max_drop": 1.0}, {"test_drops": {}}, "not compared with the first package on test data"),
        ({"min_speedup": 0.1}, {"speedup": None}, "export.baseline"),
        ({"max_latency_ms": 1e9}, {"latency": None}, "latency not measured"),
    ],
    ids=str,
)
def test_what_was_not_measured_does_not_pass(limits: dict[str, Any], without: dict[str, None], why: str) -> None:
    (result,) = judge(limits, dataclasses.replace(SHIPPED, **without))
    assert not result.passed
    assert why in result.why


def test_a_drop_on_validation_is_not_one_on_test() -> None:
    drop = Comparison(0.0, 0.0, 0.0, "packages/00-train", "val")
    row = dataclasses.replace(SHIPPED, drop=drop, test_drops={})
    assert not judge({"max_drop": 1.0}, row)[0].passed


def test_with_no_artifact_every_gate_fails() -> None:
    report = Report(run="x", bmctl="0", batch_size=None, machine={}, rows=())
    results = gates.check(GatesConfig(max_drop=0.5, max_size_bytes=10), report, metrics=METRICS)
    assert [(r.name, r.passed, r.why) for r in results] == [
        ("max_drop", False, "no artifact was exported"),
        ("max_size_bytes", False, "no artifact was exported"),
    ]


def test_only_the_backends_that_the_recipe_names_are_judged() -> None:
    other = dataclasses.replace(SHIPPED, name="deploy/onnxruntime", backend="onnxruntime", size_bytes=10**9)
    results = judge({"max_size_bytes": 141_000, "backends": ("openvino",)}, SHIPPED, other)
    assert [(r.artifact, r.passed) for r in results] == [("deploy/openvino", True)]


@pytest.mark.parametrize("backends", [("tensorrt",), ("openvino", "tensorrt"), ()])
def test_a_backend_that_was_not_exported_fails_its_gates(backends: tuple[str, ...]) -> None:
    results = judge({"max_size_bytes": 10**9, "backends": backends})
    assert not all(r.passed for r in results)
    assert "no artifact" in results[-1].why


def test_no_gates_no_results() -> None:
    assert judge({}) == ()
    assert judge({"allow_unrun": True}, UNRUN) == ()
    gates.raise_for(())


def test_all_failures_are_raised_at_once_with_value_and_limit() -> None:
    results = judge({"max_drop": 0.003, "max_size_bytes": 100_000, "max_latency_ms": 50.0}, SHIPPED, UNRUN)
    with pytest.raises(GateError) as caught:
        gates.raise_for(results)
    assert caught.value.exit_code == 8
    lines = caught.value.message.split("\n")
    assert lines[0] == "5 of 6 gates failed:"
    assert "  deploy/openvino max_drop: 1.00 [0.40, 1.60] points, limit 0.30 points" in lines
    assert "  deploy/openvino max_size_bytes: 141 kB, limit 100 kB" in lines
    assert "  deploy/tensorrt_rtx max_drop: built, not run: no NVIDIA GPU here, limit 0.30 points" in lines
    assert "allow_unrun" in caught.value.hint
    assert "--set gates.max_drop=" in caught.value.hint


def test_passed_gates_raise_nothing() -> None:
    gates.raise_for(judge({"max_drop": 0.02, "min_speedup": 1.5}))


def test_every_gate_of_the_recipe_is_judged() -> None:
    assert set(gates.NAMES) == set(GatesConfig.model_fields) - {"allow_unrun", "backends", "metrics"}
    assert set(gates.METRIC_NAMES) == set(MetricGates.model_fields)


@pytest.mark.parametrize(
    ("metric", "limits", "passed"),
    [
        ("f1", {"min": 0.86}, True),
        ("f1", {"min": 0.87}, False),
        ("f1", {"max": 0.85}, False),
        ("f1", {"max_drop": 0.02}, True),
        ("f1", {"max_drop": 0.019}, False),
        ("loss", {"max": 0.40}, True),
        ("loss", {"max": 0.39}, False),
        ("loss", {"min": 0.41}, False),
        ("loss", {"max_drop": 0.05}, True),
        ("loss", {"max_drop": 0.04}, False),
        ("accuracy", {"min": 0.9}, False),
    ],
    ids=str,
)
def test_any_metric_can_be_gated_both_ways(metric: str, limits: dict[str, float], passed: bool) -> None:
    (result,) = judge({"metrics": {metric: limits}})
    assert result.passed is passed
    assert result.name == f"metrics.{metric}.{next(iter(limits))}"


def test_gates_of_metrics_speak_in_their_unit() -> None:
    limits = {"f1": {"min": 0.87, "max_drop": 0.019}, "loss": {"max": 0.39, "max_drop": 0.04}, "accuracy": {"min": 0.9}}
    results = judge({"metrics": limits})
    close = " (close: the interval holds the limit)"
    assert [(r.limit_text, r.why) for r in results] == [
        ("87.00 %", "86.0 % [84.0, 88.0]" + close),
        ("1.90 points", "2.00 [1.00, 3.00] points" + close),
        ("0.3900 nats", "0.4000 nats [0.3500, 0.4500]" + close),
        ("0.0400 nats", "increase of 0.0500 [0.0300, 0.0700] nats" + close),
        ("90.00 %", "88.0 % [87.0, 89.0]"),
    ]
    with pytest.raises(GateError, match=r"metrics\.loss\.max: 0\.4000 nats .*, limit 0\.3900 nats") as caught:
        gates.raise_for(results)
    assert "--set gates.metrics.f1.min=" in caught.value.hint


def test_the_main_metric_is_gated_in_its_own_unit() -> None:
    report = Report(run="x", bmctl="0", batch_size=64, machine={}, rows=(SHIPPED,))
    metrics = {"loss": METRICS["loss"], "accuracy": METRICS["accuracy"]}
    (result,) = gates.check(GatesConfig(max_drop=0.04), report, metrics=metrics)
    assert (result.name, result.passed, result.limit_text) == ("max_drop", False, "0.0400 nats")
    assert result.why.startswith("increase of 0.0500 [0.0300, 0.0700] nats")


def test_a_metric_without_a_value_does_not_pass() -> None:
    row = dataclasses.replace(SHIPPED, test_metrics={}, test_drops={})
    found = judge({"metrics": {"f1": {"min": 0.0, "max_drop": 1.0}}}, row)
    assert [(r.passed, r.why) for r in found] == [
        (False, "not evaluated on test data"),
        (False, "not compared with the first package on test data"),
    ]
