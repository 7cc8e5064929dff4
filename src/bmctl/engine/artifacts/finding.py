"""What a path means: a package, a run's newest package, or a deployed artifact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from bmctl import store
from bmctl.engine.artifacts.deployed import Deployed, open_deployed
from bmctl.errors import PackageError
from bmctl.package import ModelPackage, find_package

MAX_PEEK_BYTES = 16 * 2**20


def find_source(path: Path) -> ModelPackage | Deployed:
    """Open what lies at `path`, with every file's hash checked.

    Raises:
        PackageError: Missing, corrupt, or none of these.
    """
    return open_deployed(path) if kind_of(path) == "deployed" else find_package(path)


def kind_of(folder: Path) -> Literal["deployed", "package", ""]:
    """What a directory's manifest speaks of; the empty string where it has none, or one that is not known here.

    Raises:
        PackageError: It is no JSON.
    """
    path = folder / store.MANIFEST
    if not path.is_file() or path.stat().st_size > MAX_PEEK_BYTES:
        return ""
    try:
        manifest = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise PackageError(f"{path} is not JSON: {error}", hint="restore the directory, or make it again") from error
    keys = set(manifest) if isinstance(manifest, dict) else set()
    return "deployed" if "backend" in keys else "package" if "stage" in keys else ""
