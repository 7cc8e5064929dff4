"""Every graph through bmctl's own import and export, and TensorRT-RTX's bare parser and builder beside it.

``python -m tests.graphs.table`` writes docs/graphs.md.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tests.graphs.catalog import BACKENDS, BUILT, GRAPHS, MENDED, Graph

from bmctl.backends import BACKENDS as MODULES
from bmctl.engine.context import StageContext
from bmctl.engine.deployment.export import export_package
from bmctl.engine.intake.importing import import_stage
from bmctl.engine.parallel import Group
from bmctl.errors import BmctlError
from bmctl.processes.signals import Stop
from bmctl.recipe import bare_recipe

PAGE = Path(__file__).parents[2] / "docs" / "graphs.md"
CONFIG: dict[str, dict[str, Any]] = {"tensorrt_rtx": {"capabilities": ("sm89",)}}


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


def make_context(run: Path, *overrides: str) -> StageContext:
    torch.set_num_threads(1)
    run.mkdir(parents=True, exist_ok=True)
    group = Group(rank=0, local_rank=0, world=1, device=torch.device("cpu"), threads=1)
    return StageContext(
        run=run, recipe=bare_recipe("graph", list(overrides)), group=group, stop=Stop(), emit=lambda event: None
    )


def judge(graph: Graph, folder: Path, *, backends: Sequence[str] = BACKENDS) -> dict[str, Verdict]:
    """Make a graph, import it, export it to each backend."""
    path = folder / f"{graph.name}.onnx"
    graph.make(path)
    context = make_context(folder / graph.name)
    try:
        package = import_stage(context, str(path))
    except BmctlError as error:
        return {backend: Verdict("refused", error.message) for backend in backends}
    found = {}
    for backend in backends:
        config = MODULES[backend].Config(**CONFIG.get(backend, {}))
        try:
            (one,) = export_package(context, package, backends=[config], into=context.run / "deploy")
        except BmctlError as error:
            found[backend] = Verdict("refused", error.message)
            continue
        mended = "; ".join(one.manifest.meta.get("mended", ()))
        found[backend] = Verdict(MENDED if mended else BUILT, mended, str(one.manifest.parity or ""))
    return found


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


def main(names: Sequence[str]) -> int:
    rows, wrong = [], []
    with tempfile.TemporaryDirectory() as folder:
        for graph in GRAPHS:
            if names and graph.name not in names:
                continue
            found = judge(graph, Path(folder))
            path = Path(folder) / f"{graph.name}.onnx"
            rows.append((graph, path, found, bare(path)))
            print(
                graph.name,
                {k: (v.what, v.why[:300], v.proof[:150]) for k, v in found.items()},
                rows[-1][3].what,
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
