"""A foreign state dict: read once without unpickling code, and matched to a model by name or by position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from bmctl import store
from bmctl.errors import PackageError
from bmctl.weights import is_finite

Match = Literal["name", "position"]
State = Mapping[str, torch.Tensor]

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "weights", "params", "state_dict_ema", "model_ema")
PREFIXES = ("module.", "_orig_mod.", "model.")
LEAVES = {"weight", "bias", "running_mean", "running_var"}
COUNTER = "num_batches_tracked"


@dataclass(frozen=True)
class Matched:
    """A state dict that fits a model.

    Attributes:
        state: The model's names, with its dtypes and shapes.
        pairs: (name in the file, name in the model, shape) in the model's order.
        notes: What had to be done on the way.
    """

    state: dict[str, torch.Tensor]
    pairs: tuple[tuple[str, str, tuple[int, ...]], ...]
    notes: tuple[str, ...]


def read_state(path: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The tensors of a .pt, .pth, .bin or .safetensors file, unwrapped; and what was unwrapped.

    Raises:
        PackageError: Missing, not such a file, a pickle that wants to run code, or no tensors in it.
    """
    if not path.is_file():
        raise PackageError(f"there is no file at {path}", hint="name a .pt, .pth, .bin or .safetensors file")
    if path.suffix == ".safetensors":
        try:
            return dict(load_file(path)), []
        except (SafetensorError, OSError, ValueError) as error:
            raise PackageError(f"{path} is not a safetensors file: {error}{store.foreign_note(path)}") from error
    return _unwrap(_load_without_code(path), path=path)


def _load_without_code(path: Path) -> Any:
    try:
        # The only torch.load there is: weights_only builds tensors and plain containers, and nothing else.
        return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        first = str(error).split(". ")[0].splitlines()[0]
        raise PackageError(
            f"{path} is refused: besides tensors it holds objects, and reading those would run code "
            f"from the file ({first}){store.foreign_note(path)}",
            hint="ask its publisher for a .safetensors file or a plain state dict",
        ) from error
    except (RuntimeError, EOFError, KeyError, ValueError, TypeError, AttributeError, IndexError, OSError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise PackageError(f"{path} cannot be read as a state dict: {first}{store.foreign_note(path)}") from error


def _unwrap(loaded: Any, *, path: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Through {"state_dict": ...} and the like, down to a flat mapping of names to tensors."""
    notes = []
    while isinstance(loaded, Mapping) and not _is_state(loaded):
        inner = next((key for key in WRAPPERS if isinstance(loaded.get(key), Mapping)), None)
        if inner is None:
            break
        others = ", ".join(str(key) for key in loaded if key != inner)
        notes.append(f"took the entry {inner!r} of the file" + (f"; left {others}" if others else ""))
        loaded = loaded[inner]
    if not isinstance(loaded, Mapping) or not loaded:
        raise PackageError(f"{path} holds a {type(loaded).__name__}, not a state dict", hint="save model.state_dict()")
    odd = [str(key) for key, value in loaded.items() if not isinstance(value, torch.Tensor)]
    if odd:
        raise PackageError(
            f"{path} is not a flat state dict: {', '.join(odd[:3])} {'are' if len(odd) > 1 else 'is'} no tensor",
            hint="save model.state_dict()",
        )
    return {str(name): tensor for name, tensor in loaded.items()}, notes


def _is_state(loaded: Mapping[Any, Any]) -> bool:
    return bool(loaded) and all(isinstance(value, torch.Tensor) for value in loaded.values())


def align_prefix(found: State, wanted: State) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Take ``module.`` and the like off, or put it on, where every name of the one has it and none of the other."""
    state, notes = dict(found), []
    while state and not set(state) & set(wanted):
        surplus = next((one for one in PREFIXES if all(name.startswith(one) for name in state)), None)
        lacking = next((one for one in PREFIXES if all(name.startswith(one) for name in wanted)), None)
        if surplus is not None:
            state = {name.removeprefix(surplus): tensor for name, tensor in state.items()}
            notes.append(f"took the prefix {surplus!r} off every name")
        elif lacking is not None and {lacking + name for name in state} & set(wanted):
            state = {lacking + name: tensor for name, tensor in state.items()}
            notes.append(f"put the prefix {lacking!r} before every name")
        else:
            break
    return state, notes


def match_state(found: State, wanted: State, *, match: Match, path: Path) -> Matched:
    """Say for every tensor of the model which one of the file it is.

    Args:
        found: The file's tensors, in its order.
        wanted: The model's state dict.
        match: ``name``: equal names. ``position``: the n-th of the one is the n-th of the other.
        path: For messages.

    Raises:
        PackageError: A tensor is missing, left over, of another shape or dtype, or not finite.
    """
    notes: list[str] = []
    if match == "name":
        found, notes = align_prefix(found, wanted)
    sources = _by_name(found, wanted, path) if match == "name" else _by_position(found, wanted, path)
    state: dict[str, torch.Tensor] = {}
    pairs = []
    for name, own in wanted.items():
        source = sources.get(name)
        if source is None:
            state[name] = own  # only ever a batch counter, which starts anew
            continue
        state[name] = _fitted(found[source], own, label=f"{path}: {source} for {name}", notes=notes)
        pairs.append((source, name, tuple(own.shape)))
    if len(pairs) < len(wanted):
        notes.append(f"{len(wanted) - len(pairs)} {COUNTER} are not in the file and start at zero")
    return Matched(state, tuple(pairs), tuple(dict.fromkeys(notes)))


def _by_name(found: State, wanted: State, path: Path) -> dict[str, str]:
    missing = [name for name in wanted if name not in found and not name.endswith(COUNTER)]
    extra = [name for name in found if name not in wanted]
    shapes = [
        f"{name} is {list(found[name].shape)}, the model has {list(wanted[name].shape)}"
        for name in wanted
        if name in found and found[name].shape != wanted[name].shape
    ]
    problems = []
    if missing:
        problems.append(f"{len(missing)} of the model's {len(wanted)} tensors are not in the file ({_few(missing)})")
    if extra:
        problems.append(f"{len(extra)} of the file's {len(found)} tensors are not in the model ({_few(extra)})")
    if shapes:
        problems.append(f"{len(shapes)} have another shape ({_few(shapes)})")
    if problems:
        hint = "name the model that they were trained as: --model NAME"
        if missing and extra:
            hint = "if the order is the same and only the names differ: --match position"
        raise PackageError(f"{path} does not fit by name: {'; '.join(problems)}", hint=hint)
    return {name: name for name in wanted if name in found}


def _by_position(found: State, wanted: State, path: Path) -> dict[str, str]:
    ours, theirs = without_counters(wanted), without_counters(found)
    sources = dict(zip(ours, theirs, strict=False))
    for index, (name, source) in enumerate(sources.items()):
        leaf, own = source.rpartition(".")[2], name.rpartition(".")[2]
        if found[source].shape != wanted[name].shape or (leaf != own and {leaf, own} <= LEAVES):
            raise PackageError(
                f"{path} does not fit by position: the first to differ is tensor {index}, in the file {source} "
                f"{list(found[source].shape)}, in the model {name} {list(wanted[name].shape)}",
                hint="name the model that they were trained as: --model NAME",
            )
    if len(ours) != len(theirs):
        where, rest = ("model", ours) if len(ours) > len(theirs) else ("file", theirs)
        raise PackageError(
            f"{path} does not fit by position: it has {len(theirs)} tensors, the model {len(ours)}; "
            f"the {where} goes on with {rest[len(sources)]}",
            hint="name the model that they were trained as: --model NAME",
        )
    ours, theirs = [n for n in wanted if n.endswith(COUNTER)], [n for n in found if n.endswith(COUNTER)]
    if theirs and len(ours) != len(theirs):
        raise PackageError(
            f"{path} does not fit by position: it has {len(theirs)} {COUNTER}, the model {len(ours)}",
            hint="name the model that they were trained as: --model NAME",
        )
    return sources | dict(zip(ours, theirs, strict=False))


def without_counters(state: State) -> list[str]:
    """Names but those of BatchNorm's counters, which older files lack."""
    return [name for name in state if not name.endswith(COUNTER)]


def _fitted(tensor: torch.Tensor, own: torch.Tensor, *, label: str, notes: list[str]) -> torch.Tensor:
    if not is_finite(tensor):
        raise PackageError(f"{label} holds nan or inf", hint="this checkpoint is of no use: take an earlier one")
    if tensor.dtype == own.dtype:
        return tensor
    if own.dtype == torch.float32 and tensor.dtype in (torch.float16, torch.bfloat16):
        notes.append(f"widened {str(tensor.dtype).removeprefix('torch.')} to float32, which loses nothing")
        return tensor.float()
    raise PackageError(f"{label} is {tensor.dtype}, the model has {own.dtype}", hint="convert the file to float32")


def _few(items: Sequence[str]) -> str:
    return ", ".join(items[:3]) + (", ..." if len(items) > 3 else "")
