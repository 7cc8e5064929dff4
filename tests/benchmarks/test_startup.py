"""`bmctl --help` against a bare Typer app of two commands, in interleaved rounds."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

MOST = 1.3
"""Fifteen commands with their options are more to build and print than two."""
BARE = """
import typer
app = typer.Typer()

@app.command()
def one(name: str = "x") -> None: "First."

@app.command()
def two(name: str = "x") -> None: "Second."

app()
"""


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


@pytest.mark.bench
def test_help_costs_no_more_than_a_bare_app(tmp_path: Path) -> None:
    script = tmp_path / "bare.py"
    script.write_text(BARE)
    bare, ours = [sys.executable, str(script), "--help"], [sys.executable, "-m", "bmctl", "--help"]
    seconds(bare), seconds(ours)
    pairs = [(seconds(bare), seconds(ours)) for _ in range(21)]
    ratio = statistics.median(mine / theirs for theirs, mine in pairs)
    print(f"\nbmctl --help / bare Typer app --help: {ratio:.2f}x over {len(pairs)} rounds (at most {MOST}x)")
    assert ratio <= MOST
