"""The command line: every command's help, spelling, and that the README knows every command."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from bmctl import cli
from bmctl.methods import METHODS

ROOT = Path(__file__).parents[1]
COMMANDS = sorted(command.name or command.callback.__name__ for command in cli.app.registered_commands)
RECIPE_COMMANDS = sorted(command.name or command.callback.__name__ for command in cli.recipes_app.registered_commands)
PROMISED = {
    "train", "distribute", "prune", "quantize", "lowrank", "compress", "export", "infer", "import", "evaluate", "run",
    "validate", "doctor",
}  # fmt: skip


def test_the_promised_commands_are_there() -> None:
    assert set(COMMANDS) >= PROMISED
    assert set(RECIPE_COMMANDS) == {"ls", "show", "cp", "schema"}


@pytest.mark.parametrize(
    "command", [[], *([c] for c in COMMANDS), ["recipes"], *(["recipes", c] for c in RECIPE_COMMANDS)]
)
def test_help_works(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*command, "--help"]) == 0
    out = capsys.readouterr().out
    assert "Usage: bmctl" in out
    assert "_" not in "".join(re.findall(r"--[a-z_-]+", out)), "flags are spelled with dashes"


@pytest.mark.parametrize("name", METHODS)
def test_each_methods_command_is_there_and_names_it(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([METHODS[name].VERB, "--help"]) == 0
    assert re.search(rf"\b{name}\b", capsys.readouterr().out)


def test_help_works_without_any_heavy_package(tmp_path: Path) -> None:
    """Importing one of these while help is printed fails, as it would where it is not installed."""
    blocked = ("torch", "numpy", "onnx", "onnxruntime", "openvino", "nncf", "timm", "torchvision", "yaml")
    for name in blocked:
        (tmp_path / f"{name}.py").write_text("raise ImportError('blocked')\n")
    path = f"import sys; sys.path.insert(0, {str(tmp_path)!r})"
    code = f"{path}; from bmctl.cli import main; sys.exit(main(['train', '--help']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--recipe" in done.stdout


def test_flags_take_dashes_and_underscores() -> None:
    assert cli.spell("--dry_run") == "--dry-run"
    assert cli.spell("--set=data.num_workers=2") == "--set=data.num_workers=2"
    assert cli.spell("data.num_workers=2") == "data.num_workers=2"
    assert cli.main(["train", "--recipe", "digits", "--dry_run", "-q"]) == 0


def test_an_unknown_command_or_flag_is_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trane"]) == 2
    assert cli.main(["train", "--recipie", "digits"]) == 2
    assert "No such option" in capsys.readouterr().err


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    from bmctl import __version__

    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"bmctl {__version__}"


def test_the_readme_documents_every_command() -> None:
    documented = set(re.findall(r"^\| `bmctl ([a-z]+)", (ROOT / "README.md").read_text(), flags=re.MULTILINE))
    assert documented == {*COMMANDS, "recipes"}


def test_the_readme_documents_every_exit_code() -> None:
    from bmctl import errors

    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.BmctlError)]
    documented = {int(n) for n in re.findall(r"^\| (\d+) \|", (ROOT / "README.md").read_text(), flags=re.MULTILINE)}
    assert documented == {0, 143, *(c.exit_code for c in classes)}
