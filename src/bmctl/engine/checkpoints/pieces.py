"""Which slice of which tensor lies where: tensors that several processes hold, cut up for writing, put together again.

A piece is a box of a tensor, written by one process: its file, its key in it, where it begins and how long it is in
every dimension. The pieces of a tensor fill it exactly, whatever number of processes wrote them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import combinations
from typing import Annotated, Any

import torch
from pydantic import Field
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from bmctl.errors import PackageError
from bmctl.schema import Many, Strict

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""By the names that safetensors has for them."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}

Length = Annotated[int, Field(ge=0, lt=2**62)]
Box = tuple[tuple[int, int], ...]
"""Per dimension, where it begins and where it ends."""


class Piece(Strict):
    """A box of a tensor in a file.

    Attributes:
        file: Beside the index.
        key: Of the tensor in the file that holds this piece and nothing else.
        offsets: Where the piece begins in the whole tensor, per dimension.
        shape: Of the piece.
    """

    file: str
    key: str
    offsets: Many[Length]
    shape: Many[Length]

    @property
    def box(self) -> Box:
        return tuple((start, start + size) for start, size in zip(self.offsets, self.shape, strict=True))


class Entry(Strict):
    """A tensor: its whole shape, safetensors' name of its dtype, and its pieces."""

    shape: Many[Length]
    dtype: str
    pieces: Many[Piece] = ()


class Index(Strict):
    """Every tensor of a checkpoint, by kind and name."""

    tensors: dict[str, dict[str, Entry]]


# -- what one process holds ---------------------------------------------------------------------------


@lru_cache(maxsize=2**14)
def _place(shape: tuple[int, ...], mesh: DeviceMesh, placements: tuple[Placement, ...]) -> Box | None:
    """The box that this process holds; None where it is no part of the mesh."""
    if any(type(placement) not in (Shard, Replicate) for placement in placements):
        raise ValueError(f"a tensor placed as {placements} cannot be saved or read in pieces")
    if mesh.get_coordinate() is None:
        return None
    sizes, offsets = compute_local_shape_and_global_offset(shape, mesh, placements)
    return tuple((start, start + size) for start, size in zip(offsets, sizes, strict=True))


def held_box(tensor: torch.Tensor) -> Box | None:
    """The box of `tensor` that lies in this process: all of it, but for a DTensor."""
    if isinstance(tensor, DTensor):
        return _place(tuple(tensor.shape), tensor.device_mesh, tensor.placements)
    return tuple((0, size) for size in tensor.shape)


def held(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of that box."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def box_to_write(tensor: torch.Tensor, *, rank: int) -> Box | None:
    """The box of `tensor` that this process is to write, so that each element is written by one process.

    A plain tensor is rank 0's. Of the copies of a replicated shard, that of the first in its row of the mesh counts.
    """
    if not isinstance(tensor, DTensor):
        return held_box(tensor) if rank == 0 else None
    box, here = held_box(tensor), tensor.device_mesh.get_coordinate()
    if box is None or here is None or math.prod(stop - start for start, stop in box) == 0:
        return None
    is_copy = any(
        isinstance(placement, Replicate) and at for placement, at in zip(tensor.placements, here, strict=True)
    )
    return None if is_copy else box


def entries(tensors: Mapping[str, torch.Tensor], *, file: str, rank: int, own: bool = False) -> dict[str, Entry]:
    """What this process adds to the index: its pieces, and on rank 0 also tensors without any.

    Args:
        own: No other process has tensors of these names: this one writes them whole.
    """
    found = {}
    for name, tensor in tensors.items():
        box = held_box(tensor) if own else box_to_write(tensor, rank=rank)
        if box is None and rank:
            continue
        starts, sizes = [start for start, _ in box or ()], [stop - start for start, stop in box or ()]
        pieces = (Piece(file=file, key=name, offsets=tuple(starts), shape=tuple(sizes)),) if box is not None else ()
        found[name] = Entry(shape=tuple(tensor.shape), dtype=NAMES[tensor.dtype], pieces=pieces)
    return found


def merge(parts: Sequence[Mapping[str, Mapping[str, Entry]]]) -> Index:
    """One index from what every process added, by kind and name."""
    whole: dict[str, dict[str, Entry]] = {}
    for part in parts:
        for kind, tensors in part.items():
            for name, entry in tensors.items():
                there = whole.setdefault(kind, {}).get(name)
                if there is not None and (there.shape, there.dtype) != (entry.shape, entry.dtype):
                    raise ValueError(f"the processes disagree about the shape or dtype of {kind} {name}")
                before = there.pieces if there is not None else ()
                whole[kind][name] = entry.model_copy(update={"pieces": (*before, *entry.pieces)})
    return Index(tensors=whole)


# -- reading ------------------------------------------------------------------------------------------


def check_entry(entry: Entry, *, what: str) -> None:
    """Refuse an entry whose pieces do not fill its tensor exactly.

    Raises:
        PackageError: Of another number of dimensions, reaching outside, overlapping, missing, or of no known dtype.
    """
    if entry.dtype not in DTYPES:
        raise PackageError(f"{what} has the unknown dtype {entry.dtype!r}")
    for piece in entry.pieces:
        if not len(piece.offsets) == len(piece.shape) == len(entry.shape):
            raise PackageError(f"{what}: a piece in {piece.file} has another number of dimensions")
        if any(stop > size for (_, stop), size in zip(piece.box, entry.shape, strict=True)):
            raise PackageError(f"{what}: the piece in {piece.file} reaches outside the tensor")
    if any(overlap(one.box, other.box) is not None for one, other in combinations(entry.pieces, 2)):
        raise PackageError(f"{what}: its pieces overlap")
    if sum(math.prod(piece.shape) for piece in entry.pieces) != math.prod(entry.shape):
        raise PackageError(f"{what}: pieces of it are missing")


def overlap(one: Box, other: Box) -> Box | None:
    """The box that two boxes share; None where they share no element."""
    shared = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    return None if any(start >= stop for start, stop in shared) else shared


def assemble(entry: Entry, box: Box, *, read: Callable[[Piece, tuple[slice, ...]], torch.Tensor]) -> torch.Tensor:
    """The part of a tensor that `box` cuts out, on the CPU, from the slices of its pieces that lie in it.

    Args:
        read: Gives the slices, counted from the piece's own beginning, of a piece.
    """
    result = torch.empty([stop - start for start, stop in box], dtype=DTYPES[entry.dtype])
    for piece, shared in _shared(entry, box):
        source = tuple(slice(a - at, b - at) for (a, b), at in zip(shared, piece.offsets, strict=True))
        target = tuple(slice(a - at, b - at) for (a, b), (at, _) in zip(shared, box, strict=True))
        result[target] = read(piece, source)
    return result


def _shared(entry: Entry, box: Box) -> Iterator[tuple[Piece, Box]]:
    for piece in entry.pieces:
        shared = overlap(piece.box, box)
        if shared is not None:
            yield piece, shared


def like_dtensor(local: torch.Tensor, like: Any) -> DTensor:
    """`local` as this process's part of a DTensor that is spread as `like` is."""
    here = like.to_local()
    return DTensor.from_local(
        local.to(here.device),
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )
