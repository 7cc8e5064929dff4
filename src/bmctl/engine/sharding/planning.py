"""What several processes would hold, before any of them is started: for ``--dry-run``."""

from __future__ import annotations

from typing import Literal

import torch

from bmctl import inputs
from bmctl.engine.loading.data import Data, open_split, resolve_input
from bmctl.engine.sharding.outline import memory_at_hand, outline_of
from bmctl.engine.sharding.strategy import USABLE, Outline, amount, choose, loads, state_bytes
from bmctl.errors import BmctlError, RecipeError
from bmctl.inputs import Resolved, image, text
from bmctl.models import ModelConfig, ModelSpec, build, published, spec_args
from bmctl.recipe import Recipe

_CLASSES = 1000
_SIZE = (224, 224)
_CHANNELS: Literal[3] = 3
_TOKENS, _VOCABULARY = 128, 30_000


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
    outline = _outline(spec)
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
        lines["memory"] += "; activations are not counted: the model computes nothing without memory"
    strategy, reason = choose(outline, fit=fit, launch=launch, world=world, batch_size=batch_size, memory_bytes=memory)
    return lines | {"strategy": f"{strategy} in {world} processes: {reason}"}


def _spec(recipe: Recipe, model: ModelConfig) -> tuple[ModelSpec, str]:
    """The model as the data make it, and what is assumed where they are not at hand."""
    try:
        data = Data(recipe)
        train = open_split(data, name="train", given=resolve_input(data))
    except BmctlError as error:
        given, shape = _assumed(recipe, model)
        spec = _spec_of(model, given, num_classes=_CLASSES)
        return spec, f"; {_CLASSES} classes and samples of {shape} are assumed, as {error.message}"
    return _spec_of(model, train.given, num_classes=len(train.facts.class_names)), ""


def _assumed(recipe: Recipe, model: ModelConfig) -> tuple[Resolved, str]:
    """An input that nobody has looked at the data for, and in words how large a sample is."""
    if recipe.data is not None and recipe.data.input.kind == "text":
        known = published(model).of("text")
        max_tokens, vocab_size = known.get("max_tokens", _TOKENS), known.get("vocab_size", _VOCABULARY)
        return Resolved(text.Spec(max_tokens=max_tokens, vocab_size=vocab_size, pad_id=0)), f"{max_tokens} tokens"
    known = published(model).of("image")
    size, channels = known.get("size") or _SIZE, known.get("channels") or _CHANNELS
    spec = image.Spec(size=size, channels=channels, mean=(0.5,) * channels, std=(0.5,) * channels)
    return Resolved(spec), "x".join(map(str, (channels, *size)))


def _spec_of(model: ModelConfig, given: Resolved, *, num_classes: int) -> ModelSpec:
    told = {**inputs.told(given), "num_classes": num_classes}
    return ModelSpec(name=model.name, args=spec_args(model), given=inputs.specs(given), told=told)


def _outline(spec: ModelSpec) -> Outline:
    try:
        with torch.device("meta"):
            model = build(spec)
    except (RuntimeError, NotImplementedError, RecipeError):  # some constructors look at numbers
        model = build(spec)
    return outline_of(model, sample_shape=tuple(size for size in spec.given[0].shape[1:] if isinstance(size, int)))


def _device(recipe: Recipe) -> torch.device:
    launch = recipe.launch
    num_gpus = torch.cuda.device_count() if launch.device != "cpu" and torch.cuda.is_available() else 0
    return torch.device("cuda", 0) if num_gpus >= launch.nproc else torch.device("cpu")
