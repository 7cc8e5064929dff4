"""Every command with every shared flag: it does something, or it is not offered and ends in exit code 2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bmctl import cli
from bmctl.cli import main

QUERIES = ("report", "validate", "doctor", "recipes ls", "recipes show", "recipes cp", "recipes schema")
TRAINING = ("run", "train", "distribute", "compress", "prune", "quantize", "lowrank", "export")
STAGES = (*TRAINING, "infer", "import", "evaluate")
COMMANDS = (*STAGES, *QUERIES)
ARGUMENTS = {
    "infer": ["x.png"], "import": ["timm:resnet18"], "validate": ["fashion-mnist"], "recipes show": ["fashion-mnist"],
    "recipes cp": ["fashion-mnist"],
}  # fmt: skip
SPELLED = {
    "recipe": ["-r", "./gone.yaml"],
    "output": ["-o", "taken"],
    "overrides": ["--set", "no.such=1"],
    "resume": ["--resume"],
    "overwrite": ["--overwrite"],
    "dry_run": ["--dry-run"],
    "device": ["--device", "abacus"],
    "trust_code": ["--trust-code"],
    "as_json": ["--json"],
    "quiet": ["-q"],
    "verbose": ["-v"],
    "debug": ["--debug"],
}
WHO: dict[str, tuple[str, ...]] = {
    "recipe": STAGES,
    "output": STAGES,
    "overrides": (*STAGES, "validate"),
    "resume": TRAINING,  # whatever may train, or recover by training
    "overwrite": (*TRAINING, "import", "recipes cp"),
    "dry_run": STAGES,
    "device": (*TRAINING, "import", "evaluate"),  # of an artifact it is the backend's
    "trust_code": (*STAGES, "report", "validate"),
    "as_json": COMMANDS,
    "quiet": COMMANDS,
    "verbose": STAGES,
    "debug": COMMANDS,
}
HELP: dict[str, str] = {}
CODES = {"recipe": {3}, "overrides": {3}, "device": {3}, "output": {2, 5}}


def test_the_tables_are_whole() -> None:
    of_app = {command.name or command.callback.__name__ for command in cli.app.registered_commands}
    of_recipes = {f"recipes {command.name}" for command in cli.recipes_app.registered_commands}
    assert {"import" if name == "import_" else name for name in of_app} | of_recipes == set(COMMANDS)
    assert list(WHO) == list(SPELLED) == list(cli.COMMON)


def line(command: str, *flags: str) -> list[str]:
    """A call that would be whole without the flags: a dry run wherever there is one."""
    recipe = ["-r", "fashion-mnist"] if command in STAGES and "-r" not in flags else []
    dry = ["--dry-run"] if command in STAGES and "-o" not in flags else []
    return [*command.split(), *ARGUMENTS.get(command, []), *recipe, *dry, *flags]


@pytest.mark.parametrize("flag", SPELLED)
@pytest.mark.parametrize("command", COMMANDS)
def test_flag(
    command: str, flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("taken").write_text("mine")
    option = cli.COMMON[flag].annotation.__metadata__[0]
    long = next(name for name in (option.default, *option.param_decls) if str(name).startswith("--"))
    is_offered = command in WHO[flag]
    if command not in HELP:
        assert main([*command.split(), "--help"]) == 0
        HELP[command] = capsys.readouterr().out
    assert (f"{long} " in HELP[command]) == is_offered
    if command in ("report", "doctor") and is_offered:
        return  # they look at a run, and at the machine; what they say is tested where they are
    code = main(line(command, *SPELLED[flag]))
    said = capsys.readouterr()
    if not is_offered:
        assert code == 2 and "No such option" in said.err
        return
    assert code in CODES.get(flag, {0}), said.err
    if flag == "as_json":
        json.loads(said.out)
    if flag == "quiet":
        assert said.err == ""
    if flag == "dry_run":
        assert said.out
    copied = {"fashion-mnist.yaml"} if command == "recipes cp" else set()
    assert {path.name for path in tmp_path.iterdir()} == {"taken"} | copied


@pytest.mark.parametrize("wrong", ["infer.batch_sizes=2", "infer.batch_size=0", "nonsense"])
def test_infer_looks_at_overrides_with_a_model_too(
    wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["infer", "x.png", "-m", "run", "--set", wrong]) == 3
    assert f"--set {wrong}" in capsys.readouterr().err


def test_infer_names_its_model_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["infer", "x.png", "-m", "run", "-o", "other"]) == 2
    assert "--to FILE" in capsys.readouterr().err


def test_overrides_say_how_a_model_infers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["infer", "-m", "run", "--set", "infer={data: x.png, backend: openvino}", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"model": "run", "data": "x.png", "backend": "openvino"}
