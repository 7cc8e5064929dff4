"""A run's directory: where it is, who may write to it, what its files are called."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from bmctl import __version__, store
from bmctl.errors import PackageError, ResourceError, UsageError
from bmctl.recipe import Recipe, recipe_yaml

RUNS = Path("runs")


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
    return max(runs, key=lambda path: max(p.stat().st_mtime_ns for p in (path, path / "manifest.json")))


@contextmanager
def opened(path: Path, recipe: Recipe) -> Iterator[None]:
    """Create the run or add to it, alone: a second process is refused while this one holds the lock.

    Raises:
        UsageError: `path` exists and is not a run.
        ResourceError: It cannot be written to, or another process is writing.
    """
    if path.exists() and not is_run(path) and (not path.is_dir() or any(path.iterdir())):
        raise UsageError(f"{path} exists and is not a run of bmctl", hint="choose another directory: -o runs/NAME")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(
            f"cannot create {path}: {error.strerror}", hint="choose another directory: -o RUN"
        ) from error
    with store.locked(path):
        store.write_atomic(path / "recipe.yaml", recipe_yaml(recipe).encode())
        manifest = {"format": 1, "bmctl": __version__, "kind": "run", "name": recipe.name, "seed": recipe.seed}
        store.write_atomic(path / "manifest.json", (json.dumps(manifest, indent=2) + "\n").encode())
        yield


def append_event(path: Path, event: Mapping[str, object]) -> None:
    """One line more in the run's metrics.jsonl."""
    with (path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(event) + "\n")
