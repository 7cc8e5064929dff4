"""The save protocol: a published directory is whole or is not there.

`publishing` fills a hidden sibling, syncs every file, renames, syncs the parent. A process killed at any
moment leaves the old state or the new one, and at most a hidden leftover that the next publisher removes.
Promised for local POSIX file systems only.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

from pydantic import Field, ValidationError

from bmctl.disk import append as append
from bmctl.disk import check_room as check_room
from bmctl.disk import (
    disk_errors,
    reach,
    remove_leftovers,
    renameat2,
    sync_directory,
    sync_tree,
)
from bmctl.disk import hidden_sibling as hidden_sibling
from bmctl.disk import locked as locked
from bmctl.disk import replace_link as replace_link
from bmctl.disk import write_atomic as write_atomic
from bmctl.errors import FormatError, PackageError, ResourceError
from bmctl.schema import Strict

MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 64 * 2**20

T = TypeVar("T", bound=Strict)


class FileRecord(Strict):
    """One file of a published directory."""

    size_bytes: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


# -- publishing -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unpublished:
    """A directory that is being filled, and not yet there for anybody.

    Attributes:
        path: Hidden, beside `target`; other processes may write into it too.
        handle: Holds the lock that tells others that somebody is still at work here.
    """

    target: Path
    path: Path
    overwrite: bool
    handle: int


def begin_publishing(target: Path, *, overwrite: bool = False) -> Unpublished:
    """Make the hidden directory; `commit` or `abandon` must follow.

    Raises:
        ResourceError: `target` exists, or the disk is full, read-only or not ours.
    """
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        _refuse_existing(target, overwrite=overwrite)
        remove_leftovers(target.parent)
        temporary = hidden_sibling(target, "tmp")
        temporary.mkdir()
        draft = Unpublished(target, temporary, overwrite, os.open(temporary, os.O_RDONLY | os.O_DIRECTORY))
        try:
            fcntl.flock(draft.handle, fcntl.LOCK_EX)
            reach("store:begun")
        except BaseException:
            abandon(draft)
            raise
        return draft


def commit(draft: Unpublished) -> None:
    """Sync every file, rename, sync the parent: the draft becomes its target, durably and at once.

    The manifest (`write_manifest`) must have been written, last of all. After an error `abandon` must follow.

    Raises:
        ResourceError: The target was made by another process meanwhile, or the disk says no.
    """
    with disk_errors(draft.target):
        reach("store:written")
        if not (draft.path / MANIFEST).is_file():
            raise ValueError(f"nothing wrote {MANIFEST} for {draft.target}")
        sync_tree(draft.path)
        reach("store:synced")
        _refuse_existing(draft.target, overwrite=draft.overwrite)
        old = _move_into_place(draft.path, draft.target, overwrite=draft.overwrite)
        reach("store:renamed")
        sync_directory(draft.target.parent)
        reach("store:done")
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)
        os.close(draft.handle)


def abandon(draft: Unpublished) -> None:
    """Remove what was written; what was published already stays."""
    shutil.rmtree(draft.path, ignore_errors=True)
    os.close(draft.handle)


@contextmanager
def publishing(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a hidden directory beside `target`; when the block ends well it becomes `target`, durably and at once.

    The block writes its files and, last of all, the manifest (`write_manifest`).

    Args:
        target: The directory to publish; parents are made.
        overwrite: Swap an existing directory for the new one; the old one is removed after the swap.

    Raises:
        ResourceError: `target` exists, or the disk is full, read-only or not ours.
    """
    draft = begin_publishing(target, overwrite=overwrite)
    try:
        with disk_errors(target):
            yield draft.path
            commit(draft)
    except BaseException:
        abandon(draft)
        raise


# -- manifests and hashes ---------------------------------------------------------------------------


def hash_file(path: Path) -> FileRecord:
    """Size and SHA-256 of a regular file; symbolic links are not followed.

    Raises:
        PackageError: It is missing, not a regular file, or cannot be read.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise PackageError(f"{path} is missing") from error
    except OSError as error:
        why = "is a symbolic link" if path.is_symlink() else f"cannot be read: {error.strerror}"
        raise PackageError(f"{path} {why}") from error
    with os.fdopen(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise PackageError(f"{path} is not a regular file")
        digest = hashlib.file_digest(file, "sha256")
        return FileRecord(size_bytes=file.tell(), sha256=digest.hexdigest())


def records(directory: Path) -> dict[str, FileRecord]:
    """Every file below `directory` but its manifest, by its path with forward slashes."""
    return {name: hash_file(directory / name) for name in sorted(_list_files(directory)) if name != MANIFEST}


def write_manifest(directory: Path, manifest: Strict) -> None:
    """Write `manifest.json`, canonically: sorted keys, no nan, a newline at the end."""
    # In mode "json" pydantic would write nan as null.
    text = json.dumps(manifest.model_dump(), sort_keys=True, indent=1, allow_nan=False, ensure_ascii=False)
    with disk_errors(directory / MANIFEST):
        (directory / MANIFEST).write_bytes(text.encode() + b"\n")


def read_manifest(directory: Path, model: type[T]) -> T:
    """The manifest of a published directory.

    Raises:
        PackageError: It is missing, not JSON, made by a newer or an older bmctl, or not such a manifest.
    """
    path = directory / MANIFEST
    raw = read_regular(path)
    try:
        fields = json.loads(raw.decode(), parse_constant=_refuse_constant, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise PackageError(f"{path} is not valid JSON: {error}{foreign_note(path)}") from error
    _check_format(path, fields.get("format") if isinstance(fields, dict) else None, model)
    try:
        return model.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise PackageError(f"{path} is not a bmctl {model.__name__}: {where}: {first['msg']}") from error


def read_regular(path: Path) -> bytes:
    """The bytes of a small regular file; symbolic links are not followed.

    Raises:
        PackageError: It is missing, not a regular file, too large, or cannot be read.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise PackageError(f"{path} is missing", hint="name a package, or a run that has one") from error
    except OSError as error:
        why = "is a symbolic link" if path.is_symlink() else f"cannot be read: {error.strerror}"
        raise PackageError(f"{path} {why}") from error
    with os.fdopen(handle, "rb") as file:
        info = os.fstat(handle)
        if not stat.S_ISREG(info.st_mode) or info.st_size > MAX_MANIFEST_BYTES:
            raise PackageError(f"{path} is not a regular file of at most {MAX_MANIFEST_BYTES} bytes")
        return file.read()


def manifest_hash(directory: Path) -> str:
    """SHA-256 of the manifest, which holds every file's hash: the identity of a published directory."""
    return hash_file(directory / MANIFEST).sha256


def verify(directory: Path, files: Mapping[str, FileRecord]) -> None:
    """Check that `directory` holds exactly `files` and its manifest, as regular files with these bytes.

    Raises:
        PackageError: Names the file that is missing, extra, a link, of another size, or changed.
    """
    for name in files:
        check_name(name, where=directory / MANIFEST)
    present = set(_list_files(directory)) - {MANIFEST}
    hint = "copy the whole directory again, or run the stage that made it with --overwrite"
    for name in sorted(set(files) - present):
        raise PackageError(f"{directory}: {name} is missing", hint=hint)
    for name in sorted(present - set(files)):
        raise PackageError(f"{directory}: {name} is not in its manifest", hint="move it out of the directory")
    for name, record in sorted(files.items()):
        path = directory / name
        size = path.stat().st_size
        if size != record.size_bytes:
            note = foreign_note(path)
            raise PackageError(f"{path} has {size} bytes; its manifest says {record.size_bytes}{note}", hint=hint)
        if hash_file(path) != record:
            raise PackageError(f"{path} was changed: its SHA-256 is not the manifest's{foreign_note(path)}", hint=hint)


def check_name(name: str, *, where: Path) -> None:
    """Refuse the name of a file that would lie outside its directory.

    Raises:
        PackageError: It is empty, absolute, has `..`, a backslash or a control character, or is the manifest.
    """
    parts = name.split("/")
    if name == MANIFEST or "\\" in name or not name.isprintable() or any(part in ("", ".", "..") for part in parts):
        raise PackageError(f"{where} names the file {name!r}, which cannot belong to it")


def foreign_note(path: Path) -> str:
    """A remark to append to an error when `path` holds what downloads and clones leave instead of the real file."""
    try:
        with path.open("rb") as file:
            head = file.read(256)
    except OSError:
        return ""
    text = head.lstrip().lower()
    if text.startswith(b"version https://git-lfs"):
        return "; it is a Git LFS pointer, not the file itself: run `git lfs pull`"
    if text.startswith((b"<!doctype html", b"<html", b"<?xml")):
        return "; it is a web page, not the file itself: download it again, signed in if need be"
    if path.suffix == ".safetensors" and head.startswith((b"PK\x03\x04", b"\x80\x02")):
        return "; it is a pickle of PyTorch's, which is never loaded as a package"
    return ""


# -- details ----------------------------------------------------------------------------------------


def _refuse_existing(target: Path, *, overwrite: bool) -> None:
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise ResourceError(f"{target} is in the way: it is not a directory", hint=f"move it away: mv {target} ...")
    if target.exists() and not overwrite:
        raise ResourceError(f"{target} exists; nothing finished is overwritten", hint="add --overwrite to redo it")


def _move_into_place(temporary: Path, target: Path, *, overwrite: bool) -> Path | None:
    """Rename; returns the directory that holds the old state, if there was one."""
    if not target.exists():
        if not renameat2(temporary, target, flags=1):  # RENAME_NOREPLACE: also holds against an empty directory
            temporary.rename(target)
        return None
    if not overwrite:
        _refuse_existing(target, overwrite=False)
    if renameat2(temporary, target, flags=2):  # RENAME_EXCHANGE: there is no moment without a target
        return temporary
    old = hidden_sibling(target, "old")
    target.rename(old)
    try:
        reach("store:aside")
        temporary.rename(target)
    except OSError:
        old.rename(target)
        raise
    return old


def _list_files(directory: Path) -> Iterator[str]:
    """Names of all files below `directory`; links, pipes, sockets and empty directories are refused."""
    for root, folders, files in os.walk(directory):
        here = Path(root)
        if not folders and not files and here != directory:
            raise PackageError(f"{here} is an empty directory inside {directory}", hint=f"rmdir {here}")
        for name in folders + files:
            mode = (here / name).lstat().st_mode
            if stat.S_ISLNK(mode):
                raise PackageError(f"{here / name} is a symbolic link; packages hold regular files only")
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                raise PackageError(f"{here / name} is not a regular file")
        for name in files:
            yield (here / name).relative_to(directory).as_posix()


def _check_format(path: Path, found: object, model: type[Strict]) -> None:
    """Refuse the format of another version of bmctl in words; what is no format at all is left to the model."""
    (known,) = get_args(model.model_fields["format"].annotation)
    if type(found) is not int or found == known:
        return
    made, hint = "an older", "make it again with this bmctl: over it with --overwrite, or in another run with -o"
    if found > known:
        made, hint = "a newer", "pip install --upgrade bmctl"
    raise FormatError(f"{path} has format {found}, made by {made} bmctl; this one reads format {known}", hint=hint)


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is not a number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a key stands twice")
    return fields
