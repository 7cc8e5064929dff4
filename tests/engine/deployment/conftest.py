"""A small trained run with its artifacts."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tests.engine.deployment.available import why_not
from tests.engine.runs import make_context, make_recipe

from bmctl.backends import BACKENDS
from bmctl.engine.deployment.export import export_package
from bmctl.engine.training.train_stage import train_stage
from bmctl.package import find_package

BUILT = ("onnxruntime", "openvino", "tensorrt_rtx")


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with one trained package and an artifact for each backend that builds here."""
    folder = tmp_path_factory.mktemp("infer")
    recipe = make_recipe(folder, "train.epochs=1")
    context = make_context(folder / "run", recipe)
    train_stage(context)
    package = find_package(context.run)
    backends = [BACKENDS[name].Config() for name in BUILT if "not installed" not in why_not(name)]
    export_package(context, package, backends=backends, into=context.run / "deploy")
    return context.run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy that a test may harm."""
    return shutil.copytree(trained, tmp_path / "run")
