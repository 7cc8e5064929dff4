"""Finding and replacing layers by name. Weight legend: O out channels, I in channels (per group), k kernel."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from bmctl.errors import PackageError, RecipeError


class Factors(nn.Sequential):
    """Two layers in place of one: the first to `rank` channels, the second to all outputs."""


def last_linear(module: Any) -> nn.Linear | None:
    """A Linear itself, the second of two factors, or None."""
    last = module[-1] if isinstance(module, Factors) else module
    return last if isinstance(last, nn.Linear) else None


def weight_layers(model: nn.Module) -> dict[str, Any]:
    """Every Conv and Linear by name, each weight tensor once, in the model's order."""
    layers: dict[str, Any] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)) and id(module.weight) not in seen:
            seen.add(id(module.weight))
            layers[name] = module
    return layers


def matching(names: Sequence[str], patterns: Sequence[str], *, key: str) -> set[str]:
    """The names that match any pattern, such as ``layer1.*``.

    Args:
        names: Names of layers.
        patterns: Shell patterns; one that matches no layer is refused, as it says something it does not do.
        key: The recipe's key that holds the patterns.

    Raises:
        RecipeError: A pattern matches nothing.
    """
    found: set[str] = set()
    for pattern in patterns:
        hits = {name for name in names if fnmatchcase(name, pattern)}
        if not hits:
            near = difflib.get_close_matches(pattern, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"layers are {', '.join(names[:8])}, ..."
            raise RecipeError(f"{key}: {pattern!r} matches none of the model's {len(names)} layers", hint=hint)
        found |= hits
    return found


def get_layer(model: nn.Module, name: str, *, what: str) -> Any:
    """The submodule `name` of a model that a package describes.

    Raises:
        PackageError: There is none.
    """
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise PackageError(
            f"the package's {what} step names layer {name!r}, which the model does not have",
            hint="build the package again with `bmctl compress`",
        ) from error


def replace_layer(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` in the place of the submodule `name`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


@contextmanager
def deterministic() -> Iterator[None]:
    """One thread and the caller's random state untouched: results depend on neither."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, every submodule's own mode back afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
