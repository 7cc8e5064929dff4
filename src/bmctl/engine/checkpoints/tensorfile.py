"""A safetensors file in the making: tensors copied side by side into host memory, checked, written and hashed later.

Written here and not by the safetensors library, which would need a second copy of all tensors, and cannot hash.

Source: https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bmctl.disk import reach
from bmctl.engine.checkpoints.pieces import NAMES
from bmctl.store import FileRecord

CHUNK_BYTES = 4 * 2**20
# The bits of a float's exponent: all of them set means nan or inf. e4m3 has no inf, and its nan is all ones.
_EXPONENTS: dict[torch.dtype, tuple[type[np.unsignedinteger], int]] = {
    torch.float64: (np.uint64, 0x7FF0_0000_0000_0000),
    torch.float32: (np.uint32, 0x7F80_0000),
    torch.complex64: (np.uint32, 0x7F80_0000),
    torch.float16: (np.uint16, 0x7C00),
    torch.bfloat16: (np.uint16, 0x7F80),
    torch.float8_e5m2: (np.uint8, 0x7C),
    torch.float8_e4m3fn: (np.uint8, 0x7F),
}


class TensorFile:
    """The memory is used again by the next `fill`: what was filled in before must have been written by then.

    Args:
        pin: Whether it is filled from a GPU, which copies into pinned memory without waiting.
    """

    def __init__(self, *, pin: bool) -> None:
        self._pin = pin
        self._lay_out([])

    def fill(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy plain tensors, of any device and layout; of a GPU's, the copies may still be under way afterwards."""
        # Wide elements first: so each lies where its size divides its address, without gaps, as the format wants it.
        names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), str(tensors[name].dtype), name))
        layout = [(name, tuple(tensors[name].shape), tensors[name].dtype) for name in names]
        if layout != self._layout:
            self._lay_out(layout)
        if layout:
            torch._foreach_copy_(self._views, [tensors[name] for name in names], non_blocking=self._pin)

    @property
    def is_empty(self) -> bool:
        return not self._layout

    def find_non_finite(self) -> str | None:
        """The name of a tensor that holds nan or inf."""
        for (name, _, dtype), view in zip(self._layout, self._views, strict=True):
            if dtype in _EXPONENTS and not _is_finite(view, *_EXPONENTS[dtype]):
                return name
        return None

    def write(self, path: Path, *, point: str, going_on: Callable[[], None]) -> FileRecord:
        """Write, sync and hash the file.

        Args:
            point: Names the file in the points of the save protocol.
            going_on: Called now and then; what it raises ends the writing.

        Raises:
            OSError: The disk says no.
        """
        digest = hashlib.sha256()
        with path.open("xb") as file:
            for part in self._parts():
                going_on()
                file.write(part)
                digest.update(part)
            reach(f"store:{point}-written")
            file.flush()
            os.fsync(file.fileno())
            size_bytes = file.tell()
        reach(f"store:{point}-synced")
        return FileRecord(size_bytes=size_bytes, sha256=digest.hexdigest())

    def _parts(self) -> Iterator[bytes | memoryview]:
        yield self._head
        whole: Any = self._memory.numpy()
        for start in range(0, len(whole), CHUNK_BYTES):
            yield memoryview(whole[start : start + CHUNK_BYTES])

    def _lay_out(self, layout: list[tuple[str, tuple[int, ...], torch.dtype]]) -> None:
        ends, end, head = [], 0, {}
        for name, shape, dtype in layout:
            start, end = end, end + math.prod(shape) * dtype.itemsize
            ends.append((start, end))
            head[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(head, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._layout = layout
        self._head = len(text).to_bytes(8, "little") + text
        self._memory = torch.empty(end, dtype=torch.uint8, pin_memory=self._pin and end > 0)
        self._views = [
            self._memory[start:stop].view(dtype).view(shape)
            for (start, stop), (_, shape, dtype) in zip(ends, layout, strict=True)
        ]


def _is_finite(tensor: torch.Tensor, kind: type[np.unsignedinteger], exponent: int) -> bool:
    """Looks at the bits with NumPy, which stays in this thread: torch would take the training's cores for it."""
    bits = tensor.reshape(-1).view(torch.uint8).numpy().view(kind)
    size = CHUNK_BYTES // bits.itemsize
    chunks = (bits[start : start + size] for start in range(0, len(bits), size))
    return not any(bool(((chunk & kind(exponent)) == exponent).any()) for chunk in chunks)
