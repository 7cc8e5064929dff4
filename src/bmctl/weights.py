"""Weights of a module in one safetensors file: strict, finite, tied tensors stored once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bmctl import store
from bmctl.errors import DivergedError, PackageError

if TYPE_CHECKING:
    import torch
    from torch import nn


def load_weights(model: nn.Module, path: Path, *, aliases: Mapping[str, str]) -> None:
    """Copy a safetensors file into `model`: every tensor, and nothing else, with its own dtype and shape.

    Args:
        aliases: Tied names that are not stored, each with the stored name whose memory it shares.

    Raises:
        PackageError: It is not safetensors, belongs to another model, or holds nan or inf.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise PackageError(f"{path} is not a safetensors file: {error}{store.foreign_note(path)}") from error
    wanted = model.state_dict()
    if find_aliases(wanted) != aliases:
        raise PackageError(f"{path}: the manifest and the model disagree about which tensors share memory")
    stored = set(wanted) - set(aliases)
    wrong = [f"{name} is missing" for name in wanted if name in stored and name not in found]
    wrong += [f"{name} is not in the model" for name in found if name not in stored]
    wrong += [
        f"{name} is {_describe(found[name])}, the model has {_describe(wanted[name])}"
        for name in wanted
        if name in found and _describe(found[name]) != _describe(wanted[name])
    ]
    if wrong:
        raise PackageError(
            f"{path} does not fit the model that its manifest names: {_first_few(wrong)}",
            hint="the weights belong to another model: restore this package from where it came",
        )
    bad = [name for name, tensor in found.items() if not is_finite(tensor)]
    if bad:
        raise PackageError(f"{path} holds nan or inf in {_first_few(bad)}")
    with torch.no_grad():
        model.load_state_dict(found | {name: found[source] for name, source in aliases.items()}, strict=True)


def find_aliases(state: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Names whose tensor is the very memory of an earlier one (tied weights), each with that earlier name."""
    first: dict[tuple[Any, ...], str] = {}
    aliases = {}
    for name, tensor in state.items():
        if tensor.numel() == 0:
            continue
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if place in first:
            aliases[name] = first[place]
        else:
            first[place] = name
    return aliases


def save_weights(model: nn.Module, path: Path) -> dict[str, str]:
    """Write parameters and buffers as safetensors; returns the aliases, which are not stored.

    Raises:
        DivergedError: A tensor holds nan or inf.
    """
    from safetensors.torch import save_file

    state = model.state_dict()
    bad = [name for name, tensor in state.items() if not is_finite(tensor)]
    if bad:
        raise DivergedError(
            f"the model holds nan or inf in {_first_few(bad)}; it is not saved",
            hint="lower the learning rate: --set train.optimizer.lr=...",
        )
    aliases = find_aliases(state)
    # Cloned: safetensors refuses tensors that share storage, and views of a larger one would drag it along.
    tensors = {
        name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items() if name not in aliases
    }
    save_file(tensors, path, metadata={"format": "pt"})
    return aliases


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no element is nan or inf; integers always are."""
    import torch

    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    return bool(torch.isfinite(tensor.float() if tensor.element_size() == 1 else tensor).all())


def _describe(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _first_few(items: Sequence[str]) -> str:
    more = f", and {len(items) - 3} more" if len(items) > 3 else ""
    return "; ".join(items[:3]) + more
