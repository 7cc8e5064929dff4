"""What several processes would hold, before any of them is started: for ``--dry-run``."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bmctl.engine.loading.data import Data, open_split, resolve_input
from bmctl.engine.modelspec import model_spec
from bmctl.engine.sharding.outline import memory_at_hand, outline_of
from bmctl.engine.sharding.strategy import USABLE, Outline, amount, choose, loads, state_bytes, untraced
from bmctl.errors import DataError, RecipeError
from bmctl.models import ModelConfig, ModelSpec, build, published, spec_args
from bmctl.recipe import Recipe
from bmctl.schema import BATCH, TensorSpec
from bmctl.tasks import TASKS

_CLASSES = 1000
_SIZE = (224, 224)
_CHANNELS = 3


def sharing(recipe: Recipe) -> dict[str, str]:
    """The arithmetic of `launch.strategy` for a recipe that trains: lines by name.

    Args:
        recipe: Its data need not be there; what they would tell is assumed, and said.

    Raises:
        RecipeError: No such model.
    """
    fit, launch = recipe.train, recipe.launch
    assert fit is not None and recipe.model is not None
    world = next((world for world in launch.worlds if world > 1), 1)
    spec, assumed = _spec(recipe, recipe.model)
    outline = _outline(spec, gives=TASKS[recipe.task.kind].GIVES if recipe.task is not None else ("logits",))
    batch_size, of = fit.batch_size, ""
    if batch_size == "auto":
        batch_size, of = world * fit.accumulate, "; activations are those of one sample, as the batch size is not known"
    device = _device(recipe)
    memory = memory_at_hand(device, num_local=launch.nproc)
    lines = {
        "parameters": f"{outline.num_params:,} in fp32 = {amount(4 * outline.num_params)}; {fit.optimizer.name} keeps "
        f"{state_bytes(fit.optimizer)} bytes for each{assumed}{of}"
    }
    lines |= {name: str(load) for name, load in loads(outline, fit=fit, world=world, batch_size=batch_size).items()}
    whose = "the GPU's" if device.type == "cuda" else f"this machine's, shared by {launch.nproc}"
    lines["memory"] = f"{amount(memory)} for each process ({whose}), {USABLE:.0%} of it usable"
    if outline.activation_bytes is None:
        lines["memory"] += f"; activations are not counted: {untraced(outline)}"
    strategy, reason = choose(outline, fit=fit, launch=launch, world=world, batch_size=batch_size, memory_bytes=memory)
    return lines | {"strategy": f"{strategy} in {world} processes: {reason}"}


def _spec(recipe: Recipe, model: ModelConfig) -> tuple[ModelSpec, str]:
    """The model as the data make it, and what is assumed where they are not at hand."""
    try:
        data = Data(recipe)
        given = resolve_input(data)
        train = open_split(data, name="train", given=given)
        return model_spec(model, given=given, task=train.task, facts=train.facts), ""
    except DataError as error:
        if recipe.data is None or recipe.data.input.kind != "image":
            raise
        known = published(model).of("image")
        size, channels = known.get("size") or _SIZE, known.get("channels") or _CHANNELS
        shape = (channels, *size)
        image = TensorSpec(name="input", dtype="float32", shape=(BATCH, *shape))
        spec = ModelSpec(name=model.name, args=spec_args(model), given=(image,), told={"num_classes": _CLASSES})
        text = "x".join(map(str, shape))
        return spec, f"; {_CLASSES} classes and samples of {text} are assumed, as {error.message}"


def _outline(spec: ModelSpec, *, gives: Sequence[str]) -> Outline:
    try:
        with torch.device("meta"):
            model = build(spec)
    except (RuntimeError, NotImplementedError, RecipeError):  # some constructors look at numbers
        model = build(spec)
    return outline_of(model, given=spec.given, gives=gives)


def _device(recipe: Recipe) -> torch.device:
    launch = recipe.launch
    num_gpus = torch.cuda.device_count() if launch.device != "cpu" and torch.cuda.is_available() else 0
    return torch.device("cuda", 0) if num_gpus >= launch.nproc else torch.device("cpu")
