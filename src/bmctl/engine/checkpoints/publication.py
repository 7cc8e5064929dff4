"""The two halves of a save: what every process writes of its own, and what the first one makes of it all."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bmctl import store
from bmctl.disk import disk_errors, reach
from bmctl.engine.checkpoints import checkpoint, pieces
from bmctl.engine.checkpoints.checkpoint import INDEX, STATE
from bmctl.engine.checkpoints.pieces import Entry
from bmctl.engine.checkpoints.state import KINDS, CheckpointManifest, State
from bmctl.engine.checkpoints.tensorfile import TensorFile
from bmctl.errors import DivergedError, PackageError
from bmctl.package import installed_versions
from bmctl.schema import Many, Strict

POINTS = (
    "begun",
    "copied",
    *(f"{kind}-{done}" for kind in KINDS for done in ("written", "synced")),
    "part-written",
    "agreed",
    "index-written",
    "state-written",
    "parts-removed",
    "manifest-written",
    "written",
    "synced",
    "renamed",
    "done",
    "link-made",
    "link-renamed",
    "link-synced",
    "removing",
    "retained",
)
"""What BMCTL_FAULT can name in a save, as ``store:POINT``, in the order in which they are reached.

Every rank comes from `copied` to `part-written`; all else is rank 0's. `removing` is reached where there is one
checkpoint too many.
"""
Stamps = tuple[tuple[str, int, int, int, int], ...]


class RankShare(Strict):
    """What one process tells the first one, in a file that is not published."""

    index: dict[str, dict[str, Entry]]
    files: dict[str, store.FileRecord]
    random: Many[dict[str, Any]]
    progress: Many[dict[str, float]]


def file_name(kind: str, rank: int) -> str:
    return f"{kind}-rank-{rank}.safetensors"


def write_part(
    folder: Path,
    files: Mapping[str, TensorFile],
    *,
    index: dict[str, dict[str, Entry]],
    state: State,
    rank: int,
    going_on: Callable[[], None],
) -> None:
    """Write this process's pieces of all tensors, durably.

    Args:
        folder: Hidden, and shared by all processes.
        files: By kind, filled.
        index: This process's pieces by kind and name.
        going_on: Called now and then; what it raises ends the writing.

    Raises:
        DivergedError: A tensor holds nan or inf.
        ResourceError: The disk says no.
    """
    for kind, file in files.items():
        # What a feed owns may well hold inf, such as the best return so far before there was one.
        name = file.find_non_finite() if kind != "task" else None
        going_on()
        if name is not None:
            raise DivergedError(
                f"{kind} after step {state.step}: {name} is no longer finite; the checkpoints before it are kept",
                hint="lower the learning rate: --set train.optimizer.lr=...",
            )
    records = {}
    with disk_errors(folder / STATE):
        for kind, file in files.items():
            if not file.is_empty:
                name = file_name(kind, rank)
                records[name] = file.write(folder / name, point=kind, going_on=going_on)
        part = RankShare(index=index, files=records, random=state.random, progress=state.progress)
        _write(folder / f"part-{rank}.json", part)
        reach("store:part-written")


def publish(
    draft: store.Unpublished, *, state: State, world: int, fields: Mapping[str, Any], parent: str | None
) -> CheckpointManifest:
    """On rank 0, once all parts are written: index, state and manifest; then the checkpoint is there.

    Args:
        fields: Of the manifest, without those that are known here.

    Raises:
        ResourceError: The disk says no, or the step was published by somebody else.
    """
    folder = draft.path
    with disk_errors(draft.target):
        reach("store:agreed")
        parts = [RankShare.model_validate_json((folder / f"part-{rank}.json").read_bytes()) for rank in range(world)]
        files = {name: record for part in parts for name, record in part.files.items()}
        files[INDEX] = _write(folder / INDEX, pieces.merge([part.index for part in parts]))
        reach("store:index-written")
        random = tuple(one for part in parts for one in part.random)
        progress = tuple(one for part in parts for one in part.progress)
        files[STATE] = _write(folder / STATE, state.model_copy(update={"random": random, "progress": progress}))
        reach("store:state-written")
        for rank in range(world):
            (folder / f"part-{rank}.json").unlink()
        reach("store:parts-removed")
        manifest = CheckpointManifest(
            step=state.step, parent=parent, versions=installed_versions(), files=files, **{"world": world, **fields}
        )
        store.write_manifest(folder, manifest)
        reach("store:manifest-written")
        store.commit(draft)
    return manifest


def retain(
    folder: Path, *, keep: int, best_step: int | None, known: dict[Path, Stamps], note: Callable[[str], None]
) -> None:
    """Keep the best and the newest `keep` that verify; what does not verify is set aside, never deleted.

    Args:
        known: Checkpoints that verified before, with what the file system said of their files then; brought up to date.
        note: Takes a sentence for the user.

    Raises:
        ResourceError: The disk says no.
    """
    kept = 0
    with disk_errors(folder / "latest"):
        for step in reversed(checkpoint.steps_in(folder)):
            path = checkpoint.path_of(folder, step)
            try:
                _verify(path, known)
            except PackageError as error:
                known.pop(path, None)
                note(f"{error.message}; set aside as {checkpoint.set_aside(path).name}")
                continue
            kept += 1
            if kept > keep and step != best_step:
                known.pop(path, None)
                checkpoint.remove(path)
        reach("store:retained")


def remember(path: Path, known: dict[Path, Stamps]) -> None:
    """That this checkpoint verifies, as long as the file system says that nobody touched it."""
    known[path] = _stamps(path)


def parent_of(folder: Path) -> str | None:
    """Hash of the newest checkpoint's manifest; None where there is none that can be read."""
    steps = checkpoint.steps_in(folder)
    try:
        return store.manifest_hash(checkpoint.path_of(folder, steps[-1])) if steps else None
    except PackageError:
        return None


def _verify(path: Path, known: dict[Path, Stamps]) -> None:
    # Hashing gigabytes again at every save costs more than writing them.
    before = _stamps(path)
    if known.get(path) != before:
        checkpoint.verified(path)
        known[path] = before


def _stamps(path: Path) -> Stamps:
    """Name, inode, size and times of everything in a checkpoint's directory."""
    with os.scandir(path) as found:
        infos = [(entry.name, entry.stat(follow_symlinks=False)) for entry in found]
    return tuple(sorted((name, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns) for name, info in infos))


def _write(path: Path, value: Strict) -> store.FileRecord:
    with path.open("xb") as file:
        file.write(value.model_dump_json().encode())
        file.flush()
        os.fsync(file.fileno())
    return store.hash_file(path)
