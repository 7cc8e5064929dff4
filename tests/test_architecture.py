"""The floor plan: who may import whom, and what the parent process may load."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "bmctl"
FILES = sorted(SOURCE.rglob("*.py"))

PLUGINS = {"models", "inputs", "sources", "tasks", "methods", "backends"}
# Room -> the rooms it may import from, anywhere in the file. errors, schema and the version are free to all.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "schema": set(),
    "fit": set(),
    "__main__": {"cli"},
    "cli": {"pipeline", "queries", "session", "processes"},
    "pipeline": {
        "stages", "session", "recipe", "package", "launch", "report", "store", "processes", "engine", *PLUGINS,
    },
    "stages": {"session", "package", "launch", "job", "report", "store", "processes", "tasks", "backends", "engine"},
    "queries": {"session", "recipe", "rundir", "report", "doctor"},
    "session": {"console", "core", "recipe", "rundir", "package", "launch", "job", "processes", "engine"},
    "console": {"core", "report.rows", "report.page", "report.scoring", "report.wording"},
    "report.wording": {"report.numbers", "core"},
    "report.page": {"report.rows", "report.numbers", "core"},
    "report.numbers": {"report.rows", "core"},
    "report.scoring": {"report.rows", "core", "tasks"},  # a task's own functions read an evaluation's counts
    "report.rows": set(),
    "recipe": set(),
    "recipe.sections": {"core", *PLUGINS},
    "recipe.shape": {"recipe.yamlio", "recipe.sections"},
    "recipe.diagnosis": {"recipe.yamlio", "recipe.shape", "models"},
    "recipe.draft": {"core", "recipe.yamlio", "recipe.shape", "recipe.diagnosis"},
    "recipe.checks": {
        "recipe.yamlio", "recipe.sections", "recipe.diagnosis", "core", *(PLUGINS - {"sources"}),
    },
    "recipe.plan": {"recipe.sections", "methods"},
    "recipe.yamlio": set(),
    "disk": set(),
    "store": {"disk"},
    "rundir": {"core", "store", "disk", "recipe", "package", "job"},
    "weights": {"store"},
    "package": {"core", "store", "weights", "models", "inputs"},
    "restore": {"package", "weights", "models", "methods"},
    "job": {"store"},
    "verdict": {"job"},
    "launch": {"recipe", "store", "disk", "job", "processes", "engine"},
    "report": {"store", "core", "tasks"},
    "report.gates": {"report.rows", "report.numbers", "core", "recipe.sections"},
    "doctor": {"core"},
    "bundled": {"sources"},
    # -- what plug-ins and the engine both stand on --
    "core": {"store"},
    "models": {"core"},
    "inputs": {"core"},
    "sources": {"core"},
    "tasks": {"core"},
    "methods": {"core"},
    "backends": {"core"},
    # -- processes, seen from outside and from inside --
    "processes": {"recipe", "store", "disk", "job", "verdict"},
    # -- the engine, from the ground up --
    "engine.batch": {"core"},
    "engine.effects": set(),
    "engine.parallel": {"recipe", "core"},
    "engine.loading": {"core", "recipe.sections", "models", "inputs", "sources", "tasks", "engine.batch"},
    "engine.context": {"recipe", "processes", "engine.loading", "engine.parallel"},
    "engine.modelspec": {"models", "inputs", "tasks"},
    "engine.modules": {"core"},
    "engine.computing": {"core", "engine.modules", "engine.parallel", "engine.batch", "engine.effects"},
    "engine.checkpoints": {
        "recipe", "package", "restore", "store", "disk", "models", "inputs", "tasks", "engine.parallel",
    },
    "engine.artifacts": {"core", "recipe", "package", "restore", "store", "inputs", "tasks", "backends"},
    "engine.sharding": {
        "core", "recipe", "models", "tasks",
        "engine.modules", "engine.computing", "engine.loading", "engine.modelspec", "engine.parallel", "engine.batch",
    },
    "engine.evaluation": {
        "core", "recipe", "package", "store", "inputs", "tasks", "backends", "processes",
        "engine.modules", "engine.loading", "engine.artifacts", "engine.context",
    },
    "engine.training": {
        "core", "recipe", "package", "restore", "disk", "models", "inputs", "tasks", "backends", "processes",
        "engine.modules", "engine.computing", "engine.loading", "engine.checkpoints", "engine.sharding",
        "engine.evaluation", "engine.context", "engine.modelspec", "engine.parallel", "engine.batch", "engine.effects",
    },
    "engine.compression": {
        "core", "recipe", "package", "restore", "weights", "store", "methods", "inputs", "tasks", "processes",
        "engine.modules", "engine.loading", "engine.checkpoints", "engine.artifacts", "engine.evaluation",
        "engine.training", "engine.context", "engine.parallel",
    },
    "engine.intake": {
        "core", "recipe", "package", "weights", "store", "disk", "models", "inputs", "tasks", "backends",
        "engine.loading", "engine.checkpoints", "engine.artifacts", "engine.evaluation", "engine.context",
        "engine.modelspec",
    },
    "engine.deployment": {
        "core", "recipe", "package", "restore", "store", "report.rows", "inputs", "tasks", "backends", "processes",
        "engine.loading", "engine.artifacts", "engine.evaluation", "engine.context",
    },
    "engine.worker": {
        "core", "recipe", "package", "store", "job", "verdict", "processes",
        "engine.context", "engine.parallel", "engine.training",
    },
}  # fmt: skip
FREE = {"errors", "schema", "fit", ""}
MOST_LINES = 350
# What the parent process must not load before a command has been parsed and its work is known.
HEAVY = {
    "torch", "torchvision", "timm", "transformers", "numpy", "PIL", "onnx", "onnxruntime", "onnxscript", "openvino",
    "nncf", "safetensors", "tokenizers", "tensorrt", "tensorrt_rtx", "torch_pruning", "sklearn", "tensorboard",
}  # fmt: skip


def name_of(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def is_inner(module: str) -> bool:
    """A file in a plug-in's own folder, which may have torch on top: the plug-in's face imports it inside functions.

    Not its `spec`, the sections of a recipe and of a manifest, which is as light as the face.
    """
    return module.count(".") >= 2 and module.split(".")[0] in PLUGINS and not module.endswith(".spec")


def imports(tree: ast.AST, *, everywhere: bool) -> Iterator[tuple[str, int]]:
    """Modules imported, with the line; `everywhere` looks into functions too, never into `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            yield from (
                (f"{module}.{alias.name}" if module.startswith("bmctl") else module, node.lineno)
                for alias in node.names
            )
        elif isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        elif everywhere or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from imports(node, everywhere=everywhere)


def room(target: str) -> str:
    """``bmctl.engine.training.train.fit`` is room engine.train, ``bmctl.recipe.Recipe`` is room recipe."""
    parts = target.split(".")[1:]
    known = {name_of(path) for path in FILES}
    while parts and ".".join(parts) not in known:
        parts.pop()
    return ".".join(parts)


def rooms_of(module: str) -> list[str]:
    """``engine.training.loop`` lies in itself, in engine.training and in engine; the smallest comes first."""
    parts = module.split(".")
    return [".".join(parts[:end]) for end in range(len(parts), 0, -1)]


def allowed(target: str, rooms: set[str]) -> bool:
    return target in FREE or bool(rooms.intersection(rooms_of(target)))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_keep_the_floor_plan(path: Path) -> None:
    me = name_of(path)
    home = next((room for room in rooms_of(me) if room in MAY_IMPORT), None)
    rooms = set() if me in ("", "engine") else MAY_IMPORT.get(home)
    assert rooms is not None, f"{path.name} has no place in the floor plan: add it to MAY_IMPORT"
    wrong = [
        f"{path}:{line} imports {target}"
        for target, line in imports(ast.parse(path.read_text()), everywhere=True)
        if target.split(".")[0] == "bmctl" and home not in rooms_of(room(target)) and not allowed(room(target), rooms)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_heavy_imports_stay_in_the_engine(path: Path) -> None:
    me = name_of(path)
    if me.split(".")[0] in {"engine", "core", "processes"} or me == "bundled.make" or is_inner(me):
        return
    wrong = [
        f"{path}:{line} imports {target} at module level"
        for target, line in imports(ast.parse(path.read_text()), everywhere=False)
        if target.split(".")[0] in HEAVY or target.startswith("bmctl.engine") or is_inner(room(target))
    ]
    assert not wrong, "\n".join(wrong)


def test_the_engine_is_built_from_the_ground_up() -> None:
    """Each of its rooms stands on rooms that come before it: there are no circles."""
    known: list[str] = []
    for home, rooms in MAY_IMPORT.items():
        if home.startswith("engine."):
            above = {room for room in rooms if room.startswith("engine") and room not in known}
            assert not above, f"{home} stands on {', '.join(sorted(above))}"
            known.append(home)


def test_no_file_leads_back_to_itself() -> None:
    """Not by way of an import inside a function either: that hides a circle, it does not undo it."""
    stands_on = {
        name_of(path): {
            room(target)
            for target, _ in imports(ast.parse(path.read_text()), everywhere=True)
            if target.split(".")[0] == "bmctl" and room(target) not in ("", name_of(path))
        }
        for path in FILES
    }
    try:
        graphlib.TopologicalSorter(stands_on).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_file_is_too_long_to_read(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MOST_LINES


def test_stages_do_not_import_each_other_upwards() -> None:
    """worker calls stages; nothing in the engine calls back up."""
    wrong = [
        f"{path}:{line} imports {target}"
        for path in FILES
        if name_of(path).startswith("engine.") and name_of(path) != "engine.worker"
        for target, line in imports(ast.parse(path.read_text()), everywhere=True)
        if room(target) in {"engine.worker", "launch", "pipeline", "cli", "console"} and target.startswith("bmctl")
    ]
    assert not wrong, "\n".join(wrong)


def test_only_console_imports_rich() -> None:
    wrong = [
        f"{path}:{line}"
        for path in FILES
        if name_of(path) != "console"
        for target, line in imports(ast.parse(path.read_text()), everywhere=True)
        if target.split(".")[0] == "rich"
    ]
    assert not wrong, "\n".join(wrong)


def test_only_the_command_line_prints() -> None:
    wrong = [
        f"{path}:{node.lineno}"
        for path in FILES
        if name_of(path) not in {"cli", "pipeline", "console", "bundled.make"}
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not wrong, "\n".join(wrong)


def test_nothing_is_unpickled() -> None:
    """Of pickle only its error's name; torch.load only with weights_only=True; np.load never with allow_pickle."""
    wrong = []
    for path in FILES:
        tree, lines = ast.parse(path.read_text()), path.read_text().splitlines()
        wrong += [
            f"{path}:{line}"
            for target, line in imports(tree, everywhere=True)
            if target in {"pickle", "dill", "marshal"}
            and f"from {target} import UnpicklingError" not in lines[line - 1]
        ]
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "load":
                keywords = {k.arg: k.value for k in node.keywords}
                owner = ast.unparse(node.func.value)
                if owner == "torch" and ast.unparse(keywords.get("weights_only", ast.Constant(False))) != "True":
                    wrong.append(f"{path}:{node.lineno} torch.load without weights_only=True")
                if "allow_pickle" in keywords and ast.unparse(keywords["allow_pickle"]) != "False":
                    wrong.append(f"{path}:{node.lineno} np.load with allow_pickle")
    assert not wrong, "\n".join(wrong)


def loaded_by(statement: str) -> set[str]:
    """Top-level packages in sys.modules after `statement` in a fresh interpreter."""
    code = f"{statement}\nimport sys; print(' '.join(sorted({{name.split('.')[0] for name in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_command_line_starts_light() -> None:
    assert not loaded_by("import bmctl.cli") & {"torch", "numpy", "onnx", "pydantic", "yaml", "rich"}


@pytest.mark.parametrize("module", ["recipe", "package", "launch", "report", "report.gates", "store", "pipeline"])
def test_the_parent_process_stays_light(module: str) -> None:
    assert not loaded_by(f"import bmctl.{module}") & HEAVY
