"""A run's directory: where it is, who may write to it, what its files are called.

Two recipes lie there. RUN/recipe.yaml is the run's: what its packages were made with, and what later commands start
from. logs/recipe.yaml is that of the command at work, with all that its flags said, for the processes that it starts.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from bmctl import __version__, store
from bmctl.core import owncode
from bmctl.disk import disk_errors, remove_leftovers
from bmctl.errors import PackageError, RecipeError, ResourceError, UsageError
from bmctl.job import Logs
from bmctl.recipe import Recipe, recipe_yaml

RUNS = Path("runs")
BEGIN_S = 5.0
"""How long the first machine of a job may take to make the run."""


def run_path(recipe: Recipe, output: str | None) -> Path:
    """`-o` always names a run; without it the recipe's name does, under runs/."""
    return Path(output) if output else RUNS / recipe.name


def is_run(path: Path) -> bool:
    """Whether `path` is a directory that bmctl made as a run."""
    try:
        return bool(json.loads((path / "manifest.json").read_bytes()).get("kind") == "run")
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def check_run(path: Path) -> None:
    """Refuse what is not a run.

    Raises:
        PackageError: `path` is not there, or something else.
    """
    if not is_run(path):
        raise PackageError(f"{path} is not a run", hint="list yours with: ls -d runs/*")


def newest_run() -> Path:
    """The run under runs/ that was written to last.

    Raises:
        PackageError: There is none.
    """
    runs = [path for path in RUNS.iterdir() if is_run(path)] if RUNS.is_dir() else []
    if not runs:
        raise PackageError(
            f"no run under {RUNS.resolve()}",
            hint="train one: bmctl train --recipe fashion-mnist, or name a package or run",
        )
    return max(runs, key=_used)


def _used(run: Path) -> int:
    """When a command last held the run, in ns."""
    return max(path.stat().st_mtime_ns for path in (run, run / "manifest.json", run / ".lock") if path.exists())


@contextmanager
def opened(path: Path, recipe: Recipe, *, kept: Recipe | None = None) -> Iterator[bool]:
    """Create the run or add to it, alone: a second process is refused while this one holds the lock.

    Where the recipe names several machines, their processes share the run: the first to come owns it, the others must
    have brought the same recipe.

    Args:
        recipe: Of this command.
        kept: What a new run takes for its own; None takes `recipe`. A run that is there keeps the one it has.

    Yields:
        Whether the run is this process's own; else it joined other machines.

    Raises:
        UsageError: `path` exists and is not a run.
        RecipeError: Another machine of this job came with another recipe.
        ResourceError: It cannot be written to, or another process is writing.
    """
    many = recipe.launch.nodes.max > 1
    if path.exists() and not is_run(path) and not (path.is_dir() and _is_free(path, many=many)):
        raise UsageError(f"{path} exists and is not a run of bmctl", hint="choose another directory: -o runs/NAME")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(
            f"cannot create {path}: {error.strerror}", hint="choose another directory: -o RUN"
        ) from error
    if many:
        with _shared(path, recipe, kept=kept or recipe) as owns:
            yield owns
        return
    with store.locked(path):
        for folder in (path, path / "logs", path / "evaluations"):  # where nothing is published that would clean up
            remove_leftovers(folder)
        _begin(path, recipe, kept=kept or recipe)
        yield True


def keep_recipe(path: Path, recipe: Recipe) -> None:
    """Make `recipe` the run's own: its packages were made with it."""
    text = recipe_yaml(recipe)
    if is_run(path) and (path / "recipe.yaml").is_file() and (path / "recipe.yaml").read_text(encoding="utf-8") == text:
        return
    owncode.keep(text, path)
    store.write_atomic(path / "recipe.yaml", text.encode())
    manifest = {"format": 1, "bmctl": __version__, "kind": "run", "name": recipe.name, "seed": recipe.seed}
    store.write_atomic(path / "manifest.json", (json.dumps(manifest, indent=2) + "\n").encode())


def _begin(path: Path, recipe: Recipe, *, kept: Recipe) -> None:
    """What a command leaves before it does anything else: its own recipe, and where there is no run yet, one."""
    if not is_run(path) or not (path / "recipe.yaml").is_file():
        keep_recipe(path, kept)
    job = Logs(path).recipe
    with disk_errors(job):
        job.parent.mkdir(exist_ok=True)
    text = recipe_yaml(recipe)
    owncode.keep(text, job.parent)
    store.write_atomic(job, text.encode())


def _is_free(path: Path, *, many: bool) -> bool:
    """Whether a directory can become a run: empty, or what another machine of the same job has just begun to make."""
    names = {one.name for one in path.iterdir()}
    return not names or (many and all(name in (".lock", "recipe.yaml") or ".tmp-" in name for name in names))


@contextmanager
def _shared(path: Path, recipe: Recipe, *, kept: Recipe) -> Iterator[bool]:
    """Hold the run together with the other machines of one job."""
    lock = path / ".lock"
    with disk_errors(lock):
        handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        deadline = time.monotonic() + BEGIN_S
        while (owns := _joined(handle, path, recipe, kept=kept)) is None:
            if time.monotonic() >= deadline:
                holder = os.pread(handle, 64, 0).decode(errors="replace").strip() or "unknown"
                raise ResourceError(
                    f"{path} is in use by another bmctl, process {holder}",
                    hint=f"wait for it, stop it (kill {holder}), or name another run with -o",
                )
            time.sleep(0.1)
        _check_same(path, recipe)
        yield owns
    finally:
        os.close(handle)


def _joined(handle: int, path: Path, recipe: Recipe, *, kept: Recipe) -> bool | None:
    """Take the lock together with others: True for the first, which makes the run; None if it must be tried again."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        return False if is_run(path) else None
    with disk_errors(path):
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
    _begin(path, recipe, kept=kept)
    fcntl.flock(handle, fcntl.LOCK_SH)
    return True


def _check_same(path: Path, recipe: Recipe) -> None:
    there = Logs(path).recipe.read_text(encoding="utf-8")
    mine = recipe_yaml(recipe)
    if there == mine:
        return
    old = [line for line in there.splitlines() if line not in mine.splitlines()]
    new = [line for line in mine.splitlines() if line not in there.splitlines()]
    raise RecipeError(
        f"{path} is being trained with another recipe: it says {_some(old)}, this one {_some(new)}",
        hint="start bmctl distribute with the same recipe and the same overrides on all machines",
    )


def _some(lines: list[str]) -> str:
    return "; ".join(" ".join(line.split()) for line in lines[:3]) or "nothing more"


def append_event(path: Path, event: Mapping[str, object]) -> None:
    """One line more in the run's metrics.jsonl.

    Raises:
        ResourceError: The disk is full, read-only or not ours.
    """
    store.append(path / "metrics.jsonl", json.dumps(event).encode() + b"\n")
