"""A model becomes the first package of a run: published, a state dict, an ONNX file, or a checkpoint of ours."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bmctl import models, store
from bmctl.core.noise import noise
from bmctl.core.published import Published
from bmctl.disk import disk_errors
from bmctl.engine.checkpoints import consolidate
from bmctl.engine.context import StageContext
from bmctl.engine.evaluation import appraise, measure
from bmctl.engine.intake import statedict
from bmctl.engine.intake.foreign import import_graph
from bmctl.engine.intake.publishing import STAGE, check_told, publish, recorded
from bmctl.engine.loading import data as loading
from bmctl.engine.modelspec import model_spec, signatures
from bmctl.errors import PackageError, RecipeError, ResourceError, UsageError
from bmctl.inputs import INPUTS, Resolved
from bmctl.models import ModelConfig, ModelSpec
from bmctl.package import Manifest, ModelPackage, list_packages, open_package
from bmctl.schema import BATCH, Signature
from bmctl.tasks import classify, writes

EXAMPLE_SIZE = 16
"""Of free axes other than the batch, where multiply-accumulates are counted."""
PUBLISHED = re.compile(r"(timm|torchvision|transformers|bmctl):.+")


@dataclass(frozen=True)
class Imported:
    """What was found at the source, before it is a package.

    Attributes:
        given: How samples become what it takes.
        task: Its Config, and `facts` of it: as they were told, or a classifier's.
        log: Which tensor went where, one a line.
        known: Further fields of the manifest, where there are no data to take them from.
    """

    spec: ModelSpec
    model: nn.Module
    given: Resolved
    task: Any
    facts: Any
    notes: tuple[str, ...] = ()
    log: str = ""
    known: Mapping[str, Any] = field(default_factory=dict)


def import_stage(
    context: StageContext, source: str, *, model: str | None = None, match: statedict.Match = "name"
) -> ModelPackage:
    """Publish RUN/packages/00-import, unless that is done already.

    Args:
        context: Its recipe may have data and a task: then the classes must fit, and the package is evaluated.
        source: ``timm:NAME``, ``torchvision:NAME``, ``transformers:NAME``; or the path of a state dict, an .onnx, or
            a checkpoint such as RUN/checkpoints/train/latest.
        model: For a state dict: the model that it belongs to, such as ``timm:resnet18``; else the recipe's.
        match: Whether tensors are matched by name or by position.

    Raises:
        UsageError: No model named for a state dict, or one named for something else.
        RecipeError: No such model, or nothing published of it.
        PackageError: Nothing there, corrupt, not fitting the model, or not to be read without running its code.
        DependencyError: Not cached and not to be downloaded, or a library is missing.
        DataError: The head has other classes than the recipe's data.
        ResourceError: The run starts with something else.
    """
    path, published = Path(source), PUBLISHED.fullmatch(source) is not None
    is_graph = path.suffix == ".onnx" and not published
    is_checkpoint = not published and consolidate.is_checkpoint(path)
    if model is not None and (published or is_graph or is_checkpoint):
        raise UsageError(f"--model {model} is for a state dict; {source} says itself what it is", hint="leave it out")
    if is_checkpoint:
        return _import_checkpoint(context, path)
    if not published:
        _check_file(path)
    config = None if is_graph else _model_config(context, source if published else model, path=path)
    context = replace(context, recipe=context.recipe.model_copy(update={"model": config}))
    key = _key(context, source if published else store.hash_file(path).sha256, match=match)
    target = context.run / "packages" / f"00-{STAGE}"
    done = _find_done(context, target, key=key)
    if done is not None:
        return done
    if config is None:
        return import_graph(context, path, key=key, target=target)
    found = _published(context, config) if published else _state_dict(context, config, path=path, match=match)
    return _publish(context, found, source=source, key=key, target=target)


def _import_checkpoint(context: StageContext, path: Path) -> ModelPackage:
    path = path.resolve()  # `latest` may be another one by the time that it is read
    key, target = _key(context, store.manifest_hash(path), match="name"), context.run / "packages" / f"00-{STAGE}"
    done = _find_done(context, target, key=key)
    if done is not None:
        return done
    about, model, words = consolidate.open_model(path)
    # Without a recipe that has data, those of the training are remembered; they need not be on this machine.
    evaluated = context.recipe.model is not None or context.recipe.data is not None
    if not evaluated:
        recipe = consolidate.read_recipe(about) or context.recipe
        context = replace(context, recipe=recipe.model_copy(update={"name": context.recipe.name}))
    known = {"data_fingerprint": about.data_fingerprint, "history": about.history}
    task, facts = consolidate.task_of(about)
    imported = Imported(about.model, model, about.given, task, facts, (words,), known=known)
    return _publish(context, imported, source=str(path), key=key, target=target, evaluated=evaluated)


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise PackageError(f"{path} is a directory; a package or run needs no import", hint=f"bmctl compress {path}")
    if not path.is_file():
        raise PackageError(
            f"there is nothing at {path}", hint="bmctl import timm:NAME, or weights.safetensors, or m.onnx"
        )
    if path.suffix not in (*statedict.SUFFIXES, ".onnx"):
        raise PackageError(
            f"{path}: {path.suffix or 'a file without a suffix'} is not read",
            hint=f"one of {', '.join((*statedict.SUFFIXES, '.onnx'))}, or a checkpoint's directory",
        )


def _model_config(context: StageContext, name: str | None, *, path: Path) -> ModelConfig:
    """The imported model as the recipe would name it; arguments are the recipe's where it names the same model."""
    config = context.recipe.model
    if name is None and config is None:
        raise UsageError(f"{path} does not say of which model it is", hint=f"bmctl import {path} --model timm:NAME")
    if name is not None and (config is None or config.name != name):
        config = ModelConfig.model_validate({"name": name, "args": {}})
    assert config is not None
    models.check_name(config.name)
    return config.model_copy(update={"pretrained": False})  # its weights are in the package


def _key(context: StageContext, source: str, *, match: str) -> str:
    used: Any = {"model": True, "task": True, "data": {"source", "val", "input"}, "export": {"axes", "sample"}}
    fields = {"source": source, "match": match, "recipe": context.recipe.model_dump(mode="json", include=used)}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _find_done(context: StageContext, target: Path, *, key: str) -> ModelPackage | None:
    packages = list_packages(context.run)
    if context.overwrite or not packages:
        return None
    if packages[0] == target:
        package = open_package(target)
        if package.manifest.key == key:
            context.emit({"event": "skip", "stage": STAGE, "text": f"{target} is there, of the same source"})
            return package
    raise ResourceError(
        f"the run starts with {packages[0]} already; nothing finished is overwritten",
        hint="name another run with -o, or add --overwrite",
    )


# -- published weights, state dicts -----------------------------------------------------------------


def _published(context: StageContext, config: ModelConfig) -> Imported:
    config = config.model_copy(update={"pretrained": True})
    known = models.published(config)
    task: Any = context.recipe.task
    if known.has_weights and task is not None and writes(task.kind):
        return _writer(context, config, known=known, task=task)
    if known.num_classes is None:
        told = "brings no classifier" if known.has_weights else "has no published weights"
        raise RecipeError(
            f"{config.name} {told}: it is to be trained",
            hint=f"bmctl train --recipe RECIPE --set model.name={config.name}",
        )
    given = _input(context, config, known=known)
    facts = classify.Facts(class_names=known.class_names or numbered(known.num_classes))
    spec = model_spec(config, given=given, task=classify.Config(), facts=facts)
    context.emit({"event": "note", "stage": STAGE, "text": f"{config.name}: taking the published weights"})
    return Imported(spec, models.build(spec, pretrained=True), given, classify.Config(), facts)


def _writer(context: StageContext, config: ModelConfig, *, known: Published, task: Any) -> Imported:
    """A model of the recipe's task, which has no classes: its data say what there is to know."""
    given = _input(context, config, known=known)
    facts = loading.open_split(context.data, name="val", given=given).facts
    spec = model_spec(config, given=given, task=task, facts=facts)
    context.emit({"event": "note", "stage": STAGE, "text": f"{config.name}: taking the published weights"})
    return Imported(spec, models.build(spec, pretrained=True), given, task, facts)


def _state_dict(context: StageContext, config: ModelConfig, *, path: Path, match: statedict.Match) -> Imported:
    found, unwrapped = statedict.read_state(path)
    known = _known(config)
    given = _input(context, config, known=known)
    num_classes = _count_classes(config, given, found, match=match)
    spec = _classifier(config, given, num_classes=num_classes)
    model = models.build(spec)
    matched = statedict.match_state(found, model.state_dict(), match=match, path=path)
    model.load_state_dict(matched.state, strict=True)
    log = "".join(f"{source}\t{name}\t{list(shape)}\n" for source, name, shape in matched.pairs)
    notes = (*unwrapped, *matched.notes, f"{len(matched.pairs)} tensors of {path.name} matched by {match}")
    names = known.class_names if known.class_names and known.num_classes == num_classes else numbered(num_classes)
    return Imported(spec, model, given, classify.Config(), classify.Facts(class_names=names), notes, log)


def _known(config: ModelConfig) -> Published:
    """What the publisher says: the file may well be its published weights, or have been trained like them."""
    try:
        return models.published(config.model_copy(update={"pretrained": True}))
    except RecipeError:  # nothing was published
        return models.published(config)


def _count_classes(config: ModelConfig, given: Resolved, found: statedict.State, *, match: str) -> int:
    """How many classes the file's head has: its tensor that, in the model, changes shape with their number."""
    first, second = (models.build(_classifier(config, given, num_classes=n)).state_dict() for n in (2, 3))
    heads = [name for name in first if first[name].shape != second[name].shape]
    if not heads:
        raise PackageError(f"{config.name} has no head that depends on the number of classes")
    if match == "name":
        sources = statedict.align_prefix(found, first)[0]
    else:
        pairs = zip(statedict.without_counters(first), statedict.without_counters(found), strict=False)
        sources = {name: found[theirs] for name, theirs in pairs}
    for name in heads:
        sizes = zip(first[name].shape, second[name].shape, strict=True)
        axis = next(index for index, (one, other) in enumerate(sizes) if one != other)
        if name in sources and sources[name].ndim == first[name].ndim:
            return int(sources[name].shape[axis])
    return 2  # no head in the file: the matching that follows says what is wrong


def _classifier(config: ModelConfig, given: Resolved, *, num_classes: int) -> ModelSpec:
    facts = classify.Facts(class_names=numbered(num_classes))
    return model_spec(config, given=given, task=classify.Config(), facts=facts)


def numbered(num_classes: int) -> tuple[str, ...]:
    """Stand-ins for unknown class names."""
    return tuple(f"class_{index}" for index in range(num_classes))


def _input(context: StageContext, config: ModelConfig, *, known: Published) -> Resolved:
    """From the recipe's data over the publisher where there are data, else as the publisher says.

    Raises:
        UsageError: There are no data, and the publisher says too little.
    """
    if context.recipe.data is not None:
        asked = config.model_copy(update={"pretrained": known.has_weights})
        return loading.resolve_input(context.data, model=asked)
    kind = known.input.kind if known.input is not None else "image"
    module = INPUTS[kind]
    return Resolved(*module.resolve(module.Config(), _NoExamples(config.name), published=known.of(kind)))


@dataclass(frozen=True)
class _NoExamples:
    """What an input may look at where there are no data: see inputs.Examples."""

    name: str
    columns: Mapping[str, Any] = field(default_factory=dict)
    in_memory: bool = True

    def __len__(self) -> int:
        return 0

    def read(self, most: int | None = None) -> Mapping[str, Any]:
        raise UsageError(
            f"{self.name} takes any input, and nobody says which it was trained on",
            hint="give a recipe with its data: --recipe RECIPE",
        )


# -- the package ------------------------------------------------------------------------------------


def _publish(
    context: StageContext, found: Imported, *, source: str, key: str, target: Path, evaluated: bool = True
) -> ModelPackage:
    model, facts = found.model.eval(), found.facts
    metrics: dict[str, Any] = {
        "num_params": measure.num_params(model),
        "num_nonzero": measure.num_nonzero(model),
        "macs": measure.macs(model, _example(found.spec)),
        "precision": "fp32",
    }
    evaluated = evaluated and appraise.has_metric(context, found.given)
    known = dict(found.known)
    if evaluated:
        facts = check_told(context, found.spec.told, given=found.given, source=source)
        known |= recorded(context)
    manifest = Manifest(
        stage=STAGE,
        key=key,
        model=found.spec,
        parts=signatures(model, given=found.given, task=found.task, facts=facts),
        input=found.given.spec,
        facts=facts.model_dump(mode="json"),
        notes=(f"imported from {source}", *found.notes),
        **{"task": found.task.model_dump(mode="json"), **known},
    )
    evaluation = None
    if evaluated:
        evaluation = appraise.score_module(context, model, manifest, found.given)
        metrics["val"] = appraise.metric_of(evaluation)
    manifest = manifest.model_copy(update={"metrics": metrics})
    if found.log:
        _write_log(context, found.log)
    return publish(context, manifest, evaluation, target=target, model=model.cpu(), files=found.given.files)


def _example(spec: ModelSpec) -> list[torch.Tensor]:
    """Two samples of noise, as the model takes them."""
    taken = Signature(inputs=spec.given, outputs=())
    sizes = {axis: 2 if axis == BATCH else EXAMPLE_SIZE for axis in taken.axes}
    return [torch.from_numpy(array) for array in noise(taken, sizes=sizes).values()]


def _write_log(context: StageContext, log: str) -> None:
    path = context.run / "logs" / "import.tsv"
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    store.write_atomic(path, b"in the file\tin the model\tshape\n" + log.encode())
    context.emit({"event": "note", "stage": STAGE, "text": f"which tensor went where: {path}"})
