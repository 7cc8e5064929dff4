"""Third-party graphs, the whole way: what the catalog says of each is what becomes of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.graphs.catalog import BACKENDS, GRAPHS, Graph
from tests.graphs.table import PAGE, Verdict, bare, judge, make_context, page

from bmctl.engine.deployment.export import export_package
from bmctl.engine.deployment.prove import prove
from bmctl.engine.intake.importing import import_stage
from bmctl.report.rows import Measurements

pytest.importorskip("tensorrt_rtx", reason="the extra tensorrt-rtx is not installed")
QUICK = [graph for graph in GRAPHS if graph.quick]
REST = [graph for graph in GRAPHS if not graph.quick]


def check(graph: Graph, folder: Path) -> None:
    assert judge(graph, folder).wrong == []


@pytest.mark.parametrize("graph", QUICK, ids=lambda graph: graph.name)
def test_a_representative_graph(graph: Graph, tmp_path: Path) -> None:
    check(graph, tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("graph", REST, ids=lambda graph: graph.name)
def test_every_other_graph(graph: Graph, tmp_path: Path) -> None:
    check(graph, tmp_path)


def test_the_catalog_is_large_and_says_what_it_means() -> None:
    names = [graph.name for graph in GRAPHS]
    assert len(names) == len(set(names)) >= 80
    assert len(QUICK) >= 12
    assert all(set(graph.expected) <= set(BACKENDS) for graph in GRAPHS)


def test_the_page_tells_of_every_graph() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert [graph.name for graph in GRAPHS if f"| {graph.name} |" not in text] == []


def test_nothing_is_refused_for_its_inputs_or_axes() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert "parity is checked on graphs with one" not in text
    assert "only the batch" not in text
    assert "nobody says which sizes" not in text


def test_another_verdict_than_expected_is_seen() -> None:
    assert not Verdict("refused", "no such operator").fits("built")
    assert not Verdict("built").fits("mended")
    assert not Verdict("refused", "no such operator").fits("another reason")
    assert Verdict("refused", "no such operator").fits("such oper")


def test_the_page_counts_verdicts(tmp_path: Path) -> None:
    graph = next(graph for graph in GRAPHS if graph.name == "strings_in")
    row = judge(graph, tmp_path)
    row.found["bare"] = bare(tmp_path / "strings_in.onnx")
    text = page([row])
    assert "| OpenVINO | 0 | 0 | 1 |" in text
    assert "ONNX Runtime, OpenVINO, TensorRT-RTX: strings_in.onnx: the input 'x' holds strings" in text


@pytest.mark.parametrize(("name", "num_samples"), [("fixed_batch", 3), ("ratings", 64), ("time_first", 64)])
def test_it_is_timed_at_its_own_batch(name: str, num_samples: int, tmp_path: Path) -> None:
    graph = next(graph for graph in GRAPHS if graph.name == name)
    path = tmp_path / f"{name}.onnx"
    graph.make(path)
    context = make_context(tmp_path / "run", "export.backends=[onnxruntime, openvino]", "export.measure.rounds=3")
    package = import_stage(context, str(path))
    deployed = export_package(context, package, backends=context.recipe.export.backends, into=context.run / "deploy")
    prove(context, original=package, deployed=deployed)
    found = Measurements.model_validate_json((context.run / "measurements.json").read_bytes())
    assert set(found.artifacts) == {"onnxruntime", "openvino"}
    assert found.batch_size == num_samples
