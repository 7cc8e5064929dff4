"""Fetching published weights: only when a recipe or a command asked for them by name, never as pickle."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from bmctl.errors import DependencyError, PackageError, first_line

if TYPE_CHECKING:
    import torch

TIMEOUT_S = 30
_HINT = "fetch it on a machine with a network and copy its cache here, or import a local file: bmctl import FILE"


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE asks to stay off the network; it holds for every publisher."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


@contextmanager
def from_hub(name: str) -> Iterator[None]:
    """Tell what goes wrong between here and the Hugging Face hub in our own words.

    Raises:
        DependencyError: Offline, unreachable, not there, or not free to fetch.
    """
    # HTTPError is that of the client which this version of the hub's library uses.
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        GatedRepoError,
        HfHubHTTPError,
        HTTPError,
        RepositoryNotFoundError,
    )

    try:
        yield
    except GatedRepoError as error:
        raise DependencyError(
            f"{name}: its owner grants access one by one", hint="log in with `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise DependencyError(
            f"{name}: the hub has no such model", hint="look for it on https://huggingface.co"
        ) from error
    except (OSError, HTTPError, HfHubHTTPError) as error:
        state = "HF_HUB_OFFLINE is set and it is not in the cache" if is_offline() else first_line(error)
        raise DependencyError(f"{name}: cannot be downloaded ({state})", hint=_HINT) from error


def fetch_weights(url: str, *, sha256_prefix: str) -> dict[str, torch.Tensor]:
    """A published state dict, from torch's cache folder or the network.

    Args:
        url: Where it is published.
        sha256_prefix: First hexadecimal digits of its SHA-256, as publishers put them into the name.

    Raises:
        DependencyError: Offline or unreachable.
        PackageError: The hash differs, or the file is no plain state dict.
    """
    import torch

    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlsplit(url).path).name
    if not path.exists():
        _download(url, path=path)
    found = _sha256(path)
    if not found.startswith(sha256_prefix):
        raise PackageError(
            f"{path}: SHA-256 is {found}, expected {sha256_prefix}... (from {url})",
            hint="remove the file and try again",
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError) as error:
        raise PackageError(f"{path}: not a plain state dict ({first_line(error)})") from error


def _download(url: str, *, path: Path) -> None:
    """To a temporary file beside the target, then renamed."""
    import shutil
    import tempfile
    from urllib.request import urlopen

    if is_offline():
        raise DependencyError(f"{url}: HF_HUB_OFFLINE is set, and {path} is not there", hint=_HINT)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        temporary = Path(file.name)
        try:
            with urlopen(url, timeout=TIMEOUT_S) as answer:
                shutil.copyfileobj(answer, file)
        except OSError as error:
            temporary.unlink()
            raise DependencyError(f"{url}: cannot be downloaded ({first_line(error)})", hint=_HINT) from error
    temporary.replace(path)


def _sha256(path: Path) -> str:
    import hashlib

    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
