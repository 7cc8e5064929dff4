"""One function per command: recipe -> run directory -> run here, or launch -> report. Each returns the exit code."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, cast

from bmctl import package, store
from bmctl import report as reports
from bmctl.backends import BACKENDS, choose
from bmctl.errors import BmctlError, GateError, PackageError, RecipeError, UsageError
from bmctl.launch import Job, launch
from bmctl.methods import METHODS, of_verb
from bmctl.recipe import InferConfig, describe
from bmctl.report import gates
from bmctl.report.rows import ORIGINAL
from bmctl.schema import resolve_env
from bmctl.session import Options, Session, Target, clear, find_target, import_target, opened, stage
from bmctl.tasks import TASKS

STAGES = ("train", "compress", "export", "infer")
SHOWN = 12
"""Predictions that `run` prints; all of them are in the run."""


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
        return _plan(options, target, stages=chosen)
    recipe = target.recipe
    with opened(options, target) as session:
        if options.overwrite:
            clear(session.run, keep=0 if first == "train" else 1)
        start = _first_package(session, profile=profile) if {"train", "compress"} & set(chosen) else None
        if "compress" in chosen and start is not None:
            _compress(session, start=start)
        if "export" in chosen:
            _export(session)
        if "infer" in chosen and recipe.infer:
            _infer(session)
        return _finish(session)


def train(options: Options, *, source: str | None = None, nproc: int | None = None, profile: bool = False) -> int:
    """Train, or train a package further; with several processes where the recipe or `nproc` says so."""
    target = find_target(options, source, extra=[f"launch.nproc={nproc}"] if nproc is not None else [])
    if target.recipe.train is None:
        raise RecipeError(f"recipe {target.recipe.name!r} has no train section", hint="add one: train: {epochs: 10}")
    if options.dry_run:
        return _plan(options, target, stages=("train",))
    with opened(options, target) as session:
        start = _start(session, target) if session.leads else target.start
        if options.overwrite and session.leads and start is None:
            clear(session.run)
        if start is None:
            _first_package(session, may_be_imported=False, profile=profile)
        else:
            _train(session, start=start, profile=profile)
        return _finish(session) if session.leads else 0


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
        return _plan(options, target, stages=("train", "compress") if options.recipe else ("compress",))
    with opened(options, target) as session:
        start = _start(session, target) or (_newest(session) if one_step else _first_package(session))
        _compress(session, start=start)
        return _finish(session)


def export(options: Options, *, source: str | None, backends: Sequence[str], flag: str | None = None) -> int:
    """Build, prove, measure and gate the newest package's artifacts, beside those of the uncompressed model.

    Args:
        backends: Names of backends in place of the recipe's.
        flag: Of backends.choose: that one as well.
    """
    chosen = [f"export.backends=[{', '.join(backends)}]"] if backends else []
    target = find_target(options, source, extra=chosen)
    if options.dry_run:
        return _plan(options, target, stages=STAGES[:3] if options.recipe else ("export",))
    with opened(options, target) as session:
        if _start(session, target) is None and options.recipe:
            _compress(session, start=_first_package(session))
        _export(session, flag=flag)
        return _finish(session)


def infer(
    options: Options, *, data: str | None, model: str | None, backend: str | None, form: str, to: str | None
) -> int:
    """Predict with a run, a package, an .onnx or an engine."""
    if form not in ("jsonl", "csv"):
        raise UsageError(f"--format {form}: no such format", hint="jsonl or csv")
    from bmctl.engine.deployment import infer as engine

    target = find_target(options) if model is None or options.recipe else None
    section = (target.recipe.infer if target else None) or InferConfig(data="")
    source = Path(model) if model else target.run if target else None
    data = data or resolve_env(section.data)
    if not data or source is None:
        raise UsageError("nothing to predict: no DATA, and the recipe has no infer.data", hint="bmctl infer photo.png")
    backend = backend or section.backend
    if options.dry_run:
        return _say(options, {"model": str(source), "data": data, "backend": backend})
    with options.console() as console:
        found = engine.predict(source, data, backend=backend, batch_size=section.batch_size, emit=console.emit)
        lines = engine.to_csv(found, columns=found.columns) if form == "csv" else engine.to_jsonl(found)
        if options.as_json:
            console.data(json.dumps(list(found), indent=2))
        elif to:
            store.write_atomic(Path(to), "".join(line + "\n" for line in lines).encode())
        else:
            all(console.data(line) for line in lines)  # stops when nobody reads any more
    return 0


def import_model(options: Options, *, source: str, model: str | None, match: str) -> int:
    """Package a pretrained model, a state dict, an ONNX file or a checkpoint as the first package of a run."""
    if match not in ("name", "position"):
        raise UsageError(f"--match {match}: no such way", hint="name or position")
    target = import_target(_with_own_recipe(options, source), name=model or source)
    if options.dry_run:
        return _say(options, {"import": source, "into": str(target.run)})
    with opened(options, target) as session:
        if options.overwrite:
            clear(session.run)
        _import(session, source, model=model, match=cast(Literal["name", "position"], match))
        return _finish(session)


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


# -- what the commands are made of -------------------------------------------------------------------


def _first_package(session: Session, *, may_be_imported: bool = True, profile: bool = False) -> package.ModelPackage:
    """The run's first package: found, or trained now."""
    run, recipe = session.run, session.recipe
    found = package.list_packages(run)
    imported = bool(found) and not found[0].name.endswith("-train")
    if imported and not may_be_imported:
        raise UsageError(f"{run} starts from {found[0].name}", hint=f"to train that further: bmctl train {found[0]}")
    if found and (recipe.train is None or imported):
        return package.open_package(found[0])
    if recipe.train is None:
        raise PackageError(
            f"{run} has no package, and recipe {recipe.name!r} has no train section",
            hint=f"add a train section, or start from a pretrained model: bmctl import timm:NAME -o {run}",
        )
    _train(session, profile=profile)
    return package.open_package(package.list_packages(run)[0])


def _train(session: Session, *, start: package.ModelPackage | None = None, profile: bool = False) -> None:
    options, recipe = session.options, session.recipe
    job = Job(
        run=str(session.run),
        resume=options.resume,
        overwrite=options.overwrite,
        start=str(start.path) if start else None,
        profile=profile,
    )
    launch(job, recipe.launch, emit=session.emit)


def _newest(session: Session) -> package.ModelPackage:
    _first_package(session)
    return package.find_package(session.run)


def _start(session: Session, target: Target) -> package.ModelPackage | None:
    """The package that the command line names, made the run's own; None where it names none."""
    from bmctl.engine.compression.compress import take_in

    if target.graph:
        return _import(session, str(target.graph), model=None, match="name")
    if target.start is None:
        return None
    with stage(session) as context:
        return take_in(context, target.start)


def _import(
    session: Session, source: str, *, model: str | None, match: Literal["name", "position"]
) -> package.ModelPackage:
    from bmctl.engine.intake.importing import import_stage

    with stage(session) as context:
        return import_stage(context, source, model=model, match=match)


def _compress(session: Session, *, start: package.ModelPackage) -> None:
    from bmctl.engine.compression.compress import run_steps

    with stage(session) as context:
        run_steps(context, start=start)


def _export(session: Session, *, flag: str | None = None) -> None:
    """Artifacts of the newest package, and of the first where the recipe wants the comparison."""
    from bmctl.engine.deployment.export import export_package
    from bmctl.engine.deployment.prove import prove

    recipe, run = session.recipe, session.run
    backends = list(recipe.export.backends)
    if flag:
        config, why = choose(flag, given=backends)
        is_named = config in backends
        session.note(f"--{flag} takes {config.name}{', which the recipe names as well' if is_named else ''}: {why}")
        backends += [] if is_named else [config]
    if not backends:
        raise RecipeError(f"recipe {recipe.name!r} names no backend to export to", hint="--backend onnxruntime")
    packages = package.list_packages(run)
    original, newest = package.open_package(packages[0]), package.open_package(packages[-1])
    with stage(session) as context:
        deployed = []
        if recipe.export.baseline and len(packages) > 1:
            comparable = [one for one in backends if not BACKENDS[one.name].unavailable(one)]
            deployed += export_package(context, original, backends=comparable, into=run / "deploy" / ORIGINAL)
        deployed += export_package(context, newest, backends=backends, into=run / "deploy")
        prove(context, original=original, deployed=deployed)


def _infer(session: Session) -> None:
    """The recipe's infer section: predictions into the run, and on stdout where nobody asked for JSON."""
    from bmctl.engine.deployment import infer as engine

    section = session.recipe.infer
    assert section is not None
    found = engine.predict(
        session.run,
        resolve_env(section.data),
        backend=section.backend,
        batch_size=section.batch_size,
        emit=session.emit,
    )
    predictions = list(found)
    path = session.run / "predictions.jsonl"
    store.write_atomic(path, "".join(line + "\n" for line in engine.to_jsonl(predictions)).encode())
    for one in predictions[:SHOWN]:
        session.console.line(f"{one['input']}: {found.words(one)}", stage="infer")
    session.note(f"{len(predictions)} predictions are in {path}")


def _finish(session: Session) -> int:
    """Write the report, show it, and let the gates speak once there is something to judge."""
    found = reports.collect(session.run)
    if found.artifacts:
        recipe = session.recipe
        metrics = TASKS[recipe.task.kind].METRICS if recipe.task is not None else {}
        found = reports.with_gates(found, gates.check(recipe.gates, found, metrics=metrics))
    store.write_atomic(session.run / "report.json", reports.to_json(found).encode() + b"\n")
    store.write_atomic(session.run / "report.md", reports.to_markdown(found).encode())
    if session.options.as_json:
        session.console.data(reports.to_json(found))
    else:
        session.console.report(found)
    try:
        gates.raise_for(found.gates)
    except GateError as failed:
        failed.has_document = session.options.as_json
        raise
    return 0


def _up_to(target: Target, verb: str) -> Target:
    """The recipe's steps up to its last one of `verb`: what `bmctl prune -r RECIPE` has to do."""
    steps = target.recipe.compress
    last = max((i for i, step in enumerate(steps) if METHODS[step.method].VERB == verb), default=None)
    if last is None:
        default = of_verb(verb)[0]
        raise RecipeError(f"recipe {target.recipe.name!r} has no {verb} step", hint=f"name one: --method {default}")
    return replace(target, recipe=target.recipe.model_copy(update={"compress": steps[: last + 1]}))


def _plan(options: Options, target: Target, *, stages: Sequence[str]) -> int:
    """What would be done; torch is needed only for the arithmetic of several processes."""
    recipe = target.recipe
    lines = {stage: text for stage, text in describe(recipe) if stage in ("run", *stages)}
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
