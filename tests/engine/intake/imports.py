"""What tests of imports share: a stage's context that collects its events, and small models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.specs import image_spec
from torch import nn

from bmctl import models
from bmctl.engine.context import StageContext
from bmctl.engine.parallel import Group
from bmctl.errors import BmctlError
from bmctl.processes.signals import Stop
from bmctl.recipe import Recipe

DATA = {"source": {"kind": "bundled"}, "train": {"limit": 100}, "val": {"limit": 100}}
WITH_DATA = {"data": DATA, "task": {"kind": "classify"}}


class Events(list[dict[str, Any]]):
    def __call__(self, event: Any) -> None:
        self.append(dict(event))

    @property
    def text(self) -> str:
        return "\n".join(str(event.get("text", "")) for event in self)


def make_context(folder: Path, name: str = "run", *, overwrite: bool = False, **recipe: Any) -> StageContext:
    run = folder / name
    run.mkdir(exist_ok=True)
    return StageContext(
        run=run,
        recipe=Recipe.model_validate({"name": "imported", **recipe}),
        group=Group(rank=0, local_rank=0, world=1, device=torch.device("cpu"), threads=1),
        stop=Stop(),
        emit=Events(),
        overwrite=overwrite,
    )


def rescnn(num_classes: int = 10) -> nn.Module:
    torch.manual_seed(3)
    return models.build(image_spec("bmctl:rescnn", num_classes=num_classes)).eval()


def message_of(caught: pytest.ExceptionInfo[BmctlError]) -> str:
    return f"{caught.value.message} | {caught.value.hint}"
