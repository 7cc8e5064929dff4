"""Ctrl-C and SIGTERM in every command: it ends at the next border, by the contract, and publishes nothing half done.

The signals are real; each is sent from within the work, just before the function that a row names.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.bad_input import fixtures
from tests.engine.runs import environment

from bmctl.cli import main

STEPS = "compress: [{method: svd, rank: 1}]\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, r.yaml with one step, a trained run/ and m.onnx."""
    folder = tmp_path_factory.mktemp("made")
    fixtures.trained(folder, cache=folder)
    fixtures.write_onnx(folder / "m.onnx")
    (folder / "r.yaml").write_text((folder / "r.yaml").read_text() + STEPS)
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path) -> Iterator[Path]:
    shutil.copytree(made, tmp_path / "here", symlinks=True)
    with contextlib.chdir(tmp_path / "here"):
        yield tmp_path / "here"


def send_before(function: str, signum: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send this process a signal at the first call of MODULE:FUNCTION."""
    name, _, attribute = function.partition(":")
    module = importlib.import_module(f"bmctl.{name}")
    whole, sent = getattr(module, attribute), []

    @functools.wraps(whole)
    def struck(*args: object, **given: object) -> object:
        if not sent:
            sent.append(signum)
            os.kill(os.getpid(), signum)
        return whole(*args, **given)

    monkeypatch.setattr(module, attribute, struck)


FIRST_STEP, LAST_STEP = "new/checkpoints/train/step-00000001", "new/checkpoints/train/step-00000006"
ROWS = [
    # command, where, code after SIGTERM, what it has published
    pytest.param("train -r r.yaml -o new", "engine.training.loop:_step", 75, {FIRST_STEP}, marks=pytest.mark.slow),
    pytest.param(
        "train -r r.yaml -o new", "engine.training.train_stage:_publish", 75, {LAST_STEP}, marks=pytest.mark.slow
    ),
    pytest.param("distribute -r r.yaml -o new", "engine.training.loop:_step", 75, {FIRST_STEP}, marks=pytest.mark.slow),
    pytest.param("compress -r r.yaml -o run", "engine.compression.step:load_model", 143, set(), marks=pytest.mark.slow),
    ("compress -r r.yaml -o run", "engine.compression.step:_publish", 75, {"run/packages/01-svd"}),
    pytest.param(
        "prune run --method structured", "methods.structured.channels:find_groups", 143, set(), marks=pytest.mark.slow
    ),
    pytest.param(
        "prune run --method magnitude", "engine.compression.step:load_model", 143, set(), marks=pytest.mark.slow
    ),
    ("lowrank run --set rank=1", "methods.svd.factorise:_factorise", 143, set()),
    pytest.param(
        "quantize run", "methods.ptq.quantization:_has_attention", 143, set(), marks=pytest.mark.slow
    ),  # NNCF looks at samples next
    ("export run", "engine.deployment.export:make_reference", 143, set()),
    pytest.param(
        "export run", "engine.deployment.prove:_batch_size", 143, {"run/deploy/onnxruntime"}, marks=pytest.mark.slow
    ),
    ("infer data/test/a -m run --to out.jsonl", "engine.deployment.infer:_reader", 143, set()),
    pytest.param("infer data/test/a -m run", "engine.deployment.infer:_reader", 143, set(), marks=pytest.mark.slow),
    ("evaluate run --split test", "engine.evaluation.evaluate:array_batches", 143, set()),
    ("import m.onnx -o new", "engine.intake.trial:_start", 143, set()),
    ("run -r r.yaml -o run", "engine.compression.step:_publish", 75, {"run/packages/01-svd"}),
    pytest.param(
        "run -r r.yaml -o new --to train",
        "engine.training.train_stage:_publish",
        75,
        {LAST_STEP},
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize("signum", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("command", "where", "code", "left"), ROWS)
def test_a_signal_ends_it_at_the_next_border(
    command: str,
    where: str,
    code: int,
    left: set[str],
    signum: signal.Signals,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before, handler = published(here), signal.getsignal(signum)
    send_before(where, signum, monkeypatch)
    assert main(command.split()) == (130 if signum == signal.SIGINT else code)
    said = capsys.readouterr()
    assert said.out == ""
    assert "error: " in said.err and "Traceback" not in said.err
    assert published(here) - before == left
    assert not (here / "out.jsonl").exists()
    assert signal.getsignal(signum) is handler


def published(folder: Path) -> set[str]:
    kinds = [folder / run / kind for run in ("run", "new") for kind in ("packages", "deploy", "checkpoints/train")]
    found = [path for kind in kinds for path in kind.glob("[!.]*") if not path.is_symlink()]
    return {str(path.relative_to(folder)) for path in found}


@pytest.mark.slow
def test_ctrl_c_ends_a_group_of_processes(here: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bmctl", "distribute", "-r", "r.yaml", "-o", "new", "--nproc", "2"],
        env=environment(fault="SIGINT:1:2"),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 130, done.stderr
    assert (here / "new" / "checkpoints" / "train" / "latest").exists()
