"""What is said where: bars on a real terminal, plain lines elsewhere, data on stdout, and never a crash."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bmctl import console as module
from bmctl.console import Console
from bmctl.core.evaluation import Evaluation
from bmctl.doctor import Check
from bmctl.errors import DataError, Problem, RecipeError
from bmctl.report import wording
from bmctl.report.rows import Comparison, GateResult, LatencyRow, Report, Row, Score, with_gates
from bmctl.tasks import classify

ESCAPE = "\x1b"
STORY = """
from bmctl.console import Console
with Console() as console:
    console.emit({"event": "start", "stage": "train", "epochs": 2, "steps": 40, "precision": "bf16"})
    for step in range(1, 41):
        console.emit({"event": "step", "stage": "train", "epoch": 1 + step // 21, "epochs": 2,
                      "step": step, "steps": 40, "loss": 0.5, "metric": 0.861, "metric_name": "accuracy",
                      "metric_unit": "share", "samples_per_s": 812.3, "eta_s": 125})
        if step % 20 == 0:
            console.emit({"event": "evaluation", "stage": "train", "epoch": step // 20, "epochs": 2, "loss": 0.45,
                          "val_metric": 0.852, "metric_name": "accuracy", "metric_unit": "share",
                          "seconds": 14.2})
    console.emit({"event": "done", "stage": "train", "steps": 40, "val_metric": 0.852, "metric_name": "accuracy",
                  "metric_unit": "share", "seconds": 28.4})
    console.emit({"event": "progress", "text": "evaluating on test", "done": 1, "total": 2})
    console.data('{"class_name": "Ankle boot \\u00d7"}')
    console.note("all is well \\u00b7 truly")
"""


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CI", "NO_COLOR", "LC_ALL", "LC_CTYPE", "COLUMNS", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LANG", "C.UTF-8")
    monkeypatch.setenv("TERM", "xterm-256color")


def on_terminal(code: str, *, columns: int = 100, stdout: Any = None, **env: str) -> tuple[int, str]:
    """Run Python code with a terminal as its stderr, and as its stdout unless given; returns what it showed."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=stdout or theirs, stderr=theirs, stdin=theirs, env=os.environ | env
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # Linux says EIO once the other side is closed
            break
        if not piece:
            break
        shown += piece
    os.close(ours)
    return process.wait(), shown.decode()


def visible(shown: str) -> list[str]:
    """The lines of a terminal's output with colours and cursor movements taken out."""
    return [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line).rstrip() for line in re.split(r"[\r\n]+", shown)]


def test_a_terminal_gets_a_bar_with_all_its_numbers() -> None:
    code, shown = on_terminal(STORY)
    assert code == 0
    assert f"{ESCAPE}[?25h" in shown.split(f"{ESCAPE}[?25l")[-1], "the cursor must come back"
    bars = [line for line in visible(shown) if "━" in line and "ETA" in line]
    assert len(bars) > 10
    assert re.search(r"epoch 2/2 ━+.* 75 %  loss 0\.500  accuracy 86\.1 %  812 samples/s  ETA 2:05", "\n".join(bars))
    assert all(len(line) <= 100 for line in bars)


def test_what_is_finished_stays_on_the_terminal() -> None:
    lines = visible(on_terminal(STORY)[1])
    for line in (
        "▸ train  2 epochs, 40 steps, bf16",
        "  epoch 1/2  loss 0.450  val accuracy 85.2 %  14 s",
        "  kept weights: val accuracy 85.2 %, 40 steps in 28 s",
        '{"class_name": "Ankle boot \u00d7"}',
        "  note: all is well · truly",
    ):
        assert line in lines, line


@pytest.mark.parametrize("columns", [20, 40, 60, 80])
def test_bars_fit_narrow_terminals(columns: int) -> None:
    code, shown = on_terminal(STORY, columns=columns)
    assert code == 0
    bars = [line for line in visible(shown) if "━" in line]
    assert bars
    assert all(len(line) <= columns for line in bars)
    assert all("%" in line for line in bars)


@pytest.mark.parametrize("env", [{"NO_COLOR": "1"}, {"CI": "true"}, {"TERM": "dumb"}, {"TERM": ""}], ids=str)
def test_plain_lines_where_nothing_may_be_redrawn(env: dict[str, str]) -> None:
    code, shown = on_terminal(STORY, **env)
    assert code == 0
    assert ESCAPE not in shown
    assert "━" not in shown
    assert "train: epoch 2/2  loss 0.450  val accuracy 85.2 %  14 s" in shown


def test_data_goes_to_stdout_and_nothing_else_does(tmp_path: Path) -> None:
    with (tmp_path / "out").open("wb") as out:
        code, shown = on_terminal(STORY, stdout=out)
    assert code == 0
    assert (tmp_path / "out").read_text(encoding="utf-8") == '{"class_name": "Ankle boot \u00d7"}\n'
    assert "Ankle boot" not in shown


def test_what_others_print_under_a_bar_keeps_its_stream(tmp_path: Path) -> None:
    code = """
from bmctl.console import Console
with Console() as console:
    console.emit({"event": "progress", "text": "evaluating", "done": 1, "total": 9})
    print("from a library")
"""
    with (tmp_path / "out").open("wb") as out:
        assert on_terminal(code, stdout=out)[0] == 0
    assert (tmp_path / "out").read_text() == "from a library\n"


def piped(code: str, shell: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    command = f'"{sys.executable}" -c "$CODE" {shell}'
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
        env=os.environ | {"CODE": code} | env,
    )


@pytest.mark.parametrize(
    "env",
    [{"LC_ALL": "C"}, {"LC_ALL": "POSIX"}, {"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "latin-1"}],
    ids=str,
)
def test_a_c_locale_gets_ascii(env: dict[str, str]) -> None:
    done = piped(STORY, **env)
    assert done.returncode == 0, done.stderr
    assert (done.stdout + done.stderr).isascii()
    assert "Ankle boot x" in done.stdout
    assert "all is well - truly" in done.stderr
    code, shown = on_terminal(STORY, **env)
    assert code == 0
    assert shown.isascii()


LINES = """
from bmctl.console import Console
with Console() as console:
    for number in range(20000):
        if not console.data(f"line {number}"):
            console.note(f"stopped at {number}")
            break
    console.note("went on")
"""


def test_a_reader_that_leaves_is_no_error() -> None:
    done = piped(LINES, "| head -n 1")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "line 0\n"
    assert "stopped at" in done.stderr
    assert "went on" in done.stderr
    assert "BrokenPipe" not in done.stderr


@pytest.mark.parametrize("shell", [">&-", "2>&-", ">&- 2>&-", "2> /dev/full", "> /dev/full"])
def test_closed_and_full_streams_do_not_stop_the_work(shell: str, tmp_path: Path) -> None:
    done = piped(STORY + f"open({str(tmp_path / 'done')!r}, 'w').close()", f"< /dev/null {shell}")
    assert (tmp_path / "done").exists(), done.stderr
    assert "Traceback" not in done.stderr


def test_quiet_is_silent_but_for_data_and_errors(capsys: pytest.CaptureFixture[str]) -> None:
    with Console(quiet=True) as console:
        console.emit({"event": "start", "stage": "train", "steps": 1})
        console.emit({"event": "step", "stage": "train", "step": 1, "steps": 1})
        console.emit({"event": "evaluation", "stage": "train", "epoch": 1})
        console.note("a note")
        console.report(REPORT)
        console.data("data")
        console.error(DataError("no images", hint="add some"))
    out, err = capsys.readouterr()
    assert out == "data\n"
    assert err == "error: no images\n  hint: add some\n"


def test_loops_report_at_most_every_few_seconds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(np.arange(0, 1000, 0.5))
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(clock)))
    console = Console()
    for step in range(1, 42):
        event = {"event": "step", "stage": "train", "epoch": 1, "step": step, "steps": 41, "loss": 0.5, "eta_s": 9}
        console.emit(event)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4  # 20 seconds
    assert lines[0] == "train: epoch 1 step 11/41, loss 0.500, ETA 9 s"


def test_every_kind_of_event_has_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    val = {"metric": "accuracy", "unit": "share", "value": 0.896}
    share = {"metric_name": "accuracy", "metric_unit": "share"}
    for event, line in (
        ({"event": "stage", "stage": "01-svd", "text": "svd"}, "01-svd: svd"),
        ({"event": "skip", "stage": "01-svd"}, "01-svd: finished before, with the same inputs: kept"),
        ({"event": "note", "text": "calibrated"}, "note: calibrated"),
        ({"event": "note", "stage": "train", "text": "bf16"}, "train: note: bf16"),
        (
            {
                "event": "stage_done",
                "stage": "01-svd",
                "metrics": {"val": val, "num_params": 80_123, "macs": 8_200_000},
            },
            "01-svd: val accuracy 89.6 %, 80.1 k params, 8.2 M MACs",
        ),
        (
            {"event": "stage_done", "stage": "p", "val": val, "size_bytes": 320_000, "latency_ms": 12.3},
            "p: val accuracy 89.6 %, 320 kB, latency 12.30 ms",
        ),
        (
            {"event": "done", "stage": "infer", "steps": 1200, "seconds": 3.2, "backend": "openvino"},
            "infer: 1,200 samples in 3 s, on openvino",
        ),
        ({"event": "evaluation", "stage": "t", "epoch": 3, "epochs": 12, "loss": 0.4}, "t: epoch  3/12  loss 0.400"),
        (
            {"event": "evaluation", "stage": "t", "step": 50, "steps": 1200, "val_metric": 0.5, **share},
            "t: step   50/1200  val accuracy 50.0 %",
        ),
        (
            {"event": "evaluation", "stage": "t", "val_metric": 1.25, "metric_name": "loss", "metric_unit": "nats"},
            "t: val loss 1.25 nats",
        ),
        ({"event": "evaluation", "stage": "t", "val_metric": 1.25, "metric_name": "rmse"}, "t: val rmse 1.25"),
        (
            {"event": "evaluation", "stage": "t", "epoch": 1, "epochs": 2, "step": 50, "steps": 100, "loss": 0.4},
            "t: epoch 1/2  loss 0.400",
        ),
    ):
        console.emit(event)
        assert capsys.readouterr().err == line + "\n"


@pytest.mark.parametrize(
    "event",
    ["start", "step", "progress", "evaluation", "note", "skip", "stage", "stage_done", "done", "new", None],
)
@pytest.mark.parametrize("live", [False, True])
def test_events_may_lack_any_field(event: str | None, live: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "is_live", lambda stream: live)
    with Console(verbose=True) as console:
        console.emit({"event": event})
        console.emit(
            {"event": event, "stage": "train", "loss": None, "step": "x", "steps": 0, "metrics": 3, "eta_s": -1}
        )
        console.emit({"event": event, "stage": "train", "parts": 3})
        console.emit({"event": event, "stage": "train", "parts": {"data": "x", "forward": 0}})


PARTS = {"data": 0.16, "forward": 5.3, "backward": 8.9, "communication": 1.0, "optimizer": 0.84}


def test_the_end_of_a_training_says_once_where_the_time_went(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    done = {"event": "done", "stage": "train", "steps": 1200, "val_metric": 0.9, "seconds": 20.0}
    console.emit({**done, "parts": PARTS})
    console.emit({**done, "parts": PARTS | {"communication": 0.0, "forward": 4000.0}})
    console.emit({**done, "parts": dict.fromkeys(PARTS, 0.0)})
    assert [line for line in capsys.readouterr().err.splitlines() if "kept weights" not in line] == [
        "train: step 16.2 ms: data 1 %, forward 33 %, backward 55 %, communication 6 %, optimizer 5 %",
        "train: step 4,010 ms: data 0 %, forward 100 %, backward 0 %, optimizer 0 %",
    ]


def test_a_bar_tells_of_starving_steps_where_there_is_room() -> None:
    event = {"event": "step", "step": 1, "steps": 4, "loss": 0.5, "samples_per_s": 812.3, "parts": PARTS}
    starving = {**event, "parts": PARTS | {"data": 14.2}}
    assert "waiting for data 47 %" in wording.bar_words(starving, width=100)[1]
    assert "data" not in wording.bar_words(starving, width=99)[1]
    assert "data" not in wording.bar_words(event, width=200)[1]


def test_events_for_the_log_alone_are_shown_with_v(capsys: pytest.CaptureFixture[str]) -> None:
    Console().emit({"event": "memory", "peak_bytes": 7})
    assert capsys.readouterr().err == ""
    Console(verbose=True).emit({"event": "memory", "peak_bytes": 7})
    assert capsys.readouterr().err == "memory peak_bytes=7\n"


# -- errors -------------------------------------------------------------------------------------------


def test_all_problems_of_a_recipe_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    problems = [
        Problem("r.yaml:3:5", "train.lr", "no such key [bold]x[/]", "did you mean train.optimizer.lr?"),
        Problem("--set a=1", "", "no such path"),
    ]
    Console().error(RecipeError("r.yaml has 2 problems", problems=problems))
    assert capsys.readouterr().err.splitlines() == [
        "error: r.yaml has 2 problems",
        "  r.yaml:3:5: train.lr: no such key [bold]x[/]",
        "      hint: did you mean train.optimizer.lr?",
        "  --set a=1: no such path",
    ]


def test_json_errors_are_one_document_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    Console(as_json=True).error(DataError("no images", hint="add some"))
    out, err = capsys.readouterr()
    assert json.loads(out) == {"error": "DataError", "exit_code": 4, "message": "no images", "hint": "add some"}
    assert "error: no images" in err


def test_a_bug_asks_for_a_report_and_shows_its_traceback_only_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        raise KeyError("layer4")
    except KeyError as caught:
        caught.add_note("the traceback is in runs/x/logs/bug.log")
        error = caught
    Console().error(error)
    said = capsys.readouterr().err
    assert "a bug in bmctl: KeyError: 'layer4'" in said
    assert "runs/x/logs/bug.log" in said
    assert "please report it" in said
    assert "Traceback" not in said
    Console().error(error, debug=True)
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_ctrl_c_is_no_bug(capsys: pytest.CaptureFixture[str]) -> None:
    Console().error(KeyboardInterrupt())
    assert capsys.readouterr().err == "error: interrupted\n"


@pytest.mark.parametrize("live", [False, True])
def test_names_cannot_steer_the_terminal(
    live: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "is_live", lambda stream: live)
    evil = "a\x1b]0;owned\x07\x9b31m\rb\u202e.png"
    console = Console()
    console.error(DataError(f"{evil}: truncated"))
    console.note(evil)
    console.emit({"event": "progress", "text": evil, "done": 1, "total": 2})
    console.clear()
    err = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err).replace("\r", "" if live else "\r")
    assert not set("\x1b\x07\x9b\u202e") & set(err)
    assert "a\\x1b]0;owned\\x07\\x9b31m\\rb" in err


def test_messages_are_not_markup(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "is_live", lambda stream: True)
    Console().note("shape [2, 3] [red]x[/red] :smile:")
    assert "shape [2, 3] [red]x[/red] :smile:" in capsys.readouterr().err


# -- tables -------------------------------------------------------------------------------------------

METRIC = Score("accuracy", 0.8951, 0.886, 0.903, 5000, 0.1, unit="share")
DROP = Comparison(0.0016, -0.004, 0.007, "packages/00-train", "test")
TRAIN = Row("packages/00-train", "package", "train", None, True, "fp32", 315_146, 31_200_000, 1_259_000, METRIC, METRIC)
BUILT = Row(
    "deploy/openvino", "artifact", "ptq", "openvino", False, "int8", 80_123, 8_200_000, 141_000, None, METRIC, DROP,
    LatencyRow(2.9, 3.9, 4.3, 15), 22_069.0, Comparison(2.72, 2.5, 2.9, "x"), Comparison(8.86, 8.3, 9.3, "y"),
)  # fmt: skip
UNRUN = Row(
    "deploy/tensorrt_rtx", "artifact", "ptq", "tensorrt_rtx", False, "int8", None, None, 191_000,
    status="built, not run", reason="no GPU", command_elsewhere="bmctl export runs/fashion --backend tensorrt",
)  # fmt: skip
GATE = GateResult("max_drop", "deploy/openvino", 0.001, 0.0016, False, "0.16 [-0.40, 0.70] points", "0.10 points")
REPORT = with_gates(Report("runs/fashion", "0.1.0", 64, {}, (TRAIN, BUILT, UNRUN), notes=("a note",)), (GATE,))


@pytest.mark.parametrize("columns", [20, 60, 80, 100, 120, 200])
def test_tables_fit_and_lose_no_number(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    Console().report(REPORT)
    out = capsys.readouterr().out
    commands = [line for line in out.splitlines() if line.startswith("    there: ")]
    assert commands == ["    there: bmctl export runs/fashion --backend tensorrt"]  # whole, to be copied
    assert all(len(line) <= columns for line in out.splitlines() if line not in commands)
    assert "…" not in out
    for piece in (
        "00-train",
        "1,259 kB",
        "openvino",
        "141 kB",
        "89.5 %",
        "22,069",
        "2.7x",
        "8.9x",
        "tensorrt_rtx",
        "not run",
    ):
        assert piece in out, piece
    assert ESCAPE not in out


def test_a_hundred_columns_hold_the_drop_with_its_interval(capsys: pytest.CaptureFixture[str]) -> None:
    Console().report(REPORT)
    lines = capsys.readouterr().out.splitlines()
    assert any(
        re.fullmatch(r"openvino +int8 +141 kB +89.5 % +0.2 \[-0.4, 0.7\] +2.90 +22,069 +2.7x +8.9x *", x) for x in lines
    )
    assert any(x.split()[:3] == ["FAIL", "max_drop", "openvino"] for x in lines)


def test_a_wide_terminal_gets_every_interval(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    Console().report(REPORT)
    out = capsys.readouterr().out
    assert "2.90 / 3.90 / 4.30" in out
    assert "8.9x [8.3, 9.3]" in out


def test_an_evaluation_is_told_with_its_interval(capsys: pytest.CaptureFixture[str]) -> None:
    target = np.arange(100) % 2
    counts = np.stack([target, target ^ (np.arange(100) < 10), np.full(100, 0.31)], axis=1).astype(float)
    found = Evaluation("classify", counts, classify.metrics(counts), 0.5)
    Console().evaluation(found, split="test")
    assert re.fullmatch(
        r"accuracy 90.0 % \[82.6, 94.5\] on 100 test samples, macro_f1 90.0 % \[8\d.\d, 9\d.\d\], "
        r"loss 0.3100 nats \[0.3100, 0.3100\]; a trivial predictor gets 50.0 %\n",
        capsys.readouterr().out,
    )
    Console(as_json=True).evaluation(found, split="test")
    document = json.loads(capsys.readouterr().out)
    assert (document["split"], document["value"], document["num_samples"]) == ("test", 0.9, 100)
    assert document["low"] == pytest.approx(0.8256, abs=1e-4)
    assert document["metrics"]["accuracy"]["interval"] == "wilson"
    assert (document["metrics"]["loss"]["better"], document["metrics"]["loss"]["unit"]) == ("lower", "nats")


def test_checks_show_what_is_missing_and_what_mends_it(capsys: pytest.CaptureFixture[str]) -> None:
    Console().checks(
        [Check("python", "ok", "3.11"), Check("torch", "missing", "not installed", "pip install 'torch>=2'")]
    )
    assert capsys.readouterr().out.splitlines() == [
        "✓ python  3.11",
        "✗ torch   not installed",
        "          pip install 'torch>=2'",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (59.4, "59 s"), (59.6, "1:00"), (125, "2:05"), (3725, "1:02:05"), (-3, "0 s")]
)
def test_durations(seconds: float, text: str) -> None:
    assert wording.duration_text(seconds) == text
