"""A deployed artifact: one file for one runtime, with the manifest that says what it is and how it was proven."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from bmctl import __version__, store
from bmctl.backends import BACKENDS
from bmctl.core.runner import Runner
from bmctl.engine.artifacts.parity import Parity
from bmctl.errors import PackageError
from bmctl.inputs import InputSpec
from bmctl.schema import Many, Signature, Span, Strict, TensorSpec
from bmctl.store import FileRecord

SAMPLE = "sample.safetensors"
"""Inputs and the reference's outputs, by the names of the graph: parity can be checked again on any machine."""


class DeployManifest(Strict):
    """What an artifact is.

    Attributes:
        backend: Name in BACKENDS.
        config: Of the backend.
        package: Hash of the package that it was built from.
        artifact: Name of its file.
        axes: Sizes that it was asked to serve; backends that leave axes free take any.
        precision: Of the graph: ``fp32``, ``fp16``, ``bf16`` or ``int8``.
        status: Whether it ran where it was built.
        reason: Why it was not run.
        parity: Against the reference, on real samples where there were any; None where it was not run.
        meta: What the backend records: version, capabilities, profile, hash.
        machine: Where it was built.
        command_elsewhere: What builds its sibling for other GPUs, on the machine that has one.
    """

    format: Literal[1] = 1
    bmctl: str = __version__
    backend: str
    config: dict[str, Any]
    package: str
    artifact: str
    axes: dict[str, Span]
    inputs: Many[TensorSpec]
    outputs: Many[TensorSpec]
    preprocess: InputSpec | None
    class_names: Many[str]
    task: dict[str, Any] | None
    precision: str
    status: Literal["ran", "built, not run"]
    reason: str = ""
    parity: Parity | None
    meta: dict[str, Any]
    machine: dict[str, Any]
    files: dict[str, FileRecord]
    command_elsewhere: str = ""


@dataclass(frozen=True)
class Deployed:
    path: Path
    manifest: DeployManifest

    @property
    def artifact(self) -> Path:
        """The runtime's file."""
        return self.path / self.manifest.artifact

    @property
    def hash(self) -> str:
        """SHA-256 of the manifest: the artifact's identity."""
        return store.manifest_hash(self.path)


def open_deployed(path: Path) -> Deployed:
    """Open RUN/deploy/<backend>, with every file's hash checked.

    Raises:
        PackageError: Missing, corrupt, incomplete, too new, or not an artifact.
    """
    manifest = store.read_manifest(path, DeployManifest)
    if manifest.backend not in BACKENDS or manifest.artifact not in manifest.files:
        raise PackageError(f"{path} is for the backend {manifest.backend!r} and does not hold a file for it")
    store.verify(path, manifest.files)
    return Deployed(path=path, manifest=manifest)


def open_runner(deployed: Deployed) -> Runner:
    """The artifact, ready to run; close it with `with`.

    Raises:
        PackageError: It does not fit this machine's version or GPU.
        DependencyError: Its runtime or its GPU is missing.
    """
    module = BACKENDS[deployed.manifest.backend]
    try:
        config = module.Config.model_validate_json(json.dumps(deployed.manifest.config))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise PackageError(f"{deployed.path}: its configuration is not valid: {where}: {first['msg']}") from error
    about = deployed.manifest
    signature = Signature(inputs=about.inputs, outputs=about.outputs)
    runner: Runner = module.open(deployed.artifact, config=config, signature=signature, meta=about.meta)
    return runner
