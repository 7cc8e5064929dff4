"""Buffers that training moves, such as batch statistics: each process has its own, and rank 0's are the model's.

DistributedDataParallel would send all of them before every forward pass; here they are sent when somebody reads them.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _NormBase


class MovingBuffers:
    """Of one model, the same in every process of the default group but for their values."""

    def __init__(self, model: nn.Module) -> None:
        places = [(module, name) for module in model.modules() for name in module._buffers]
        self._statistics = [place for place in places if isinstance(place[0], _NormBase)]
        self._others = [place for place in places if not isinstance(place[0], _NormBase)]
        self._seen = {place: _state(place) for place in self._others}

    def follow_first(self, *, statistics: bool) -> None:
        """Give every rank what rank 0 has of the buffers that changed since the last time.

        Args:
            statistics: Those of batch norms as well: training does not read them, so a step can do without. They are
                sent whether they changed or not, as batch norm does not count its changes.
        """
        changed = [place for place in self._others if _state(place) != self._seen[place]]
        sent = changed + self._statistics if statistics else changed
        tensors = [tensor for module, name in sent if (tensor := module._buffers[name]) is not None]
        if not tensors:
            return
        with torch.no_grad():
            parts = [tensor.detach().reshape(-1).view(torch.uint8) for tensor in tensors]
            together = torch.cat(parts)
            dist.broadcast(together, 0)
            for tensor, part in zip(tensors, together.split([len(part) for part in parts]), strict=True):
                # A slice may begin anywhere in memory, where no other type can be viewed.
                tensor.copy_(part.clone().view(tensor.dtype).view(tensor.shape))
        self._seen.update((place, _state(place)) for place in changed)


def _state(place: tuple[nn.Module, str]) -> tuple[int, int]:
    """Differs whenever the buffer was written to or replaced."""
    tensor = place[0]._buffers[place[1]]
    return (0, 0) if tensor is None else (id(tensor), tensor._version)
