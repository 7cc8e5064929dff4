"""A small classifier of digits: its recipe, its stage's context, and a package of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tests.specs import classifier, image_spec

from bmctl.engine.context import StageContext
from bmctl.engine.parallel import Group
from bmctl.inputs import Resolved
from bmctl.inputs.image import Spec
from bmctl.models import build
from bmctl.package import PART, GraphFile, Manifest, ModelPackage, save_package
from bmctl.processes.signals import Stop
from bmctl.recipe import Recipe

GIVEN = Resolved(Spec(size=(8, 8), channels=1, mean=(0.5,), std=(0.5,)))
SPEC = image_spec("bmctl:mlp", size=(8, 8))


def recipe(**data: Any) -> Recipe:
    splits = {"val": {"limit": 70}, "test": {"limit": 90}} | data
    return Recipe.model_validate({"name": "digits", "data": {"source": {"kind": "digits"}, **splits}})


class Events(list[dict[str, Any]]):
    """Called with every event, and keeps them."""

    def __call__(self, event: Any) -> None:
        self.append(dict(event))

    def notes(self) -> list[str]:
        return [event["text"] for event in self if event["event"] == "note"]


def make_context(run: Path, asked: Recipe | None = None) -> StageContext:
    group = Group(rank=0, local_rank=0, world=1, device=torch.device("cpu"), threads=1)
    return StageContext(run=run, recipe=asked or recipe(), group=group, stop=Stop(), emit=Events())


def saved(run: Path, *, graph: Path | None = None, given: Resolved | None = GIVEN) -> ModelPackage:
    """A package of the module, or frozen, of its graph."""
    torch.manual_seed(1)
    return save_package(
        run / "packages" / ("00-import" if graph else "00-train"),
        manifest=Manifest(stage="train", key="k", **classifier(SPEC), input=given.spec if given else None),
        recipe_yaml="name: digits\n",
        model=None if graph else build(SPEC),
        graphs={PART: GraphFile(graph)} if graph else None,
    )
