"""One function per command: recipe -> run directory -> run here, or launch -> report. Each returns the exit code."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

from bmctl import stages, store
from bmctl.backends import named
from bmctl.errors import BmctlError, RecipeError, UsageError
from bmctl.methods import METHODS, of_verb
from bmctl.processes.signals import catch_signals
from bmctl.recipe import InferConfig, Recipe, bare_recipe, describe
from bmctl.schema import resolve_env
from bmctl.session import Options, Target, clear, find_target, graph_overrides, import_target, opened, stage

STAGES = ("train", "compress", "export", "infer")


# -- commands ---------------------------------------------------------------------------------------


def run(options: Options, *, first: str, last: str, profile: bool = False) -> int:
    """Every section of a recipe, from stage `first` to stage `last`."""
    for flag, name in (("--from", first), ("--to", last)):
        if name not in STAGES:
            raise UsageError(f"{flag} {name}: no such stage", hint=f"one of {', '.join(STAGES)}")
    chosen = STAGES[STAGES.index(first) : STAGES.index(last) + 1]
    if not chosen:
        raise UsageError(f"--from {first} comes after --to {last}", hint="swap them")
    target = find_target(options)
    if options.dry_run:
        return _plan(options, target, of=chosen)
    recipe = target.recipe
    with opened(options, target) as session:
        if options.overwrite:
            clear(session.run, keep=0 if first == "train" else 1)
        start = stages.first_package(session, profile=profile) if {"train", "compress"} & set(chosen) else None
        if "compress" in chosen and start is not None:
            stages.compress(session, start=start)
        if "export" in chosen:
            stages.export(session, backends=recipe.export.backends)
        if "infer" in chosen and recipe.infer:
            stages.infer(session)
        return stages.finish(session)


def train(options: Options, *, source: str | None = None, nproc: int | None = None, profile: bool = False) -> int:
    """Train, or train a package further; with several processes where the recipe or `nproc` says so."""
    target = find_target(options, source, once=[f"launch.nproc={nproc}"] if nproc is not None else [])
    if target.recipe.train is None:
        raise RecipeError(f"recipe {target.recipe.name!r} has no train section", hint="add one: train: {epochs: 10}")
    if options.dry_run:
        return _plan(options, target, of=("train",))
    with opened(options, target) as session:
        start = stages.start(session, target) if session.leads else target.start
        if options.overwrite and session.leads and start is None:
            clear(session.run)
        if start is None:
            stages.first_package(session, may_be_imported=False, profile=profile)
        else:
            stages.train_package(session, start=start, profile=profile)
        return stages.finish(session) if session.leads else 0


def compress(options: Options, *, source: str | None, verb: str | None = None, method: str | None = None) -> int:
    """The recipe's steps; with a verb such as prune those up to its last one, or the one step that `method` names."""
    if verb and method and method not in (known := of_verb(verb)):
        raise UsageError(f"--method {method}: not a method of {verb}", hint=f"one of {', '.join(known)}")
    # `--set` addresses the one step that the command line names, else the recipe that holds the steps.
    one_step = method or (of_verb(verb)[0] if verb and source and not options.recipe else None)
    target = find_target(options, source, step=one_step)
    if verb and not one_step:
        target = _up_to(target, verb)
    if options.dry_run:
        return _plan(options, target, of=("train", "compress") if options.recipe else ("compress",))
    with opened(options, target) as session:
        start = stages.start(session, target) or (stages.newest(session) if one_step else stages.first_package(session))
        stages.compress(session, start=start)
        return stages.finish(session)


def export(
    options: Options,
    *,
    source: str | None,
    backends: Sequence[str],
    flag: str | None = None,
    axes: Sequence[str] = (),
    sample: str | None = None,
) -> int:
    """Build, prove, measure and gate the newest package's artifacts, beside those of the uncompressed model.

    Args:
        backends: Names of backends: only these, configured as the recipe has them.
        flag: Of backends.choose: that one as well.
        axes: Sizes of free axes, such as ``width=32:320:640``.
        sample: An .npz that a foreign graph is compared and timed on.
    """
    target = find_target(options, source, once=graph_overrides(axes, sample=sample))
    chosen = named(backends, given=target.recipe.export.backends) if backends else target.recipe.export.backends
    if options.dry_run:
        narrowed = replace(target, recipe=_exporting(target.recipe, chosen))
        return _plan(options, narrowed, of=STAGES[:3] if options.recipe else ("export",))
    if target.kept is not None and not target.kept.export.backends:
        target = replace(target, kept=_exporting(target.kept, chosen))  # it names none: these are the first
    with opened(options, target) as session:
        if stages.start(session, target) is None and options.recipe:
            stages.compress(session, start=stages.first_package(session))
        stages.export(session, backends=chosen, flag=flag)
        return stages.finish(session)


def _exporting(recipe: Recipe, backends: Sequence[Any]) -> Recipe:
    """The recipe with these backends, configs of BACKENDS."""
    section = recipe.export.model_copy(update={"backends": tuple(backends)})
    return recipe.model_copy(update={"export": section})


def infer(
    options: Options,
    *,
    data: str | None,
    model: str | None,
    backend: str | None,
    form: str,
    to: str | None,
    on_bad: str = "refuse",
) -> int:
    """Predict with a run, a package, an .onnx or an engine."""
    if on_bad not in ("refuse", "skip"):
        raise UsageError(f"--on-bad {on_bad}: no such way", hint="refuse or skip")
    if form not in ("jsonl", "csv", "gif"):
        raise UsageError(f"--format {form}: no such format", hint="jsonl, csv or gif")
    film = Path(to) if form == "gif" and to else None
    if form == "gif" and film is None:
        raise UsageError("--format gif: a film needs a file", hint="--to FILE.gif; predictions are printed as well")
    from bmctl.engine.deployment import infer as engine

    if model and options.output:
        raise UsageError(
            "--model and --output both name what to predict with",
            hint="leave one out; --to FILE is where predictions go",
        )
    # DATA stands for infer.data, which a recipe need not have then.
    overrides = [*(['infer.data=""'] if data else []), *(options.overrides or ())]
    if model and not options.recipe and not any(one.startswith("task.") for one in overrides):
        recipe, source = bare_recipe("infer", overrides), Path(model)
    else:  # how its task predicts is said over the recipe that the model was made by
        target = find_target(replace(options, overrides=overrides), None if options.recipe else model)
        recipe, source = target.recipe, Path(model) if model else target.run
    section = recipe.infer or InferConfig(data="")
    data = data or resolve_env(section.data)
    if not data:
        raise UsageError("nothing to predict: no DATA, and the recipe has no infer.data", hint="bmctl infer DATA")
    backend = backend or section.backend
    if options.dry_run:
        return _say(options, {"model": str(source), "data": data, "backend": backend})
    task, size = recipe.task, section.batch_size
    with options.console() as console, catch_signals() as stop:
        found = engine.predict(
            source,
            data,
            backend=backend,
            batch_size=size,
            task=task,
            film=film,
            on_bad=cast(Literal["refuse", "skip"], on_bad),
            emit=console.emit,
            stop=stop,
        )
        lines = engine.to_csv(found, columns=found.columns) if form == "csv" else engine.to_jsonl(found)
        if options.as_json:
            console.data(json.dumps(list(found), indent=2))
        elif to and film is None:
            store.write_atomic(Path(to), "".join(line + "\n" for line in lines).encode())
        else:
            all(console.data(line) for line in lines)  # stops when nobody reads any more
        stop.check(engine.STAGE)
    return 0


def import_model(
    options: Options,
    *,
    source: str,
    model: str | None,
    match: str,
    axes: Sequence[str] = (),
    sample: str | None = None,
) -> int:
    """Package a pretrained model, a state dict, an ONNX file or a checkpoint as the first package of a run."""
    if match not in ("name", "position"):
        raise UsageError(f"--match {match}: no such way", hint="name or position")
    options = _with_own_recipe(options, source)
    target = import_target(options, name=model or source, once=graph_overrides(axes, sample=sample))
    if options.dry_run:
        return _say(options, {"import": source, "into": str(target.run)})
    with opened(options, target) as session:
        if options.overwrite:
            clear(session.run)
        stages.import_package(session, source, model=model, match=cast(Literal["name", "position"], match))
        return stages.finish(session)


def _with_own_recipe(options: Options, source: str) -> Options:
    """For a checkpoint of a run: that run's recipe, unless another is named."""
    around = [path.parent for path in Path(source).absolute().parents if path.name == "checkpoints"]
    if not around or not Path(source).is_dir():
        return options
    if options.output is None:
        raise UsageError(f"{source} is a checkpoint: say which run its package begins", hint="add -o runs/NAME")
    recipe = around[0] / "recipe.yaml"
    return options if options.recipe or not recipe.is_file() else replace(options, recipe=str(recipe))


def evaluate(options: Options, *, source: str | None, split: str) -> int:
    """The task's metric on a run's newest package, a package or a deployed artifact."""
    if split not in ("val", "test"):
        raise UsageError(f"--split {split}: no such split to evaluate on", hint="val or test")
    target = find_target(options, source)
    if options.dry_run:
        return _say(options, {"evaluate": source or str(target.run), "split": split})
    from bmctl.engine.evaluation.evaluate import evaluate_artifact

    with opened(options, target) as session, stage(session) as context:
        found = evaluate_artifact(context, Path(source) if source else session.run, split=split)
        session.console.evaluation(found, split=split)
    return 0


def _up_to(target: Target, verb: str) -> Target:
    """The recipe's steps up to its last one of `verb`: what `bmctl prune -r RECIPE` has to do."""
    steps = target.recipe.compress
    last = max((i for i, step in enumerate(steps) if METHODS[step.method].VERB == verb), default=None)
    if last is None:
        default = of_verb(verb)[0]
        raise RecipeError(f"recipe {target.recipe.name!r} has no {verb} step", hint=f"name one: --method {default}")
    return replace(target, recipe=target.recipe.model_copy(update={"compress": steps[: last + 1]}))


def _plan(options: Options, target: Target, *, of: Sequence[str]) -> int:
    """What would be done; torch is needed only for the arithmetic of several processes."""
    recipe = target.recipe
    lines = {stage: text for stage, text in describe(recipe) if stage in ("run", *of)}
    if "train" in lines and recipe.launch.worlds[-1] > 1:
        from bmctl.engine.sharding.planning import sharing

        lines |= sharing(recipe)
    return _say(options, {"run": str(target.run), **lines})


def _say(options: Options, fields: Mapping[str, str]) -> int:
    with options.console() as console:
        if options.as_json:
            console.data(json.dumps(dict(fields), indent=2))
        else:
            width = max(len(name) for name in fields)
            console.data("\n".join(f"{name:<{width}}  {text}" for name, text in fields.items()))
    return 0


def explain(error: BaseException, arguments: Sequence[str]) -> int:
    """Tell the user what went wrong, on stderr, and return the exit code."""
    with Options(as_json="--json" in arguments).console() as console:
        console.error(error, debug="--debug" in arguments)
    if isinstance(error, KeyboardInterrupt):
        return 130
    return error.exit_code if isinstance(error, BmctlError) else 1
