"""Recipes in and out: includes, overrides, defaults, and every problem at once with file, line and column."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from bmctl.errors import Problem, RecipeError
from bmctl.recipe.checks import check_sections
from bmctl.recipe.diagnosis import dotted, explain, nearest_place
from bmctl.recipe.draft import Draft, apply_override, check_variables, expand, merge, read_own_code
from bmctl.recipe.plan import describe
from bmctl.recipe.sections import (
    BackendConfig,
    CalibConfig,
    DataConfig,
    ExportConfig,
    GatesConfig,
    InferConfig,
    LaunchConfig,
    MeasureConfig,
    Recipe,
    SourceConfig,
    SplitConfig,
    Step,
    TaskConfig,
)
from bmctl.recipe.shape import default_kinds, recipe_schema
from bmctl.recipe.yamlio import read_yaml, yaml_text

__all__ = [
    "BackendConfig", "CalibConfig", "DataConfig", "ExportConfig", "GatesConfig", "InferConfig",
    "LaunchConfig", "MeasureConfig", "Recipe", "SourceConfig", "SplitConfig", "Step", "TaskConfig",
    "bare_recipe", "builtin_recipes", "describe", "find_recipe", "load_recipe", "recipe_schema", "recipe_yaml",
]  # fmt: skip

MAX_INCLUDES = 64
MAX_SHOWN = 50


def load_recipe(path_or_name: str | Path, *, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe with its includes, apply overrides, check all of it.

    Args:
        path_or_name: A built-in recipe's name; with a slash or ``.yaml`` a path.
        overrides: ``a.b=v`` with v as YAML, as `--set` takes them; later ones win. A key with dots stands in quotes.

    Raises:
        RecipeError: With every problem that was found.
    """
    name = str(path_or_name)
    path = Path(name) if isinstance(path_or_name, Path) or is_path(name) else find_recipe(name)
    shown = name if is_path(name) else str(path)
    shown = shown if len(shown) <= 200 else f"{shown[:100]}...{shown[-80:]}"
    draft = Draft(places={(): shown})
    try:
        read_into(draft, path, name=shown, root=Path(os.path.realpath(path)).parent, chain=())
    except RecipeError as error:
        raise recipe_error(error.problems) from error
    return finish(draft, overrides=overrides)


def bare_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe of nothing but a name and overrides, for what has none, such as a foreign .onnx."""
    return finish(Draft(data={"name": name}, places={(): "--set", ("name",): "name"}), overrides=overrides)


def finish(draft: Draft, *, overrides: Sequence[str]) -> Recipe:
    """Overrides, then every check; raises all problems together."""
    for override in overrides:
        apply_override(draft, override)
    read_own_code(draft, draft.data, draft.places, base=Path())
    expand(draft.data, draft.places, kinds=default_kinds(draft.data))
    check_variables(draft, draft.data, path=())
    recipe = None
    try:
        recipe = Recipe.model_validate(draft.data)
    except ValidationError as error:
        draft.problems += explain(error, data=draft.data, places=draft.places)
    for path, message, hint in check_sections(draft.data):
        draft.problems.append(Problem(nearest_place(draft.places, path), dotted(path), message, hint))
    if draft.problems or recipe is None:
        raise recipe_error(draft.problems)
    return recipe


def recipe_error(problems: Sequence[Problem]) -> RecipeError:
    """All problems as one error, in the order in which they stand; of thousands the first ones."""
    ordered = sorted(dict.fromkeys(problems), key=lambda p: reading_order(p.where))
    count = len(ordered)
    message = "a problem in the recipe" if count == 1 else f"{count} problems in the recipe"
    if count > MAX_SHOWN:
        message += f", of which the first {MAX_SHOWN} are"
    return RecipeError(f"{message}:", problems=ordered[:MAX_SHOWN])


def reading_order(where: str) -> tuple[bool, str, tuple[int, ...]]:
    """Files first, line by line, then overrides."""
    file, *numbers = where.rsplit(":", 2)
    position = tuple(int(n) for n in numbers) if all(n.isdigit() for n in numbers) else ()
    return where.startswith("--set"), file if position else where, position


# -- files and includes -----------------------------------------------------------------------------


def is_path(name: str) -> bool:
    return "/" in name or name.endswith((".yaml", ".yml"))


def builtin_recipes() -> dict[str, Path]:
    """The recipes that come with bmctl, by name: in the wheel beside the package, in a checkout at its top."""
    here = Path(__file__).parents[1]
    folder = here / "recipes" if (here / "recipes").is_dir() else here.parents[1] / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """The file of a built-in recipe.

    Raises:
        RecipeError: There is none of that name.
    """
    known = builtin_recipes()
    if name in known:
        return known[name]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    hint += "see `bmctl recipes ls`; a path has a slash or ends in .yaml"
    if len(name) < 200 and Path(name).is_file():
        hint = f"for the file say ./{name}"
    raise RecipeError(f"no built-in recipe {name[:100]!r}", hint=hint)


def read_into(draft: Draft, path: Path, *, name: str, root: Path, chain: tuple[Path, ...]) -> None:
    """Merge a file, its includes first, into the draft.

    Args:
        name: What messages call the file.
        root: Directory that includes must not leave.
        chain: Files that include this one.
    """
    draft.num_files += 1
    document = read_yaml(path, name=name)
    draft.problems += document.problems
    places = {key: f"{name}:{line}:{column}" for key, (line, column) in document.positions.items()}
    data = document.data
    if not isinstance(data, dict):
        what = "is empty" if data is None else f"is {'a list' if isinstance(data, list) else 'a single value'}"
        hint = "start from one: bmctl recipes cp fashion-mnist my.yaml"
        draft.problems.append(Problem(f"{name}:1:1", "", f"{what}, expected a mapping of sections", hint))
        return
    includes = data.pop("include", None)
    targets = [includes] if isinstance(includes, str) else includes or []
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        problem = Problem(places["include",], "include", "must be text or a list of texts", "include: [base.yaml]")
        draft.problems.append(problem)
        targets = []
    for i, target in enumerate(targets):
        where = places.get(("include", i), places["include",])
        include(draft, target, where=where, beside=path, name=name, root=root, chain=(*chain, path.resolve()))
    expand(data, places, kinds={})
    read_own_code(draft, data, places, base=path.parent)
    merge(draft.data, data, path=(), places=draft.places, over_places=places)
    draft.places[()] = f"{name}:1:1"


def include(
    draft: Draft, target: str, *, where: str, beside: Path, name: str, root: Path, chain: tuple[Path, ...]
) -> None:
    """Read what a recipe includes; what is refused becomes a problem of the line that asks for it."""
    try:
        if is_path(target):
            shown = os.path.normpath(os.path.join(os.path.dirname(name), target))  # noqa: PTH118, PTH120 (may be relative)
            path = Path(os.path.realpath(beside.parent / target))
            if not path.is_relative_to(root):
                raise RecipeError(
                    f"{target!r} is outside the recipe's directory {root}", hint="copy it beside the recipe"
                )
        else:
            path = find_recipe(target)
            shown, root = str(path), path.parent
        if path.resolve() in chain:
            raise RecipeError(f"{target!r} includes itself, by way of {len(chain)} file(s)", hint="remove one include")
        if draft.num_files >= MAX_INCLUDES:
            raise RecipeError(f"more than {MAX_INCLUDES} files are included", hint="merge some of them")
        read_into(draft, path, name=shown, root=root, chain=chain)
    except ValueError as error:  # a NUL in the name
        draft.problems.append(Problem(where, "include", f"{target!r}: {error}"))
    except RecipeError as error:
        inner = [p for p in error.problems if p.where.startswith(shown + ":")] if is_path(target) else []
        draft.problems += inner or [Problem(where, "include", error.message, error.hint)]


# -- out --------------------------------------------------------------------------------------------


def recipe_yaml(recipe: Recipe) -> str:
    """The resolved recipe, every value spelled out, in the order of the sections; loads back as an equal one."""
    return yaml_text(recipe.model_dump(mode="json"))
