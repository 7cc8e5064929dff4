"""The command line: every command parses, then makes one call into pipeline.

Only typer is imported at the top: `bmctl --help` must cost no more than a bare Typer app.
"""

import contextlib
import functools
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from bmctl.session import Options

app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}
)
recipes_app = typer.Typer(no_args_is_help=True, help="List, show and copy the built-in recipes.")
app.add_typer(recipes_app, name="recipes", rich_help_panel="Set up")


def tell_version(wanted: bool) -> None:
    if wanted:
        from bmctl import __version__

        typer.echo(f"bmctl {__version__}")
        raise typer.Exit


@app.callback()
def bmctl(
    version: Annotated[
        bool, typer.Option("--version", callback=tell_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """From a PyTorch model and a data set to a small, fast, proven artifact: one recipe, the whole way."""


WHOLE, STAGES, PACKAGES, SET_UP = "The whole way", "Stages", "Packages", "Set up"

Source = Annotated[
    str | None, typer.Argument(metavar="[PACKAGE|RUN|ONNX]", help="What to start from; else the newest run.")
]
Trained = Annotated[str | None, typer.Argument(metavar="[PACKAGE|RUN]", help="A package to train further.")]
Profile = Annotated[bool, typer.Option("--profile", help="Trace a few training steps, into the run's profile folder.")]
Method = Annotated[str | None, typer.Option("--method", help="Which method; its knobs are given by --set KNOB=VALUE.")]
Axes = Annotated[
    list[str] | None,
    typer.Option("--axis", metavar="NAME=MIN:OPT:MAX", help="Sizes of a free axis of an .onnx; repeatable."),
]
Sample = Annotated[str | None, typer.Option("--sample", metavar="NPZ", help="Arrays by name, for parity and timing.")]


def common(
    recipe: Annotated[str | None, typer.Option("--recipe", "-r", help="A built-in recipe's name, or a path.")] = None,
    output: Annotated[str | None, typer.Option("--output", "-o", metavar="RUN", help="The run's directory.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=V", help="Override one value of the recipe; repeatable.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Do finished stages again.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    device: Annotated[str | None, typer.Option("--device", help="auto, cpu or cuda.")] = None,
    trust_code: Annotated[
        bool, typer.Option("--trust-code", help="Run .py files that recipes and packages name.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Silent on success.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say more.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Tracebacks.")] = False,
) -> None:
    """The flags that commands share; the fields of session.Options."""


COMMON = inspect.signature(common).parameters
CONTEXT = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
SPEAKING = ("as_json", "quiet", "debug")
Flags = Sequence[str]


def command(
    panel: str, *, name: str | None = None, flags: Flags = tuple(COMMON), without: Flags = (), to: typer.Typer = app
) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Register a command: its first argument is Options of the shared `flags`, but `without` those that do nothing."""

    def register(function: Callable[..., int]) -> Callable[..., int]:
        own = [p for p in inspect.signature(function).parameters.values() if p.name != "options"]
        shared = {flag: COMMON[flag] for flag in flags if flag not in without}

        @functools.wraps(function)
        def run(*, context: typer.Context, **given: Any) -> int:
            from bmctl.processes.guard import guarded
            from bmctl.session import Options

            options = Options(**{flag: given.pop(flag) for flag in shared})
            options.begin()
            work = functools.partial(function, options, **given)
            if context.obj and "dry_run" in shared:  # what can be planned is work
                again = [*context.obj, *(["--resume"] if "resume" in shared and not options.resume else [])]
                work = functools.partial(guarded, work, again=again)
            raise typer.Exit(work())

        parameters = [*own, *(p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in shared.values()), CONTEXT]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        to.command(name, rich_help_panel=panel)(run)
        return function

    return register


@command(WHOLE)
def run(
    options: "Options",
    first: Annotated[str, typer.Option("--from", help="First stage: train, compress, export or infer.")] = "train",
    last: Annotated[str, typer.Option("--to", help="Last stage.")] = "infer",
    profile: Profile = False,
) -> int:
    """Do every section of a recipe: train, compress, export, infer."""
    from bmctl import pipeline

    return pipeline.run(options, first=first, last=last, profile=profile)


@command(STAGES)
def train(options: "Options", source: Trained = None, profile: Profile = False) -> int:
    """Train the recipe's model, or a package further; the result is a package."""
    from bmctl import pipeline

    return pipeline.train(options, source=source, profile=profile)


@command(STAGES)
def distribute(
    options: "Options",
    source: Trained = None,
    nproc: Annotated[int | None, typer.Option("--nproc", help="Processes on this machine.")] = None,
    profile: Profile = False,
) -> int:
    """Train with several processes: torchrun, run for you."""
    from bmctl import pipeline

    return pipeline.train(options, source=source, nproc=nproc, profile=profile)


@command(STAGES)
def compress(options: "Options", source: Source = None) -> int:
    """Apply the recipe's compression steps in order."""
    from bmctl import pipeline

    return pipeline.compress(options, source=source)


@command(STAGES)
def prune(options: "Options", source: Source = None, method: Method = None) -> int:
    """Remove channels (structured) or single weights (magnitude)."""
    from bmctl import pipeline

    return pipeline.compress(options, source=source, verb="prune", method=method)


@command(STAGES)
def quantize(options: "Options", source: Source = None, method: Method = None) -> int:
    """Compute in int8 (ptq), or store and compute in fp16 or bf16 (cast)."""
    from bmctl import pipeline

    return pipeline.compress(options, source=source, verb="quantize", method=method)


@command(STAGES)
def lowrank(options: "Options", source: Source = None, method: Method = None) -> int:
    """Factorise layers into two thin ones (svd)."""
    from bmctl import pipeline

    return pipeline.compress(options, source=source, verb="lowrank", method=method)


@command(STAGES)
def export(
    options: "Options",
    source: Source = None,
    backends: Annotated[
        list[str] | None, typer.Option("--backend", help="Only these backends instead of the recipe's; repeatable.")
    ] = None,
    tensorrt: Annotated[
        bool, typer.Option("--tensorrt", help="Also TensorRT where it is installed with a GPU, else TensorRT-RTX.")
    ] = False,
    axes: Axes = None,
    sample: Sample = None,
) -> int:
    """Export to ONNX and to every backend; prove, measure and gate each artifact."""
    from bmctl import pipeline

    flag = "tensorrt" if tensorrt else None
    return pipeline.export(options, source=source, backends=backends or (), flag=flag, axes=axes or (), sample=sample)


@command(STAGES, without=("resume", "overwrite", "device"))
def infer(
    options: "Options",
    data: Annotated[
        str | None,
        typer.Argument(metavar="[DATA]", help="An image, a folder, a text, an .npz, a .csv; else infer.data."),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="A run, package, .onnx or engine; else the newest run.")
    ] = None,
    backend: Annotated[str | None, typer.Option("--backend", help="auto, or one backend's name.")] = None,
    form: Annotated[str, typer.Option("--format", help="jsonl or csv.")] = "jsonl",
    to: Annotated[str | None, typer.Option("--to", help="A file instead of stdout.")] = None,
) -> int:
    """Predict: JSON lines or CSV with class names and scores."""
    from bmctl import pipeline

    return pipeline.infer(options, data=data, model=model, backend=backend, form=form, to=to)


@command(PACKAGES, name="import", without=("resume",))
def import_(
    options: "Options",
    source: Annotated[
        str, typer.Argument(help="timm:NAME, torchvision:NAME, transformers:NAME, a state dict, .onnx or checkpoint.")
    ],
    model: Annotated[str | None, typer.Option("--model", help="The model that a state dict belongs to.")] = None,
    match: Annotated[str, typer.Option("--match", help="Match tensors by name or by position.")] = "name",
    axes: Axes = None,
    sample: Sample = None,
) -> int:
    """Package a pretrained model or a checkpoint; a name asks for the download."""
    from bmctl import pipeline

    return pipeline.import_model(options, source=source, model=model, match=match, axes=axes or (), sample=sample)


@command(PACKAGES, without=("resume", "overwrite"))
def evaluate(
    options: "Options",
    source: Annotated[
        str | None, typer.Argument(metavar="[PACKAGE|RUN|DEPLOYED]", help="What to evaluate; else the newest run.")
    ] = None,
    split: Annotated[str, typer.Option("--split", help="val or test.")] = "val",
) -> int:
    """Run the task's metric on a package or a deployed artifact."""
    from bmctl import pipeline

    return pipeline.evaluate(options, source=source, split=split)


@command(PACKAGES, flags=("trust_code", *SPEAKING))
def report(
    options: "Options",
    source: Annotated[str | None, typer.Argument(metavar="[RUN]", help="Else the newest run.")] = None,
    form: Annotated[str, typer.Option("--format", help="table, markdown or json.")] = "table",
) -> int:
    """Show what a run's packages and artifacts are worth."""
    from bmctl import queries

    return queries.report(options, source=source, form=form)


@command(SET_UP, flags=("overrides", "trust_code", *SPEAKING))
def validate(
    options: "Options",
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A built-in recipe's name, or a path.")],
) -> int:
    """Check a recipe and say everything that is wrong with it."""
    from bmctl import queries

    return queries.validate(options, recipe=recipe)


@command(SET_UP, flags=SPEAKING)
def doctor(options: "Options") -> int:
    """Say what this machine can do, and what is missing."""
    from bmctl import queries

    return queries.doctor(options)


@command(SET_UP, name="ls", flags=SPEAKING, to=recipes_app)
def recipes_ls(options: "Options") -> int:
    """List the built-in recipes."""
    from bmctl import queries

    return queries.recipes_ls(options)


@command(SET_UP, name="show", flags=SPEAKING, to=recipes_app)
def recipes_show(options: "Options", name: Annotated[str, typer.Argument(help="A built-in recipe's name.")]) -> int:
    """Print a built-in recipe."""
    from bmctl import queries

    return queries.recipes_show(options, name=name)


@command(SET_UP, name="cp", flags=("overwrite", *SPEAKING), to=recipes_app)
def recipes_cp(
    options: "Options",
    name: Annotated[str, typer.Argument(help="A built-in recipe's name.")],
    target: Annotated[str, typer.Argument(help="A file or a directory.")] = ".",
) -> int:
    """Copy a built-in recipe, to be edited."""
    from bmctl import queries

    return queries.recipes_cp(options, name=name, target=target)


@command(SET_UP, name="schema", flags=SPEAKING, to=recipes_app)
def recipes_schema(options: "Options") -> int:
    """Print the JSON Schema of recipes, for editors."""
    from bmctl import queries

    return queries.recipes_schema(options)


def spell(argument: str) -> str:
    """``--dry_run`` is ``--dry-run``; values after ``=`` are left alone."""
    if not argument.startswith("--"):
        return argument
    flag, equals, value = argument.partition("=")
    return flag.replace("_", "-") + equals + value


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command, `argv` or this process's own, which is guarded (processes/guard.py); returns the exit code."""
    arguments = [spell(argument) for argument in (sys.argv[1:] if argv is None else argv)]
    try:
        app(arguments, prog_name="bmctl", obj=arguments if argv is None else None)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BrokenPipeError:
        code = 0  # `bmctl ... | head` has what it wanted
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 (the one place where every error ends)
        from bmctl import pipeline

        code = pipeline.explain(error, arguments)
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes stdout once more at exit: point it where that cannot fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError, AttributeError):
        code = code or 7
        with contextlib.suppress(OSError, ValueError, AttributeError):  # stderr may be closed as well
            sys.stderr.write("error: stdout is closed or full, what was written to it is lost\n")
    return code
