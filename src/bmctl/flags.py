"""The flags and arguments that commands share. Only typer is imported: see cli."""

import inspect
from typing import Annotated

import typer

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
Sample = Annotated[
    str | None, typer.Option("--sample", metavar="NPZ", help="Arrays by the inputs' names: parity and timing on them.")
]


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
SPEAKING = ("as_json", "quiet", "debug")
