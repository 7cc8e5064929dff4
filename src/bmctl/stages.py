"""What commands are made of: each stage of a run, done in one process, and the report at the end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from bmctl import package, store
from bmctl import report as reports
from bmctl.backends import BACKENDS, choose
from bmctl.errors import GateError, PackageError, RecipeError, UsageError
from bmctl.launch import Job, launch
from bmctl.processes.signals import catch_signals
from bmctl.report import gates
from bmctl.report.rows import ORIGINAL
from bmctl.schema import resolve_env
from bmctl.session import Session, Target, stage
from bmctl.tasks import TASKS

SHOWN = 12
"""Predictions that `run` prints; all of them are in the run."""


@contextmanager
def making(session: Session) -> Iterator[None]:
    """Where packages are made: the run's recipe is then the one that they were made with."""
    before = _chain(session)
    yield
    if session.leads and _chain(session) != before:
        session.keep_recipe()


def _chain(session: Session) -> list[str]:
    return [store.manifest_hash(path) for path in package.list_packages(session.run)] if session.leads else []


def first_package(session: Session, *, may_be_imported: bool = True, profile: bool = False) -> package.ModelPackage:
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
    train_package(session, profile=profile)
    return package.open_package(package.list_packages(run)[0])


def train_package(session: Session, *, start: package.ModelPackage | None = None, profile: bool = False) -> None:
    options, recipe = session.options, session.recipe
    job = Job(
        run=str(session.run),
        resume=options.resume,
        overwrite=options.overwrite,
        start=str(start.path) if start else None,
        profile=profile,
        trust_code=options.trust_code,
    )
    with making(session):
        launch(job, recipe.launch, emit=session.emit)


def newest(session: Session) -> package.ModelPackage:
    first_package(session)
    return package.find_package(session.run)


def start(session: Session, target: Target) -> package.ModelPackage | None:
    """The package that the command line names, made the run's own; None where it names none."""
    from bmctl.engine.compression.compress import take_in

    if target.graph:
        return import_package(session, str(target.graph), model=None, match="name")
    if target.start is None:
        return None
    with making(session), stage(session) as context:
        return take_in(context, target.start)


def import_package(
    session: Session, source: str, *, model: str | None, match: Literal["name", "position"]
) -> package.ModelPackage:
    from bmctl.engine.intake.importing import import_stage

    with making(session), stage(session) as context:
        return import_stage(context, source, model=model, match=match)


def compress(session: Session, *, start: package.ModelPackage) -> None:
    from bmctl.engine.compression.compress import run_steps

    with making(session), stage(session) as context:
        run_steps(context, start=start)


def export(session: Session, *, backends: Sequence[Any], flag: str | None = None) -> None:
    """Artifacts of the newest package, and of the first where the recipe wants the comparison.

    Args:
        backends: Configs of BACKENDS.
        flag: Of backends.choose: that one as well.
    """
    from bmctl.engine.deployment.export import export_package
    from bmctl.engine.deployment.prove import prove

    recipe, run = session.recipe, session.run
    backends = list(backends)
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


def infer(session: Session) -> None:
    """The recipe's infer section: predictions into the run, and on stdout where nobody asked for JSON."""
    from bmctl.engine.deployment import infer as engine

    section = session.recipe.infer
    assert section is not None
    with catch_signals() as stop:
        found = engine.predict(
            session.run,
            resolve_env(section.data),
            backend=section.backend,
            batch_size=section.batch_size,
            task=session.recipe.task,
            emit=session.emit,
            stop=stop,
        )
        predictions = list(found)
        stop.check(engine.STAGE)
    path = session.run / "predictions.jsonl"
    store.write_atomic(path, "".join(line + "\n" for line in engine.to_jsonl(predictions)).encode())
    for one in predictions[:SHOWN]:
        session.console.line(f"{one['input']}: {found.words(one)}", stage="infer")
    session.note(f"{len(predictions)} predictions are in {path}")


def finish(session: Session) -> int:
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
    if session.options.recipe is not None:
        session.keep_recipe()  # its gates and backends are the run's from now on, packages or not
    return 0
