"""Small files of published models: of a repository on the Hugging Face hub, or of a folder with the same files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bmctl.errors import DependencyError, PackageError
from bmctl.models.downloads import from_hub

CONFIG = "config.json"


def is_folder(name: str) -> bool:
    """Whether a model's name is that of a folder with a model on this machine."""
    return (Path(name) / CONFIG).is_file()


def fetch_file(name: str, file: str) -> Path | None:
    """Where a file of the folder or repository `name` lies on this machine; None where it has none of that name.

    Raises:
        DependencyError: It cannot be downloaded.
    """
    require()
    if Path(name).is_dir():
        return Path(name) / file if (Path(name) / file).is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    with from_hub(f"transformers:{name}"):
        try:
            return Path(hf_hub_download(name, file))
        except LocalEntryNotFoundError:  # not in the cache, and no network to ask: it may be there
            raise
        except EntryNotFoundError:
            return None


def fetch_json(name: str, file: str, *, default: dict[str, Any] | None = None) -> dict[str, Any]:
    """A JSON object of the folder or repository `name`.

    Args:
        default: Taken where there is no such file; None refuses that.

    Raises:
        PackageError: There is no such file, or it holds no object.
        DependencyError: It cannot be downloaded.
    """
    path = fetch_file(name, file)
    if path is None:
        if default is not None:
            return default
        raise PackageError(f"transformers:{name} has no {file}", hint="name a folder or repository with a whole model")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise PackageError(f"{path}: cannot be read ({error})", hint="fetch the model again") from error
    if not isinstance(found, dict):
        raise PackageError(f"{path}: expected an object", hint="fetch the model again")
    return found


@contextmanager
def quiet() -> Iterator[None]:
    """transformers reports on stderr what bmctl says itself: a new head, a bar while loading."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def require() -> None:
    """Raises:
    DependencyError: transformers is not installed.
    """
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise DependencyError(
            "models named transformers:... need transformers, which is not installed",
            hint="pip install 'bmctl[transformers]'",
        ) from error
