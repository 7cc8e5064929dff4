"""The commands that only look: recipes, validate, doctor, report. Each returns the exit code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import bmctl.report as reports
from bmctl import rundir
from bmctl.errors import UsageError
from bmctl.recipe import builtin_recipes, find_recipe, load_recipe, recipe_schema
from bmctl.session import Options


def validate(options: Options, *, recipe: str) -> int:
    """Check a recipe; every problem at once is in the error that it raises."""
    found = load_recipe(recipe, overrides=options.overrides or ())
    with options.console() as console:
        if options.as_json:
            console.data(json.dumps({"valid": True, "recipe": found.model_dump(mode="json")}, indent=2))
        elif not options.quiet:
            console.data(f"{recipe}: valid")
    return 0


def doctor(options: Options) -> int:
    """What this machine can do; 0 even where an optional part is missing, 6 where a needed one is."""
    from bmctl.doctor import examine

    checks = examine()
    with options.console() as console:
        if options.as_json:
            console.data(json.dumps([vars(check) for check in checks], indent=2))
        else:
            console.checks(checks)
    return 6 if any(check.status == "missing" for check in checks) else 0


def report(options: Options, *, source: str | None, form: str) -> int:
    """Show a run's report, made anew from what is on disk."""
    if form not in ("table", "markdown", "json"):
        raise UsageError(f"--format {form}: no such format", hint="table, markdown or json")
    run = Path(source) if source else rundir.newest_run()
    rundir.check_run(run)
    found = reports.collect(run)
    with options.console() as console:
        if options.as_json or form == "json":
            console.data(reports.to_json(found))
        elif form == "markdown":
            console.data(reports.to_markdown(found))
        else:
            console.report(found)
    return 0


def recipes_ls(options: Options) -> int:
    """The built-in recipes with the first line of each."""
    rows = [(name, _first_comment(path)) for name, path in sorted(builtin_recipes().items())]
    with options.console() as console:
        if options.as_json:
            console.data(json.dumps([{"name": name, "about": about} for name, about in rows], indent=2))
        else:
            width = max(len(name) for name, _ in rows)
            for name, about in rows:
                console.data(f"{name:<{width}}  {about}")
    return 0


def recipes_show(options: Options, *, name: str) -> int:
    """A built-in recipe's text; with --json its resolved values."""
    path = find_recipe(name)
    with options.console() as console:
        if options.as_json:
            console.data(json.dumps(load_recipe(name).model_dump(mode="json"), indent=2))
        else:
            console.data(path.read_text(encoding="utf-8").rstrip("\n"))
    return 0


def recipes_cp(options: Options, *, name: str, target: str) -> int:
    """Copy a built-in recipe to a file or into a directory."""
    path, to = find_recipe(name), Path(target)
    if to.is_dir():
        to = to / path.name
    if to.exists() and not options.overwrite:
        raise UsageError(f"{to} exists", hint="add --overwrite, or name another file")
    if not to.parent.is_dir():
        raise UsageError(f"{to.parent} is not a directory", hint=f"mkdir -p {to.parent}")
    shutil.copyfile(path, to)
    with options.console() as console:
        if options.as_json:
            console.data(json.dumps({"copied": name, "to": str(to)}, indent=2))
        else:
            console.note(f"copied to {to}; try: bmctl validate ./{to}")
    return 0


def recipes_schema(options: Options) -> int:
    """The JSON Schema that editors complete and check recipes by."""
    with options.console() as console:
        console.data(json.dumps(recipe_schema(), indent=2))
    return 0


def _first_comment(path: Path) -> str:
    line = path.read_text(encoding="utf-8").split("\n", 1)[0]
    return line.lstrip("# ").strip() if line.startswith("#") else ""
