"""Where a training loop stands: what of it goes into a checkpoint, and what a checkpoint says of itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from bmctl import __version__, store
from bmctl.errors import DataError, PackageError
from bmctl.schema import Many, Strict

KINDS = ("model", "optimizer", "ema", "best", "task")
"""Of tensors; the fields of a Snapshot beside `state`."""
Tensors = dict[str, torch.Tensor]


class Identity(Strict):
    """What a checkpoint belongs to; it can be continued only by the same.

    Attributes:
        optimizer: Name of the optimizer.
        data_fingerprint: Of the training data.
        settings: Everything else that decides what the steps do.
    """

    optimizer: str
    data_fingerprint: str
    settings: dict[str, Any]


class CheckpointManifest(Strict):
    """What a checkpoint is.

    Attributes:
        world: Processes that wrote it.
        strategy: How they shared the model: single, ddp or fsdp; `mesh` by the name of each dimension.
        kernels: Of bmctl's that computed the steps in place of torch's.
        about: What a package of its weights needs: see `importing`.
        parent: Hash of the checkpoint before it.
        files: Every other file.
    """

    format: Literal[2] = 2
    bmctl: str = __version__
    stage: str
    step: int
    best_step: int | None
    num_steps: int
    identity: Identity
    world: int
    threads: int
    device: str
    kernels: Many[str] = ()
    strategy: str = "single"
    mesh: dict[str, int] = Field(default_factory=dict)
    about: dict[str, Any] = Field(default_factory=dict)
    parent: str | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    files: dict[str, store.FileRecord] = Field(default_factory=dict)


class State(Strict):
    """Where a training loop stands.

    Attributes:
        step: Optimizer steps done.
        validated_step: The step of the last validation.
        best_value: Of the task's metric, at `best_step`.
        num_seen: Samples of this epoch so far, over all ranks.
        seed: Of the sampler; with `epoch` and `num_seen` it says which sample comes next.
        batch_size: Samples of a step over all processes, also where it was found by trial.
        precision: In which the steps are computed.
        scaler: GradScaler's numbers, for fp16.
        skipped: Steps in a row that were left out because they were not finite.
        waited: Evaluations in a row without improvement.
        elapsed_s: Of training, over all attempts.
        random: Every rank's generators. A rank that saves gives its own alone, as it does with `progress`.
        progress: Every rank's sums over this epoch so far: loss_sum, score_sum.
    """

    step: int = 0
    validated_step: int = 0
    best_step: int | None = None
    best_value: float | None = None
    num_seen: int = 0
    seed: int = 0
    epoch: int = 0
    batch_size: int = 0
    precision: str = "fp32"
    scaler: dict[str, float] | None = None
    skipped: int = 0
    waited: int = 0
    elapsed_s: float = 0.0
    random: Many[dict[str, Any]] = ()
    progress: Many[dict[str, float]] = ()


@dataclass(frozen=True)
class Snapshot:
    """All that a training loop needs to go on; tensors plain or sharded, on any device.

    Attributes:
        best: Parameters and buffers of the best validation so far, where that is another step's.
        task: What a task's feed owns, such as a replay memory; every process's own, under names of its own.
    """

    model: Tensors
    optimizer: Tensors
    state: State
    ema: Tensors = field(default_factory=dict)
    best: Tensors = field(default_factory=dict)
    task: Tensors = field(default_factory=dict)


def check_identity(path: Path, found: Identity, expected: Identity) -> None:
    """Refuse to go on from a checkpoint of another training.

    Raises:
        PackageError: Another optimizer or other settings.
        DataError: The data changed.
    """
    hint = "go on with the recipe and data it was begun with, or add --overwrite to start again"
    if found.optimizer != expected.optimizer:
        raise PackageError(
            f"{path} holds the state of {found.optimizer}; the recipe says {expected.optimizer}", hint=hint
        )
    if found.data_fingerprint != expected.data_fingerprint:
        raise DataError(f"{path} was made on other data: the data set changed since", hint=hint)
    changes = list(_changes(found.settings, expected.settings))
    if changes:
        raise PackageError(f"{path} was made by another recipe: {'; '.join(changes[:5])}", hint=hint)


def _changes(old: Any, new: Any, *, path: str = "") -> Iterator[str]:
    """Sentences on what differs, by dotted path."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _changes(old.get(key), new.get(key), path=f"{path}.{key}" if path else key)
    elif old != new:
        yield f"{path} was {old}, is {new}"
