"""The exponential moving average of a model's weights: what is validated and kept where the recipe says `ema`.

Source: Polyak, Juditsky 1992, https://doi.org/10.1137/0330046; in deep learning as in Tarvainen, Valpola 2017,
https://arxiv.org/abs/1703.01780
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.tensor import DTensor


class Average:
    """Averages of everything in a model's state that is a float; counters are the model's newest.

    Args:
        model: Its parameters and buffers, whole or sharded, are where the average begins.
        decay: Share of the average that stays at every step, once enough steps are done.
    """

    def __init__(self, model: nn.Module, *, decay: float) -> None:
        self._model, self._decay = model, decay
        self._live = model.state_dict()
        self._mean = {name: tensor.detach().clone() for name, tensor in self._live.items()}
        floats = [name for name, tensor in self._live.items() if tensor.is_floating_point()]
        self._floats = [(_local(self._mean[name]), _local(self._live[name])) for name in floats]
        self._counts = [(self._mean[name], self._live[name]) for name in self._live.keys() - set(floats)]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After optimizer step `step`, counted from 0: early averages forget faster, so that the start fades."""
        decay = min(self._decay, (1 + step) / (10 + step))
        torch._foreach_lerp_([mean for mean, _ in self._floats], [live for _, live in self._floats], 1 - decay)
        for mean, live in self._counts:
            mean.copy_(live)

    def tensors(self) -> dict[str, torch.Tensor]:
        """By the names of the model's state."""
        return self._mean

    @torch.no_grad()
    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put back what `tensors` gave."""
        for name, mean in self._mean.items():
            mean.copy_(tensors[name])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """While the block runs, the model has the averaged weights."""
        with torch.no_grad():
            kept = {name: tensor.clone() for name, tensor in self._live.items()}
            for name, tensor in self._live.items():
                tensor.copy_(self._mean[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for name, tensor in self._live.items():
                    tensor.copy_(kept[name])


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a sharded tensor that this process holds: averaging needs no communication."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
