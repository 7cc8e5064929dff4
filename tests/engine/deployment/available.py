"""Which backends run here."""

from __future__ import annotations

from bmctl.backends import BACKENDS


def why_not(name: str) -> str:
    """Why a backend does not run here; the empty string where it does."""
    module = BACKENDS[name]
    return str(module.unavailable(module.Config()))
