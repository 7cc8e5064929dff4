"""A deployed artifact: a model's graphs for one runtime, with the manifest that says what they are and how proven."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from bmctl import __version__, store
from bmctl.backends import BACKENDS
from bmctl.core import onnxfile, owncode
from bmctl.core.runner import Runner
from bmctl.engine.artifacts.parity import Parity
from bmctl.engine.artifacts.recording import Call
from bmctl.errors import PackageError
from bmctl.inputs import InputSpec, Resolved
from bmctl.package import read_files
from bmctl.schema import Signature, Span, Strict
from bmctl.store import FileRecord

SAMPLE = "sample.safetensors"
"""Calls and the reference's outputs: parity can be checked again on any machine."""


class DeployedPart(Strict):
    """One graph.

    Attributes:
        artifact: Name of its file.
        precision: Of the graph: ``fp32``, ``fp16``, ``bf16`` or ``int8``.
        parity: Against the reference, on recorded calls; None where it was not run.
        meta: What the backend records: version, capabilities, profile, hash.
    """

    artifact: str
    signature: Signature
    precision: str
    parity: Parity | None
    meta: dict[str, Any]


class DeployManifest(Strict):
    """What an artifact is.

    Attributes:
        backend: Name in BACKENDS.
        config: Of the backend.
        package: Hash of the package that it was built from.
        parts: Its graphs by name.
        axes: Sizes that it was asked to serve; backends that leave axes free take any.
        input: How samples become what the parts take; `task` and `facts` as in the package.
        precision: The coarsest of the parts.
        status: Whether it ran where it was built.
        reason: Why it was not run.
        machine: Where it was built.
        command_elsewhere: What builds its sibling for other GPUs, on the machine that has one.
    """

    format: Literal[2] = 2
    bmctl: str = __version__
    backend: str
    config: dict[str, Any]
    package: str
    parts: dict[str, DeployedPart]
    axes: dict[str, Span]
    input: InputSpec | None
    task: dict[str, Any] | None
    facts: dict[str, Any] | None
    precision: str
    status: Literal["ran", "built, not run"]
    reason: str = ""
    machine: dict[str, Any]
    files: dict[str, FileRecord]
    command_elsewhere: str = ""


@dataclass(frozen=True)
class Deployed:
    path: Path
    manifest: DeployManifest

    @property
    def artifacts(self) -> dict[str, Path]:
        """The runtime's files, by part."""
        return {part: self.path / one.artifact for part, one in self.manifest.parts.items()}

    @property
    def given(self) -> Resolved | None:
        """How samples become what its parts take; None where nobody knows."""
        return None if self.manifest.input is None else Resolved(self.manifest.input, read_files(self.path))

    @property
    def hash(self) -> str:
        """SHA-256 of the manifest: the artifact's identity."""
        return store.manifest_hash(self.path)


def open_deployed(path: Path) -> Deployed:
    """Open RUN/deploy/<backend>, with every file's hash checked.

    Raises:
        PackageError: Missing, corrupt, incomplete, of another format, or not an artifact.
    """
    owncode.open_beside(store.read_regular(path / store.MANIFEST).decode(errors="replace"), path)
    manifest = store.read_manifest(path, DeployManifest)
    held = {part.artifact for part in manifest.parts.values()}
    if manifest.backend not in BACKENDS or not held or held - set(manifest.files):
        raise PackageError(f"{path} is for the backend {manifest.backend!r} and does not hold a file for it")
    store.verify(path, manifest.files)
    return Deployed(path=path, manifest=manifest)


def open_runners(deployed: Deployed, stack: ExitStack) -> dict[str, Runner]:
    """Its graphs, ready to run; `stack` closes them.

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
    runners: dict[str, Runner] = {}
    for part, one in deployed.manifest.parts.items():
        path = deployed.artifacts[part]
        if path.suffix == ".onnx":
            onnxfile.check_onnx(path)  # its hash says that it is what the manifest names, not who wrote both
        runners[part] = stack.enter_context(module.open(path, config=config, signature=one.signature, meta=one.meta))
    return runners


# -- the sample -------------------------------------------------------------------------------------


def save_sample(path: Path, calls: Iterable[Call]) -> None:
    """One call of each part, under ``PART/inputs/NAME`` and ``PART/outputs/NAME``."""
    arrays: dict[str, np.ndarray] = {}
    for call in calls:
        for kind, found in (("inputs", call.feed), ("outputs", call.outputs)):
            arrays |= {f"{call.part}/{kind}/{name}": np.ascontiguousarray(array) for name, array in found.items()}
    save_file(arrays, path)


def read_sample(deployed: Deployed) -> list[Call]:
    """What `save_sample` wrote.

    Raises:
        PackageError: It does not hold what the parts take and give.
    """
    try:
        arrays: dict[str, Any] = load_file(deployed.path / SAMPLE)
        return [
            Call(
                part,
                one.signature,
                {spec.name: arrays[f"{part}/inputs/{spec.name}"] for spec in one.signature.inputs},
                {spec.name: arrays[f"{part}/outputs/{spec.name}"] for spec in one.signature.outputs},
            )
            for part, one in deployed.manifest.parts.items()
        ]
    except (KeyError, ValueError, OSError, SafetensorError) as error:
        raise PackageError(f"its {SAMPLE} does not hold its inputs and outputs: {error}") from error
