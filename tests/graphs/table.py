"""Every graph through bmctl's own import and export, and TensorRT-RTX's bare parser and builder beside it.

``python -m tests.graphs.table`` writes docs/graphs.md.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from tests.graphs.catalog import BACKENDS, BUILT, GRAPHS, MENDED, Graph

from bmctl.backends import BACKENDS as MODULES
from bmctl.core.runner import shown
from bmctl.engine.context import StageContext
from bmctl.engine.deployment.export import export_package
from bmctl.engine.intake.importing import import_stage
from bmctl.engine.parallel import Group
from bmctl.errors import BmctlError
from bmctl.package import PART
from bmctl.processes.signals import Stop
from bmctl.recipe import bare_recipe

PAGE = Path(__file__).parents[2] / "docs" / "graphs.md"
CONFIG: dict[str, dict[str, Any]] = {"tensorrt_rtx": {"capabilities": ("sm89",)}}


COLUMNS = {
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "tensorrt_rtx": "TensorRT-RTX",
    "bare": "bare TensorRT-RTX",
}
TOP = """# Third-party graphs

Written by `make graphs` (`python -m tests.graphs.table`); do not edit. Every file is made or found on the spot, and
goes the way of `bmctl export FILE.onnx`: imported, its axes tried, exported to each backend, and compared with the
graph on ONNX Runtime on noise that is made from its signature. *Built* is the graph as it is; *mended* was changed
first, and the change proven on ONNX Runtime; *refused* ended in an error that names the reason. Beside it is
TensorRT-RTX's bare parser and builder, with a profile of 1, 8 and 64 for every free axis and none of these checks.
Engines are built for sm89 and not run here.
"""


@dataclass(frozen=True)
class Verdict:
    """What became of one graph on one backend.

    Attributes:
        what: built, mended or refused.
        why: What was mended, or why it was refused.
        proof: Parity, where it ran.
    """

    what: str
    why: str = ""
    proof: str = ""

    def fits(self, expected: str) -> bool:
        """Whether it is what the catalog says: built, mended, or a pattern of the reason for a refusal."""
        if expected in (BUILT, MENDED):
            return self.what == expected
        return self.what == "refused" and re.search(expected, self.why) is not None


@dataclass(frozen=True)
class Row:
    """One line of the table; `found` is by backend."""

    graph: Graph
    inputs: str
    notes: tuple[str, ...]
    found: dict[str, Verdict]

    @property
    def wrong(self) -> list[str]:
        """Where the catalog says something else."""
        return [
            f"{self.graph.name} on {backend}: {verdict.what} ({verdict.why}), expected {self.graph.verdict(backend)}"
            for backend, verdict in self.found.items()
            if backend in BACKENDS and not verdict.fits(self.graph.verdict(backend))
        ]


def make_context(run: Path, *overrides: str) -> StageContext:
    torch.set_num_threads(1)
    run.mkdir(parents=True, exist_ok=True)
    group = Group(rank=0, local_rank=0, world=1, device=torch.device("cpu"), threads=1)
    return StageContext(
        run=run, recipe=bare_recipe("graph", list(overrides)), group=group, stop=Stop(), emit=lambda event: None
    )


def judge(graph: Graph, folder: Path, *, backends: Sequence[str] = BACKENDS) -> Row:
    """Make a graph, import it, export it to each backend."""
    path = folder / f"{graph.name}.onnx"
    graph.make(path)
    context = make_context(folder / graph.name)
    try:
        package = import_stage(context, str(path))
    except BmctlError as error:
        values = onnx.load(path, load_external_data=False).graph.input
        refused = Verdict("refused", _plain(error.message, folder))
        return Row(graph, ", ".join(value.name for value in values), (), dict.fromkeys(backends, refused))
    found = {}
    for backend in backends:
        config = MODULES[backend].Config(**CONFIG.get(backend, {}))
        try:
            (one,) = export_package(context, package, backends=[config], into=context.run / "deploy")
        except BmctlError as error:
            found[backend] = Verdict("refused", _plain(error.message, folder))
            continue
        part = one.manifest.parts[PART]
        mended = "; ".join(part.meta.get("mended", ()))
        found[backend] = Verdict(MENDED if mended else BUILT, mended, str(part.parity or ""))
    manifest = package.manifest
    inputs = ", ".join(f"{spec.name} {spec.dtype}{shown(spec)}" for spec in manifest.parts[PART].inputs)
    notes = tuple(text for text in manifest.notes if any(word in text for word in ("axis", "axes", "stands for")))
    return Row(graph, inputs, tuple(text for text in notes if not text.startswith(("nobody", "imported"))), found)


def _plain(text: str, folder: Path) -> str:
    """A message without this call's own paths."""
    text = re.sub(rf"{re.escape(str(folder))}/\S*?([\w.-]+)(?=[\s:;,]|$)", r"\1", text)
    return re.sub(r"; kept as .*", "", text)


def bare(path: Path) -> Verdict:
    """TensorRT-RTX's parser and builder, with a profile of 1, 8 and 64 for whatever is free."""
    import tensorrt_rtx as trt

    from bmctl.backends.trt_engine import find_logger

    logger = find_logger(trt)
    logger.drain()
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(path.read_bytes(), str(path)):
        return Verdict("refused", f"{parser.get_error(0).node_operator()}: {parser.get_error(0).desc()}")
    settings, profile, is_free = builder.create_builder_config(), builder.create_optimization_profile(), False
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        if -1 in tuple(tensor.shape):
            is_free = True
            shapes = [tuple(size if size >= 0 else other for size in tensor.shape) for other in (1, 8, 64)]
            profile.set_shape(tensor.name, *shapes)
    if is_free:
        settings.add_optimization_profile(profile)
    settings.num_compute_capabilities = 1
    settings.set_compute_capability(trt.ComputeCapability.SM89, 0)
    if builder.build_serialized_network(network, settings) is None:
        return Verdict("refused", "; ".join(logger.drain(errors_only=True)[:1]) or "no reason given")
    return Verdict(BUILT)


def page(rows: Sequence[Row]) -> str:
    """docs/graphs.md."""
    counts = []
    for key, name in COLUMNS.items():
        whats = [row.found[key].what for row in rows]
        counts.append(f"| {name} | {whats.count(BUILT)} | {whats.count(MENDED)} | {whats.count('refused')} |")
    lines = [TOP, f"{len(rows)} files:", "", "| | built | mended | refused |", "|---|---|---|---|", *counts, ""]
    lines += [f"| file | inputs | {' | '.join(COLUMNS.values())} |", "|---|---|" + "---|" * len(COLUMNS)]
    for row in rows:
        verdicts = " | ".join(row.found[key].what for key in COLUMNS)
        lines.append(f"| {row.graph.name} | {_cell(row.inputs)} | {verdicts} |")
    lines += ["", "## Why", ""]
    for row in rows:
        reasons: dict[str, list[str]] = {}
        for key, name in COLUMNS.items():
            if row.found[key].why:
                reasons.setdefault(row.found[key].why, []).append(name)
        said = [f"  - {text}" for text in row.notes]
        said += [f"  - {', '.join(names)}: {' '.join(why.split())[:400]}" for why, names in reasons.items()]
        if said:
            lines += [f"- **{row.graph.name}**", *(text.replace("<", "&lt;").replace("*", "\\*") for text in said)]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main(names: Sequence[str]) -> int:
    """Write the page, or with names look at these graphs alone; 1 where the catalog says something else."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for graph in GRAPHS:
            if names and graph.name not in names:
                continue
            row = judge(graph, Path(folder))
            row.found["bare"] = bare(Path(folder) / f"{graph.name}.onnx")
            rows.append(row)
            print(graph.name, *(f"{key}={verdict.what}" for key, verdict in row.found.items()), flush=True)
            for text in row.wrong if not names else [f"{key}: {v.why} {v.proof}" for key, v in row.found.items()]:
                print("   ", text, flush=True)
    if not names:
        PAGE.write_text(page(rows), encoding="utf-8")
    return int(any(row.wrong for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
