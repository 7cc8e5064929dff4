"""What the save protocol does to the disk, in small steps: sync, swap, lock, clean up, and say plainly what failed."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from bmctl.errors import BmctlError, ResourceError

_DISK_ERRNOS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is larger than this process or file system may write",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "operation not permitted",
    errno.EIO: "the disk reports an input/output error",
    errno.ENAMETOOLONG: "the path is too long",
    errno.ENOTDIR: "a part of the path is a file, not a directory",
    errno.ELOOP: "the path runs through a loop of symbolic links",
    errno.EMFILE: "too many open files",
}


def reach(point: str) -> None:
    """Mark a point of the save protocol, where a test may break it.

    ``BMCTL_FAULT=POINT[@RANK][=ERRNO]`` kills the process there, or fails with that errno, on every rank or on one.
    """
    wanted, _, code = os.environ.get("BMCTL_FAULT", "").partition("=")
    wanted, _, rank = wanted.partition("@")
    if wanted != point or (rank and rank != os.environ.get("RANK", "0")):
        return
    if code:
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))
    os.kill(os.getpid(), signal.SIGKILL)


# -- errors of the disk -----------------------------------------------------------------------------


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what the file system says while `path` is written into a ResourceError that names it."""
    try:
        yield
    except BmctlError:
        raise
    except Exception as error:
        code = _errno_of(error)
        if code not in _DISK_ERRNOS or not _concerns(error, path):
            raise
        raise ResourceError(
            f"cannot write {path}: {_DISK_ERRNOS[code]}",
            hint="free some space, or name another place with -o RUN"
            if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            else "name a directory that you may write to with -o RUN",
        ) from error


def _errno_of(error: Exception) -> int:
    if isinstance(error, OSError):
        return error.errno or 0
    # safetensors writes in Rust and passes the system's error on as text.
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else 0


def _concerns(error: Exception, path: Path) -> bool:
    """Whether the error is about `path`'s surroundings, not about some other file read meanwhile."""
    names = [name for name in (getattr(error, "filename", None), getattr(error, "filename2", None)) if name]
    if not names:
        return True
    around = os.path.abspath(path.parent)  # noqa: PTH100  (resolve() would follow links)
    paths = [os.path.abspath(os.fsdecode(name)) for name in names]  # noqa: PTH100
    return any(one.startswith(around) or around.startswith(one) for one in paths)


def remove_leftovers(directory: Path) -> None:
    """Remove the hidden temporaries of processes that no longer live; put back what a broken swap left aside."""
    for path in directory.glob(".*"):
        found = re.fullmatch(r"\.(.+)\.(tmp|old)-(\d+)-[0-9a-f]{8}", path.name)
        if not found or _is_maker_alive(int(found[3]), path) or _is_held(path):
            continue
        target = directory / found[1]
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)
        elif found[2] == "old" and not target.exists():
            path.rename(target)
        else:
            shutil.rmtree(path, ignore_errors=True)


def write_atomic(path: Path, data: bytes) -> None:
    """Write one file so that readers, and a crash, see the old bytes or the new ones.

    Raises:
        ResourceError: The disk is full, read-only or not ours.
    """
    with disk_errors(path):
        temporary = hidden_sibling(path, "tmp")
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            reach("store:atomic-written")
            temporary.replace(path)
            reach("store:atomic-renamed")
            sync_directory(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def append(path: Path, data: bytes) -> None:
    """Add to a file, all of it or nothing, so that what follows can still be read.

    Raises:
        ResourceError: The disk is full, read-only or not ours.
    """
    with disk_errors(path), path.open("ab", buffering=0) as file:
        before, left = file.tell(), memoryview(data)
        try:
            while left:  # a disk that fills up takes a part first
                left = left[file.write(left) :]
        except OSError:
            file.truncate(before)
            raise


def replace_link(link: Path, target_name: str) -> None:
    """Point the symbolic link `link` at its sibling `target_name`, atomically.

    Raises:
        ResourceError: The directory cannot be written.
    """
    if PurePosixPath(target_name).name != target_name:
        raise ValueError(f"{target_name!r} is not the name of a sibling")
    with disk_errors(link):
        temporary = hidden_sibling(link, "tmp")
        try:
            temporary.symlink_to(target_name)
            reach("store:link-made")
            temporary.replace(link)
            reach("store:link-renamed")
            sync_directory(link.parent)
            reach("store:link-synced")
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def check_room(directory: Path, *, size_bytes: int) -> None:
    """Check that `size_bytes` fit into `directory`, and that a file can be written, synced and renamed there.

    Raises:
        ResourceError: Too little room, or the directory cannot be written.
    """
    with disk_errors(directory / "probe"):
        directory.mkdir(parents=True, exist_ok=True)
        reach("store:probe")
        probe = hidden_sibling(directory / "probe", "tmp")  # so named, a killed process's is cleared away
        write_atomic(probe, b"probe\n")
        reach("store:probed")
        probe.unlink()
        free = shutil.disk_usage(directory).free
    if free < size_bytes:
        raise ResourceError(
            f"{directory} has {free:,} bytes free; {size_bytes:,} are needed",
            hint="free some space, or name another place with -o RUN",
        )


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold `run` for this process; a lock left by a dead process counts for nothing.

    Raises:
        ResourceError: Another process holds it (its pid is named), or the directory cannot be written.
    """
    path = run / ".lock"
    with disk_errors(path):
        run.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(handle, 64).decode(errors="replace").strip() or "unknown"
            raise ResourceError(
                f"{run} is in use by another bmctl, process {holder}",
                hint=f"wait for it, stop it (kill {holder}), or name another run with -o",
            ) from error
        with disk_errors(path):
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(handle)


# -- steps of publishing -----------------------------------------------------------------------------


def hidden_sibling(path: Path, kind: str) -> Path:
    """A fresh name beside `path` that says which process made it: ``.NAME.KIND-PID-RANDOM``."""
    return path.with_name(f".{path.name}.{kind}-{os.getpid()}-{secrets.token_hex(4)}")


def renameat2(source: Path, target: Path, *, flags: int) -> bool:
    """Linux's renameat2; False where the system or file system has none.

    Source: https://man7.org/linux/man-pages/man2/rename.2.html
    """
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    here = -100  # AT_FDCWD
    if call(here, os.fsencode(source), here, os.fsencode(target), ctypes.c_uint(flags)) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    if code == errno.EEXIST:
        raise ResourceError(f"{target} exists; nothing finished is overwritten", hint="add --overwrite to redo it")
    raise OSError(code, os.strerror(code), str(source), None, str(target))


def sync_tree(directory: Path) -> None:
    """fsync every file and directory below `directory`, and itself; refuses symbolic links."""
    for root, folders, files in os.walk(directory, topdown=False):
        for name in folders + files:
            path = Path(root, name)
            if path.is_symlink():
                raise ValueError(f"{path} is a symbolic link; published directories hold regular files only")
        for name in files:
            handle = os.open(Path(root, name), os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        sync_directory(Path(root))


def sync_directory(directory: Path) -> None:
    """fsync a directory: only then do its names outlive a power cut."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _is_maker_alive(pid: int, path: Path) -> bool:
    """Whether the process that made `path` lives; one that started later only has the same number, as in containers."""
    if not _is_alive(pid):
        return False
    with suppress(OSError, ValueError, IndexError):
        ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
        age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
        return path.lstat().st_ctime > time.time() - age_s - 1.0
    return True


def _is_held(path: Path) -> bool:
    """Whether a publisher, perhaps of another container, still works in this directory."""
    with suppress(OSError):
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(handle)
    return False
