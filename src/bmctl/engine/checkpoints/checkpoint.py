"""Checkpoints of one training loop: RUN/checkpoints/STAGE/step-NNNNNNNN, published whole or not at all.

KIND-rank-N.safetensors   what rank N wrote of each kind of tensors: its shards, and on rank 0 all that is not sharded
index.json                which slice of which tensor lies where
state.json                position, best value, scaler, and per rank every generator's state and running sums
manifest.json             what it is a checkpoint of, and the size and hash of every file

`saver` writes them. They are read here by any number of processes, sharded in any way.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch.distributed.tensor import DTensor

from bmctl import store
from bmctl.disk import disk_errors, hidden_sibling, reach, remove_leftovers
from bmctl.engine.checkpoints import pieces
from bmctl.engine.checkpoints.pieces import Entry, Index, Piece
from bmctl.engine.checkpoints.state import KINDS as KINDS
from bmctl.engine.checkpoints.state import CheckpointManifest as CheckpointManifest
from bmctl.engine.checkpoints.state import Identity as Identity
from bmctl.engine.checkpoints.state import Snapshot as Snapshot
from bmctl.engine.checkpoints.state import State as State
from bmctl.engine.checkpoints.state import Tensors as Tensors
from bmctl.engine.checkpoints.state import check_identity as check_identity
from bmctl.errors import FormatError, PackageError

STATE = "state.json"
INDEX = "index.json"

# -- the folder ---------------------------------------------------------------------------------------


def folder_of(run: Path, stage: str) -> Path:
    return run / "checkpoints" / stage


def steps_in(folder: Path) -> list[int]:
    """Steps of the published checkpoints, oldest first."""
    found = (re.fullmatch(r"step-(\d{8,})", path.name) for path in folder.glob("step-*"))
    return sorted(int(match[1]) for match in found if match)


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def check_room(folder: Path, model: torch.nn.Module, *, with_ema: bool = False) -> None:
    """Before the first step: is there room for a checkpoint, and can one be written, synced and renamed?

    Args:
        model: Whole or sharded.
        with_ema: An average of its weights is saved too.

    Raises:
        ResourceError: No; it says how many bytes are needed.
    """
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    # Model, two moments and the best weights, with one checkpoint kept while the next is written.
    store.check_room(folder, size_bytes=2 * ((4 + with_ema) * weights + 2**20))


def find_newest(folder: Path, *, note: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that verifies; worse ones are set aside as ``.corrupt``, and said aloud.

    What a killed process left half done is cleared away, and `latest` points to what was found.

    Raises:
        FormatError: Another version of bmctl made it.
        ResourceError: The folder cannot be written.
    """
    if not folder.is_dir():
        return None
    with disk_errors(folder / "latest"):
        remove_leftovers(folder)
        for step in reversed(steps_in(folder)):
            path = path_of(folder, step)
            try:
                verified(path)
            except FormatError:
                raise  # nothing is wrong with it: whoever made it can go on from it
            except PackageError as error:
                note(f"{error.message}; set aside as {set_aside(path).name}")
                continue
            point_latest(folder, path.name)
            return path
        point_latest(folder, None)
    return None


def point_latest(folder: Path, name: str | None) -> None:
    """Let `latest` be a link to the checkpoint `name`; without one there is none."""
    link = folder / "latest"
    if name is None:
        if link.is_symlink():
            link.unlink()
    elif not link.is_symlink() or str(link.readlink()) != name:
        store.replace_link(link, name)


def set_aside(path: Path) -> Path:
    """Rename a checkpoint that does not verify; returns its new name."""
    aside, count = path.with_name(f"{path.name}.corrupt"), 1
    while aside.exists():
        count += 1
        aside = path.with_name(f"{path.name}.corrupt-{count}")
    path.rename(aside)
    return aside


def remove(path: Path) -> None:
    """Remove a directory so that a process killed meanwhile leaves it whole, or hidden and to be cleared away."""
    hidden = hidden_sibling(path, "tmp")
    path.rename(hidden)
    try:
        reach("store:removing")
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def discard(folder: Path) -> None:
    """Remove all checkpoints of a stage that is begun again.

    Raises:
        ResourceError: The disk says no.
    """
    with disk_errors(folder):
        if folder.is_dir():
            remove_leftovers(folder.parent)
            remove(folder)


# -- reading ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that verified; its tensors are read when they are asked for."""

    path: Path
    manifest: CheckpointManifest
    state: State
    index: Index
    _files: dict[str, Any]

    def names(self, kind: str) -> list[str]:
        """Of the tensors of a kind."""
        return list(self.index.tensors.get(kind, {}))

    def entry(self, kind: str, name: str) -> Entry:
        """Whole shape, dtype and pieces of a tensor.

        Raises:
            PackageError: There is none of that name.
        """
        found = self.index.tensors.get(kind, {}).get(name)
        if found is None:
            raise PackageError(f"{self.path} does not fit this training: it has no {kind} tensor {name}")
        return found

    def read(self, kind: str, name: str, like: torch.Tensor | None = None) -> torch.Tensor:
        """A tensor, whole, on the CPU; or what this process needs of it.

        Args:
            kind: One of KINDS.
            like: Of the same shape. The result is on its device; for a DTensor, it is one that is spread in the same
                way, and only this process's slices are read.

        Raises:
            PackageError: There is no such tensor, it has another shape, or its file cannot be read.
        """
        entry = self.entry(kind, name)
        if like is not None and tuple(like.shape) != entry.shape:
            raise PackageError(
                f"{self.path} does not fit this training: {kind} {name} has shape {list(entry.shape)} there, "
                f"{list(like.shape)} here"
            )
        box = tuple((0, size) for size in entry.shape) if like is None else pieces.held_box(like)
        assert box is not None, "a process that holds no part of a tensor does not read it"
        try:
            found = pieces.assemble(entry, box, read=self._read)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise PackageError(f"{self.path}: {kind} {name} cannot be read: {error}") from error
        if isinstance(like, DTensor):
            return pieces.like_dtensor(found, like)
        return found if like is None else found.to(like.device)

    def _read(self, piece: Piece, source: tuple[slice, ...]) -> torch.Tensor:
        file = self._files[piece.file]
        return file.get_slice(piece.key)[source] if source else file.get_tensor(piece.key)


def open_checkpoint(path: Path, *, verify: bool = True) -> Checkpoint:
    """Open a checkpoint's directory, or `latest`.

    Args:
        path: The directory.
        verify: Hash every file; False only where that was just done.

    Raises:
        PackageError: Missing, corrupt, incomplete, of another format, or its index does not match its files.
    """
    path = path.resolve() if path.is_symlink() else path
    manifest = verified(path, hashes=verify)
    try:
        state = State.model_validate_json(store.read_regular(path / STATE))
        index = Index.model_validate_json(store.read_regular(path / INDEX))
        files = {name: safe_open(path / name, "pt") for name in manifest.files if name not in (STATE, INDEX)}
    except (SafetensorError, ValidationError, OSError) as error:
        raise PackageError(f"{path} cannot be read: {error}") from error
    if state.step != manifest.step:
        raise PackageError(f"{path}: its manifest is of step {manifest.step}, its state of step {state.step}")
    check_index(path, index, files, world=manifest.world)
    return Checkpoint(path, manifest, state, index, files)


def check_index(path: Path, index: Index, files: dict[str, Any], *, world: int) -> None:
    """Hold the index against the headers of the files.

    Raises:
        PackageError: It names what is not there, or leaves out what is, or the pieces of a tensor do not fill it.
    """
    unread = {(name, key) for name, file in files.items() for key in file.keys()}  # noqa: SIM118  (no dict)
    for kind, tensors in index.tensors.items():
        if kind not in KINDS:
            raise PackageError(f"{path / INDEX} holds tensors of an unknown kind {kind!r}")
        for name, entry in tensors.items():
            what = f"{path / INDEX}: {kind} {name}"
            if len(entry.pieces) > world:
                raise PackageError(f"{what} has more pieces than there were processes")
            for piece in entry.pieces:
                if piece.file not in files or not re.fullmatch(rf"{kind}-rank-\d+\.safetensors", piece.file):
                    raise PackageError(f"{what} is said to be in {piece.file!r}, which is no such file of it")
                if (piece.file, piece.key) not in unread:
                    raise PackageError(f"{what}: {piece.file} has no {piece.key!r}, or it is of another tensor")
                unread.remove((piece.file, piece.key))
                there = files[piece.file].get_slice(piece.key)
                if (tuple(there.get_shape()), there.get_dtype()) != (piece.shape, entry.dtype):
                    raise PackageError(f"{what} has another shape or dtype in {piece.file}")
            pieces.check_entry(entry, what=what)
    if unread:
        raise PackageError(f"{path / INDEX} leaves out {sorted(unread)[0][1]!r} of {sorted(unread)[0][0]}")


def verified(path: Path, *, hashes: bool = True) -> CheckpointManifest:
    """The manifest of a checkpoint whose files are what it says.

    Raises:
        PackageError: Something is missing, changed or added, or it is no checkpoint.
    """
    manifest = store.read_manifest(path, CheckpointManifest)
    for name in (INDEX, STATE):
        if name not in manifest.files:
            raise PackageError(f"{path / store.MANIFEST} does not record {name}")
    if hashes:
        store.verify(path, manifest.files)
    return manifest
