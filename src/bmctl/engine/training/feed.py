"""Where a training's batches come from: a loader over its data, or what its task brings along."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch

from bmctl.engine.batch import Batch
from bmctl.engine.loading.loader import Loader, open_loader
from bmctl.engine.training.training import Training
from bmctl.tasks import Feed


def open_feed(
    training: Training, *, batch_size: int, num_workers: int = 0, pin: bool = False
) -> AbstractContextManager[Feed]:
    """Batches of this process, on the device, from the first step on: opening another one later gives the same.

    Args:
        batch_size: Samples of a step over all processes.
        num_workers: Loader processes.
        pin: Page-locked memory, from which copies to a GPU need not be waited for.
    """
    own = getattr(training.task, "feed", None)
    if own is None:
        return _loaded(training, batch_size=batch_size, num_workers=num_workers, pin=pin)
    group = training.context.group
    opened: AbstractContextManager[Feed] = own(
        training.train,
        config=training.task_config,
        model=training.model,
        teacher=training.teacher,
        seed=training.seed,
        batch_size=batch_size,
        rank=group.rank,
        world=group.world,
        device=group.device,
    )
    return opened


@contextmanager
def _loaded(training: Training, *, batch_size: int, num_workers: int, pin: bool) -> Iterator[Feed]:
    group, data = training.context.group, training.context.recipe.data
    assert data is not None
    with open_loader(
        training.train,
        seed=training.seed,
        batch_size=batch_size,
        rank=group.rank,
        world=group.world,
        num_workers=num_workers,
        prefetch=data.prefetch,
        pin=pin,
        device=group.device,
        channels_last=training.fit.channels_last,
    ) as loader:
        yield _Loaded(loader)


@dataclass(frozen=True)
class _Loaded:
    """A loader knows by seed, epoch and step which samples come next, so that it owns nothing worth saving."""

    loader: Loader

    def batches(self, *, epoch: int, start_step: int) -> Iterator[Batch]:
        return self.loader.batches(epoch=epoch, start_step=start_step)

    def after(self, step: int) -> None:
        pass

    def tensors(self) -> dict[str, torch.Tensor]:
        return {}

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        pass
