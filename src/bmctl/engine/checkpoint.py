"""Checkpoints of one training loop: RUN/checkpoints/STAGE/step-NNNNNNNN, published whole or not at all.

model.safetensors      parameters and buffers by name
optimizer.safetensors  state by ``kind/parameter``
best.safetensors       parameters and buffers of the best validation so far, where that is another step
state.json             position, best value, and every generator's state, per rank
manifest.json          what it is a checkpoint of, and the size and hash of every file
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from bmctl import __version__, store
from bmctl.errors import DataError, DivergedError, PackageError
from bmctl.package import installed_versions
from bmctl.schema import Many, Strict

STATE = "state.json"
FILES = ("model", "optimizer", "best")
Tensors = dict[str, torch.Tensor]


class Identity(Strict):
    """What a checkpoint belongs to; it can be continued only by the same.

    Attributes:
        optimizer: Name of the optimizer.
        data_fingerprint: Of the training data.
        settings: Everything else that decides what the steps do.
    """

    optimizer: str
    data_fingerprint: str
    settings: dict[str, Any]


class CheckpointManifest(Strict):
    format: Literal[1] = 1
    bmctl: str = __version__
    stage: str
    step: int
    best_step: int | None
    num_steps: int
    identity: Identity
    world: int
    threads: int
    device: str
    parent: str | None
    versions: dict[str, str]
    files: dict[str, store.FileRecord]


class State(Strict):
    """Where a training loop stands.

    Attributes:
        step: Optimizer steps done.
        validated_step: The step of the last validation.
        best_value: Of the task's metric, at `best_step`.
        loss_sum: Over the samples of this epoch so far; likewise score_sum.
        num_seen: Samples of this epoch so far, over all ranks.
        seed: Of the sampler; with `epoch` and `num_seen` it says which sample comes next.
        random: Every rank's generators.
    """

    step: int = 0
    validated_step: int = 0
    best_step: int | None = None
    best_value: float | None = None
    loss_sum: float = 0.0
    score_sum: float = 0.0
    num_seen: int = 0
    seed: int = 0
    epoch: int = 0
    random: Many[dict[str, Any]] = ()


@dataclass(frozen=True)
class Snapshot:
    """All that a training loop needs to go on."""

    model: Tensors
    optimizer: Tensors
    best: Tensors
    state: State


def folder_of(run: Path, stage: str) -> Path:
    return run / "checkpoints" / stage


def steps_in(folder: Path) -> list[int]:
    """Steps of the published checkpoints, oldest first."""
    found = (re.fullmatch(r"step-(\d{8,})", path.name) for path in folder.glob("step-*"))
    return sorted(int(match[1]) for match in found if match)


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def check_room(folder: Path, model: torch.nn.Module) -> None:
    """Before the first step: is there room for a checkpoint, and can one be written, synced and renamed?

    Raises:
        ResourceError: No; it says how many bytes are needed.
    """
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    # Model, two moments and the best weights, with one checkpoint kept while the next is written.
    store.check_room(folder, size_bytes=2 * (4 * weights + 2**20))


def save(
    folder: Path, snapshot: Snapshot, *, step: int, keep: int, fields: Mapping[str, Any], note: Callable[[str], None]
) -> Path:
    """Publish a checkpoint, point `latest` at it, and remove the ones that are no longer needed.

    Args:
        folder: RUN/checkpoints/STAGE.
        snapshot: Tensors on any device.
        step: Optimizer steps done.
        keep: Newest checkpoints to keep, beside the best.
        fields: Of the manifest: stage, best_step, num_steps, identity, world, threads, device.
        note: Takes a sentence for the user.

    Raises:
        DivergedError: A tensor is not finite; nothing was published.
        ResourceError: The step is published already, or the disk says no.
    """
    for kind in FILES:
        _check_finite(getattr(snapshot, kind), what=f"{kind} after step {step}")
    older = steps_in(folder)
    parent = store.manifest_hash(path_of(folder, older[-1])) if older else None
    with store.publishing(path_of(folder, step)) as temporary:
        for kind in FILES:
            tensors = getattr(snapshot, kind)
            if tensors:
                # A copy each: safetensors refuses tensors that share memory, such as tied weights.
                save_file({name: _plain(one) for name, one in tensors.items()}, temporary / f"{kind}.safetensors")
        (temporary / STATE).write_text(snapshot.state.model_dump_json(), encoding="utf-8")
        manifest = CheckpointManifest(
            step=step, parent=parent, versions=installed_versions(), files=store.records(temporary), **fields
        )
        store.write_manifest(temporary, manifest)
    store.replace_link(folder / "latest", path_of(folder, step).name)
    _retain(folder, keep=keep, best_step=manifest.best_step, note=note)
    return path_of(folder, step)


def find_newest(folder: Path, *, note: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that verifies; worse ones are set aside as ``.corrupt``, and said aloud."""
    for step in reversed(steps_in(folder)):
        path = path_of(folder, step)
        try:
            _verified(path)
        except PackageError as error:
            aside = _set_aside(path)
            note(f"{error.message}; set aside as {aside.name}")
            continue
        return path
    return None


def load(path: Path) -> tuple[Snapshot, CheckpointManifest]:
    """Read a checkpoint that `find_newest` found.

    Raises:
        PackageError: It does not verify, or is not a checkpoint.
    """
    manifest = _verified(path)
    try:
        found = {kind: path / f"{kind}.safetensors" for kind in FILES}
        tensors = {kind: load_file(file) if file.name in manifest.files else {} for kind, file in found.items()}
        state = State.model_validate_json((path / STATE).read_bytes())
    except (SafetensorError, ValidationError, OSError) as error:
        raise PackageError(f"{path} cannot be read: {error}") from error
    return Snapshot(**tensors, state=state), manifest


def check_identity(path: Path, found: Identity, expected: Identity) -> None:
    """Refuse to go on from a checkpoint of another training.

    Raises:
        PackageError: Another optimizer or other settings.
        DataError: The data changed.
    """
    hint = "go on with the recipe and data it was begun with, or add --overwrite to start again"
    if found.optimizer != expected.optimizer:
        raise PackageError(
            f"{path} holds the state of {found.optimizer}; the recipe says {expected.optimizer}", hint=hint
        )
    if found.data_fingerprint != expected.data_fingerprint:
        raise DataError(f"{path} was made on other data: the data set changed since", hint=hint)
    changes = list(_changes(found.settings, expected.settings))
    if changes:
        raise PackageError(f"{path} was made by another recipe: {'; '.join(changes[:5])}", hint=hint)


def discard(folder: Path) -> None:
    """Remove all checkpoints of a stage that is begun again."""
    if folder.is_dir():
        shutil.rmtree(folder)


# -- details ----------------------------------------------------------------------------------------


def _verified(path: Path) -> CheckpointManifest:
    manifest = store.read_manifest(path, CheckpointManifest)
    for name in ("model.safetensors", STATE):
        if name not in manifest.files:
            raise PackageError(f"{path / store.MANIFEST} does not record {name}")
    store.verify(path, manifest.files)
    return manifest


def _set_aside(path: Path) -> Path:
    aside, count = path.with_name(f"{path.name}.corrupt"), 1
    while aside.exists():
        count += 1
        aside = path.with_name(f"{path.name}.corrupt-{count}")
    path.rename(aside)
    return aside


def _retain(folder: Path, *, keep: int, best_step: int | None, note: Callable[[str], None]) -> None:
    """Keep the best and the newest `keep` that verify; what does not verify is never deleted."""
    kept = 0
    for step in reversed(steps_in(folder)):
        path = path_of(folder, step)
        try:
            _verified(path)
        except PackageError as error:
            note(f"{error.message}; set aside as {_set_aside(path).name}")
            continue
        kept += 1
        if kept > keep and step != best_step:
            shutil.rmtree(path)


def _check_finite(tensors: Tensors, *, what: str) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise DivergedError(
                f"{what}: {name} is no longer finite; the checkpoints before it are kept",
                hint="lower the learning rate: --set train.optimizer.lr=...",
            )


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _changes(old: Any, new: Any, *, path: str = "") -> Iterator[str]:
    """Sentences on what differs, by dotted path."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _changes(old.get(key), new.get(key), path=f"{path}.{key}" if path else key)
    elif old != new:
        yield f"{path} was {old}, is {new}"
