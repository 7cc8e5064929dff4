"""A model package: an immutable directory with a manifest, verified when it is opened.

Files: manifest.json, recipe.yaml (resolved); weights.safetensors, or graphs/<part>.onnx where it is frozen; in files/
what the input needs, such as a tokenizer.
"""

from __future__ import annotations

import json
import platform
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from bmctl import __version__, store
from bmctl.core import owncode
from bmctl.errors import PackageError, ResourceError
from bmctl.inputs import InputSpec, Resolved
from bmctl.models import ModelSpec
from bmctl.schema import Many, Signature, Span, Strict
from bmctl.store import FileRecord
from bmctl.weights import save_weights

if TYPE_CHECKING:
    from torch import nn

RECIPE = "recipe.yaml"
WEIGHTS = "weights.safetensors"
GRAPHS = "graphs"
FILES = "files"
PART = "model"
"""The one graph of a model that needs no more, and of a foreign file."""
_RECORDED = ("torch", "torchvision", "timm", "transformers", "numpy", "safetensors", "onnx", "nncf", "torch-pruning")


class Structure(Strict):
    """One compression step that a package went through: its configuration and what `restore` needs of it."""

    step: dict[str, Any]
    meta: dict[str, Any]


class Manifest(Strict):
    """What a package is.

    Attributes:
        format: Of this file; no other is read.
        stage: Name of the stage that made the package, such as ``train``.
        key: Hash of all inputs of that stage; equal keys mean that there is nothing to do again.
        parent: Hash of the package it was made from.
        original: Hash of the run's first package; None in that one.
        model: How to build the module; None for a foreign graph.
        frozen: Carries graphs in place of weights.
        parts: Its graphs by name, made or to be made: one for a classifier.
        axes: Sizes of a foreign graph's free axes but the batch, as they were found by trying it.
        input: How samples become what the parts take: the Spec of one of INPUTS; None where nobody knows.
        task: Its Config.
        facts: What the task knows of its data, such as the names of the classes.
        aliases: Tensors that share another one's memory (tied weights): their names, and the one that is stored.
        history: Compression steps, oldest first.
        metrics: ``val`` {metric, value, low, high, baseline}, num_params, macs, size_bytes, latency_ms, ...
        files: Every other file of the package.
    """

    format: Literal[2] = 2
    bmctl: str = __version__
    stage: str
    key: str
    parent: str | None = None
    original: str | None = None
    model: ModelSpec | None = None
    frozen: bool = False
    parts: dict[str, Signature] = Field(default_factory=dict)
    axes: dict[str, Span] = Field(default_factory=dict)
    input: InputSpec | None = None
    task: dict[str, Any] | None = None
    facts: dict[str, Any] | None = None
    history: Many[Structure] = ()
    aliases: dict[str, str] = Field(default_factory=dict)
    metrics: dict[str, Any] = Field(default_factory=dict)
    data_fingerprint: str | None = None
    calibration: dict[str, Any] | None = None
    notes: Many[str] = ()
    versions: dict[str, str] = Field(default_factory=dict)
    files: dict[str, FileRecord] = Field(default_factory=dict)


@dataclass(frozen=True)
class ModelPackage:
    path: Path
    manifest: Manifest

    @property
    def hash(self) -> str:
        """SHA-256 of the manifest: the package's identity."""
        return store.manifest_hash(self.path)

    @property
    def given(self) -> Resolved | None:
        """How samples become what its parts take; None where nobody knows, as of a foreign graph."""
        return None if self.manifest.input is None else Resolved(self.manifest.input, read_files(self.path))

    @property
    def weights(self) -> Path:
        return self.path / WEIGHTS

    @property
    def graphs(self) -> dict[str, Path]:
        """Of a frozen package, by part."""
        return {part: self.path / GRAPHS / f"{part}.onnx" for part in self.manifest.parts}


# -- reading ----------------------------------------------------------------------------------------


def open_package(path: Path, *, verify: bool = True) -> ModelPackage:
    """Open a package's directory.

    Args:
        path: The directory.
        verify: Hash every file; False only where that was just done.

    Raises:
        PackageError: Missing, corrupt, incomplete, of another format, or not a package.
    """
    owncode.open_beside(store.read_regular(path / store.MANIFEST).decode(errors="replace"), path)
    manifest = store.read_manifest(path, Manifest)
    content = {f"{GRAPHS}/{part}.onnx" for part in manifest.parts} if manifest.frozen else {WEIGHTS}
    for name in sorted({RECIPE, *content} - set(manifest.files)):
        raise PackageError(f"{path / store.MANIFEST} does not record {name}, without which a package is none")
    if not manifest.frozen and manifest.model is None:
        raise PackageError(f"{path / store.MANIFEST} has weights but does not say of which model")
    if not manifest.parts:
        raise PackageError(f"{path / store.MANIFEST} names no part, without which there is nothing to run")
    if verify:
        store.verify(path, manifest.files)
    return ModelPackage(path=path, manifest=manifest)


def list_packages(run: Path) -> list[Path]:
    """The packages of a run, oldest stage first."""
    folder = run / "packages"
    found = [path for path in folder.iterdir() if _number(path) is not None] if folder.is_dir() else []
    return sorted(found, key=lambda path: (_number(path), path.name))


def find_package(source: str | Path) -> ModelPackage:
    """The package that `source` means: itself, or the newest one of a run.

    Raises:
        PackageError: There is nothing, a run without packages, or something else; or the package is corrupt.
    """
    path = Path(source)
    if not path.exists():
        raise PackageError(f"there is no package or run at {path}", hint="list yours with: ls -d runs/*")
    if not path.is_dir():
        raise PackageError(
            f"{path} is a file; a package is a directory with a {store.MANIFEST}{store.foreign_note(path)}",
            hint=f"import it first: bmctl import {path} -o RUN",
        )
    if _is_run(path):
        packages = list_packages(path)
        if not packages:
            raise PackageError(
                f"the run {path} has no package yet", hint=f"bmctl train --recipe {path / RECIPE} -o {path}"
            )
        return open_package(packages[-1])
    if not (path / store.MANIFEST).exists():
        raise PackageError(
            f"{path} is neither a package nor a run: it has no {store.MANIFEST}", hint="list yours with: ls -d runs/*"
        )
    return open_package(path)


# -- writing ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GraphFile:
    """A graph on its way into a package: the ONNX file, and the names of its data files beside it."""

    path: Path
    data: Sequence[str] = ()


def save_package(
    target: Path,
    *,
    manifest: Manifest,
    recipe_yaml: str,
    model: nn.Module | None = None,
    graphs: Mapping[str, GraphFile] | None = None,
    files: Mapping[str, bytes] | None = None,
    overwrite: bool = False,
) -> ModelPackage:
    """Publish a package; exactly one of `model` and `graphs` is given.

    Args:
        target: The package's directory, such as RUN/packages/00-train.
        manifest: All but `files`, `aliases`, `frozen`, `versions` and metrics' `size_bytes`, which are filled in here.
        recipe_yaml: The resolved recipe.
        model: Its parameters and buffers are saved; on any device.
        graphs: ONNX files by part; the package is frozen.
        files: What the input needs, by name.
        overwrite: Replace an existing package.

    Raises:
        DivergedError: A weight is nan or inf.
        ResourceError: The target exists, or the disk is full, read-only or not ours.
    """
    if (model is None) == (graphs is None):
        raise ValueError("a package holds a model or graphs")
    aliases: dict[str, str] = {}
    with store.publishing(target, overwrite=overwrite) as temporary:
        (temporary / RECIPE).write_text(recipe_yaml, encoding="utf-8")
        write_files(temporary, files or {})
        owncode.keep(recipe_yaml + manifest.model_dump_json(), temporary)
        if model is not None:
            aliases = save_weights(model, temporary / WEIGHTS)
        for part, graph in (graphs or {}).items():
            _copy_graph(graph, part=part, folder=temporary / GRAPHS)
        records = store.records(temporary)
        size_bytes = sum(one.size_bytes for name, one in records.items() if name.startswith((WEIGHTS, GRAPHS)))
        fields = manifest.model_dump() | {
            "metrics": {"size_bytes": size_bytes, **manifest.metrics},
            "frozen": graphs is not None,
            "aliases": aliases,
            "versions": installed_versions(),
            "files": {name: record.model_dump() for name, record in records.items()},
        }
        manifest = Manifest.model_validate_json(json.dumps(fields, allow_nan=False))
        store.write_manifest(temporary, manifest)
    return ModelPackage(path=target, manifest=manifest)


def _copy_graph(graph: GraphFile, *, part: str, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for name in graph.data:
        store.check_name(name, where=graph.path)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if (folder / name).exists():
            raise ResourceError(f"two parts of the package have a data file named {name}", hint="rename one of them")
        shutil.copyfile(graph.path.parent / name, folder / name)
    shutil.copyfile(graph.path, folder / f"{part}.onnx")


def read_files(folder: Path) -> dict[str, bytes]:
    """What the input of a package or an artifact needs, by name, as it was saved."""
    root = folder / FILES
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Put down what the input needs, so that `read_files` finds it."""
    for name, content in files.items():
        store.check_name(name, where=folder)
        (folder / FILES / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / FILES / name).write_bytes(content)


def adopt(package: ModelPackage, *, into: Path) -> ModelPackage:
    """`package` as the first of the run `into`: a copy, byte for byte, so with the same hash.

    Raises:
        ResourceError: That run starts with another package, or cannot be written to.
    """
    target = into / "packages" / f"00-{package.manifest.stage}"
    there = list_packages(into)
    if there and store.manifest_hash(there[0]) == package.hash:
        return open_package(there[0])
    if there:
        raise ResourceError(
            f"the run {into} starts with another package, {there[0].name}, than {package.path}",
            hint="name another run with -o, or add --overwrite to start over",
        )
    with store.publishing(target) as temporary:
        for name in (*package.manifest.files, store.MANIFEST):
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(package.path / name, temporary / name)
        store.verify(temporary, package.manifest.files)
    return ModelPackage(path=target, manifest=package.manifest)


def derive(
    parent: ModelPackage,
    *,
    stage: str,
    key: str,
    metrics: Mapping[str, Any],
    structure: Structure | None = None,
    calibration: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
) -> Manifest:
    """The manifest of a package that one more step makes of `parent`, to be handed to `save_package`."""
    old = parent.manifest
    return old.model_copy(
        update={
            "bmctl": __version__,
            "stage": stage,
            "key": key,
            "parent": parent.hash,
            "original": old.original or parent.hash,
            "history": (*old.history, structure) if structure else old.history,
            "metrics": dict(metrics),
            "calibration": dict(calibration) if calibration is not None else None,
            "notes": tuple(notes),
        }
    )


def installed_versions() -> dict[str, str]:
    """Versions of Python and of the packages that a saved model depends on, without importing them."""
    found = {"python": platform.python_version()}
    for name in _RECORDED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


# -- details ----------------------------------------------------------------------------------------


def _number(path: Path) -> int | None:
    found = re.match(r"(\d+)-", path.name)
    return int(found[1]) if found and path.is_dir() else None


def _is_run(path: Path) -> bool:
    """A run has packages/ or says so in its manifest; a package with a lost file is still a package."""
    if (path / "packages").is_dir():
        return True
    try:
        return bool(json.loads((path / store.MANIFEST).read_bytes()).get("kind") == "run")
    except (OSError, ValueError, AttributeError, RecursionError):
        return False
