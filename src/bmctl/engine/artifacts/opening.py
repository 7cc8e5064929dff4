"""A package or a deployed artifact as runners by part: who evaluates, times or predicts need not ask which."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch

from bmctl.backends import eager
from bmctl.core import onnxfile
from bmctl.core.runner import Runner
from bmctl.engine.artifacts.deployed import Deployed, open_runners
from bmctl.engine.artifacts.graphrunner import open_graph
from bmctl.package import Manifest, ModelPackage
from bmctl.restore import load_model
from bmctl.tasks import TASKS, parts_of


def open_parts(
    source: ModelPackage | Deployed, stack: ExitStack, *, device: torch.device | str | None = None
) -> dict[str, Runner]:
    """Its graphs, ready to run: a module eagerly, a frozen package on ONNX Runtime, an artifact on its own runtime.

    Args:
        stack: Closes them.
        device: For a module; None leaves it on the CPU.

    Raises:
        PackageError: Corrupt, or it does not fit this machine.
        DependencyError: Its runtime or its GPU is missing.
    """
    if isinstance(source, Deployed):
        return open_runners(source, stack)
    if not source.manifest.frozen:
        return open_model(load_model(source), source.manifest, device=device)
    found: dict[str, Runner] = {}
    for part, graph in source.graphs.items():
        onnxfile.check_onnx(graph)
        found[part] = stack.enter_context(open_graph(graph, signature=source.manifest.parts[part]))
    return found


def open_model(
    model: torch.nn.Module, manifest: Manifest, *, device: torch.device | str | None = None
) -> dict[str, Runner]:
    """A module as the parts of the package that it belongs to, or is to be made into."""
    parts = parts_of(task_of(manifest.task), model, manifest.parts)
    return {
        name: eager.open_module(part.module, signature=part.signature, device=device) for name, part in parts.items()
    }


def backend_of(source: ModelPackage | Deployed) -> str:
    """What runs it, by name."""
    if isinstance(source, Deployed):
        return source.manifest.backend
    return "onnxruntime" if source.manifest.frozen else "eager"


def task_of(config: dict[str, Any] | None) -> Any:
    """The module of TASKS that a manifest speaks of; None where it names none."""
    return TASKS[config["kind"]] if config is not None else None
