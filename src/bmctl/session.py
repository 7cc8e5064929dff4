"""One command at work: its options, its recipe, its run, and where its events go."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from bmctl import package, rundir
from bmctl.console import Console
from bmctl.core import owncode
from bmctl.errors import BmctlError, RecipeError, UsageError
from bmctl.job import is_restarted
from bmctl.launch import is_worker
from bmctl.processes import guard
from bmctl.processes.signals import catch_signals
from bmctl.recipe import Recipe, bare_recipe, load_recipe

if TYPE_CHECKING:
    from bmctl.engine.context import StageContext


def leads() -> bool:
    """Whether this process is the first rank, or alone."""
    return not is_worker() or os.environ.get("RANK", "0") == "0"


@dataclass(frozen=True)
class Options:
    """The flags that commands share; see cli.common."""

    recipe: str | None = None
    output: str | None = None
    overrides: list[str] | None = None
    resume: bool = False
    overwrite: bool = False
    dry_run: bool = False
    device: str | None = None
    trust_code: bool = False
    as_json: bool = False
    quiet: bool = False
    verbose: bool = False
    debug: bool = False

    def begin(self) -> None:
        """What the flags say that holds for the whole process."""
        owncode.trust(self.trust_code)

    def console(self) -> Console:
        return Console(quiet=self.quiet or not leads(), verbose=self.verbose, as_json=self.as_json)


@dataclass(frozen=True)
class Session:
    """A command that holds its run's lock.

    Attributes:
        recipe: Of this command.
        kept: What the run's recipe becomes once the command has made packages by it; None leaves the run's as it is.
        owns: It came first; False where it joined other machines that were training in this run already.
    """

    options: Options
    recipe: Recipe
    run: Path
    console: Console
    kept: Recipe | None = None
    owns: bool = True

    @property
    def leads(self) -> bool:
        """Whether this process writes and speaks: under torchrun the first rank, of several machines the first."""
        return leads() and self.owns

    def emit(self, event: Mapping[str, object]) -> None:
        """An event of the engine: into the run's metrics.jsonl, and onto the screen."""
        if "stage" in event:
            guard.note(stage=str(event["stage"]))
        if event["event"] != "progress":  # a bar's ticks are for the screen alone
            rundir.append_event(self.run, event)
        self.console.emit(event)

    def note(self, text: str) -> None:
        self.emit({"event": "note", "text": text})

    def keep_recipe(self) -> None:
        """Make the command's recipe the run's own, without what its flags said for this once."""
        if self.kept is not None and self.leads:
            rundir.keep_recipe(self.run, self.kept)


@contextmanager
def opened(options: Options, target: Target) -> Iterator[Session]:
    """Create or add to the run, alone; a bug's traceback is kept in the run's log."""
    recipe, run = target.recipe, target.run
    with options.console() as console:
        if not leads():
            yield Session(options, recipe, run, console)  # rank 0 owns the directory
            return
        with rundir.opened(run, recipe, kept=target.kept) as owns:
            guard.note(run=str(run))
            kept = target.kept if package.list_packages(run) else target.kept or recipe
            session = Session(options, recipe, run, console, kept, owns)
            if options.recipe is None:
                console.note(f"run: {run}")
            try:
                yield session
            except (BmctlError, KeyboardInterrupt):
                raise
            except Exception as error:
                log = run / "logs" / "bug.log"
                try:
                    log.parent.mkdir(exist_ok=True)
                    log.write_text("".join(traceback.format_exception(error)))
                    error.add_note(f"the traceback is in {log}")
                except OSError as unwritten:
                    error.add_note(f"the traceback could not be written to {log}: {unwritten.strerror}")
                raise


@contextmanager
def stage(session: Session) -> Iterator[StageContext]:
    """What an engine stage needs, in this process: the group joined, signals caught.

    Raises:
        PreemptedError: A signal came too late for the stage, and is not to be forgotten by the next one.
        InterruptedRunError: The same for SIGINT.
    """
    from bmctl.engine.context import StageContext
    from bmctl.engine.parallel import agree, join, leave

    options, recipe = session.options, session.recipe
    group = join(recipe.launch)
    try:
        with catch_signals(grace_s=recipe.train.grace_s if recipe.train else 30.0) as stop:
            yield StageContext(
                run=session.run,
                recipe=recipe,
                group=group,
                stop=stop,
                emit=session.emit,
                resume=options.resume,
                overwrite=options.overwrite,
                beat=guard.beat,
            )
            if agree(group, stop.requested is not None):
                stop.request(signal.SIGTERM)  # it may have come to another process
            stop.kept = stop.kept or "what was done"
            stop.check("the last part of a stage")
    finally:
        leave(group)


# -- what a command works on ------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """What a command was pointed at.

    Attributes:
        recipe: What the command does.
        run: The run that it reads and adds to.
        kept: The recipe without what flags said for this once: what the run is given for its own. None for one step
            alone, which is added to a run's packages and leaves its recipe.
        start: The package named on the command line; None for the run's own.
        graph: The foreign .onnx named on the command line, not packaged yet.
    """

    recipe: Recipe
    run: Path
    kept: Recipe | None = None
    start: package.ModelPackage | None = None
    graph: Path | None = None


def find_target(
    options: Options, source: str | None = None, *, step: str | None = None, once: Sequence[str] = ()
) -> Target:
    """Resolve `-r`, `-o` and the positional source: the recipe over the source's own over the newest run's.

    Args:
        source: A package, a run or an .onnx; None takes the recipe's run, or the newest.
        step: A method's name: the recipe's steps become this one, and `--set` addresses it.
        once: Further overrides, of flags that mean this command alone.
    """
    if source is None:
        return _own_run(options, step=step, once=once)
    path = Path(source)
    if path.suffix == ".onnx" and path.is_file():
        target = import_target(options, name=source, step=step, once=once)
        return replace(target, graph=path)
    home = next((parent for parent in path.parents if rundir.is_run(parent)), None)
    if home is not None and "deploy" in path.parts:  # a deployed artifact belongs to its run
        return _target(options, options.recipe or home / package.RECIPE, home, step=step, once=once)
    start = package.find_package(path)
    known = path if rundir.is_run(path) else start.path
    if options.output is None and not rundir.is_run(path) and home is None:
        raise UsageError(f"{source} is not part of a run: say where the result goes", hint="add -o runs/NAME")
    run = Path(options.output) if options.output else home or path
    return replace(_target(options, options.recipe or known / package.RECIPE, run, step=step, once=once), start=start)


def _own_run(options: Options, *, step: str | None, once: Sequence[str]) -> Target:
    if options.recipe is not None:
        return _target(options, options.recipe, None, step=step, once=once)
    named = Path(options.output) if options.output else None
    run = named if named and rundir.is_run(named) else rundir.newest_run()
    return _target(options, run / package.RECIPE, named or run, step=step, once=once)


def import_target(options: Options, *, name: str, step: str | None = None, once: Sequence[str] = ()) -> Target:
    """Where an imported model goes: the recipe's run, or one that is named after the model.

    What flags say of its axes decides what is imported: the run keeps it.
    """
    if options.recipe:
        target = _target(options, options.recipe, None, step=step, once=once)
    else:
        name = re.sub(r"[^A-Za-z0-9_.-]", "-", Path(name.rpartition(":")[2]).stem).strip("-._") or "model"
        recipe = bare_recipe(name, _overrides(options, step=step, once=once))
        target = Target(recipe, rundir.run_path(recipe, options.output))
    return replace(target, kept=None if step else target.recipe)


def _target(options: Options, known: str | Path, run: Path | None, *, step: str | None, once: Sequence[str]) -> Target:
    """A target by a recipe that there is; without `run` it is the recipe's own."""
    recipe = load_recipe(known, overrides=_overrides(options, step=step, once=once))
    run = run or rundir.run_path(recipe, options.output)
    if step:
        return Target(recipe, run)
    try:
        return Target(recipe, run, kept=load_recipe(known, overrides=options.overrides or ()))
    except RecipeError:  # only its flags make it one
        return Target(recipe, run, kept=recipe)


def _overrides(options: Options, *, step: str | None, once: Sequence[str]) -> list[str]:
    steps = [f"compress=[{{method: {step}}}]"] if step else []
    given = [f"compress.0.{one}" if step else one for one in options.overrides or ()]
    return [*steps, *given, *once, *([f"launch.device={options.device}"] if options.device else [])]


def graph_overrides(axes: Sequence[str], *, sample: str | None) -> list[str]:
    """`--axis NAME=MIN:OPT:MAX` and `--sample FILE.npz` as overrides of the recipe.

    Raises:
        UsageError: An axis without a name, or sizes that are no one to three numbers.
    """
    found = []
    for text in axes:
        name, _, sizes = text.rpartition("=")
        numbers = sizes.split(":")
        if not name or '"' in name or len(numbers) not in (1, 3) or not all(one.strip().isdecimal() for one in numbers):
            raise UsageError(f"--axis {text}: not NAME=MIN:OPT:MAX", hint="such as --axis width=32:320:640")
        low, usual, high = numbers if len(numbers) == 3 else numbers * 3
        found.append(f'export.axes."{name}"={{min: {low}, opt: {usual}, max: {high}}}')
    return found + ([f"export.sample={json.dumps(sample)}"] if sample is not None else [])


def clear(run: Path, *, keep: int = 0) -> None:
    """Before redoing (`--overwrite`): what stands on a stage goes with it; the first `keep` packages stay.

    What torchrun starts again goes on instead.
    """
    if is_restarted():
        return
    for path in package.list_packages(run)[keep:]:
        shutil.rmtree(path)
    for name in ("deploy", "evaluations", "measurements.json", "report.json", "report.md"):
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    if keep == 0:
        for path in (*(run / name for name in ("checkpoints", "tensorboard", "metrics.jsonl")), *_attempts(run)):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _attempts(run: Path) -> list[Path]:
    return list((run / "logs").glob("attempts-*.json"))
