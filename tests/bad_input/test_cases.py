"""Bad input, one row of cases.yaml at a time: the exit code, what is said, and that nothing else happens.

Every row is checked for more than it says: no traceback, nothing on stdout unless the row names it, what was there
before is unchanged byte for byte, and what is new is only where the row says that output goes.
"""

from __future__ import annotations

import base64
import getpass
import hashlib
import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from pydantic import Field
from tests.bad_input import fixtures

from bmctl.recipe.yamlio import read_yaml
from bmctl.schema import Many, Strict

CASES = Path(__file__).with_name("cases.yaml")
SECTIONS = ("recipe", "data", "package", "environment")
TIMEOUT_S = 120
OF_TORCH = f"tmp/torchinductor_{getpass.getuser()}"
"""An empty directory that torch makes when it is asked for an optimizer."""


class File(Strict):
    """A file to make, or what to do to one that a fixture made; exactly one is given.

    Attributes:
        hex: Content, spaces allowed.
        repeat: This text, `times` times.
        link: A symbolic link's target.
        flip: Invert one byte; negative counts from the end.
        truncate: Cut to so many bytes; negative counts from the end.
        replace: (old, new) text, which must occur.
        move: New name in its directory.
        mode: Permissions in octal, such as "000"; goes together with any other.
    """

    text: str | None = None
    hex: str | None = None
    base64: str | None = None
    repeat: str | None = None
    times: int = 1
    link: str | None = None
    fifo: bool = False
    directory: bool = False
    flip: int | None = None
    truncate: int | None = None
    remove: bool = False
    replace: Many[str] | None = None
    move: str | None = None
    mode: str | None = None


class Case(Strict):
    """One row.

    Attributes:
        command: What follows `bmctl`.
        exit: The exit code.
        stderr: A pattern that stderr must contain; empty means that stderr is empty.
        stdout: A pattern that stdout must match in full; stdout is empty without.
        fixture: Functions of fixtures.py that make files in the working directory, before `files`.
        files: Files to make or damage there.
        env: Environment variables; null removes one. What PYTHONPATH names comes before what it is otherwise.
        new: Where new files and directories may be afterwards, in the working directory.
        changed: Files that may change.
        process: Run as a process of its own, not as a call in this one.
        through: A bash line in which "$@" is the command; implies `process`.
        needs: A condition of NEEDS without which the row is skipped.
    """

    id: str
    command: Many[str]
    exit: int
    stderr: str
    stdout: str = ""
    fixture: Many[str] = ()
    files: dict[str, str | File] = Field(default_factory=dict)
    env: dict[str, str | None] = Field(default_factory=dict)
    new: Many[str] = ()
    changed: Many[str] = ()
    process: bool = False
    through: str = ""
    needs: str = ""


NEEDS: dict[str, Callable[[], bool]] = {
    "no root": lambda: os.geteuid() != 0,
    "no gpu": lambda: not Path("/dev/nvidiactl").exists(),
}


def load_cases() -> list[Case]:
    document = read_yaml(CASES)
    assert not document.problems, document.problems
    assert list(document.data) == list(SECTIONS)
    return [Case.model_validate(row) for section in SECTIONS for row in document.data[section] or []]


@dataclass(frozen=True)
class Outcome:
    exit: int
    stdout: str
    stderr: str


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where fixtures keep what is slow to make, for all rows."""
    return tmp_path_factory.mktemp("bad-input")


@pytest.fixture
def unlock(tmp_path: Path) -> Iterator[None]:
    """Give permissions back afterwards, so that pytest can clean up."""
    yield
    for folder, _, _ in os.walk(tmp_path):
        Path(folder).chmod(0o700)


@pytest.mark.parametrize("case", load_cases(), ids=lambda case: case.id)
@pytest.mark.usefixtures("unlock")
def test_case(
    case: Case,
    tmp_path: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    if case.needs and not NEEDS[case.needs]():
        pytest.skip(f"needs {case.needs}")
    work = tmp_path / "work"
    for folder in (work, tmp_path / "home", tmp_path / "tmp"):
        folder.mkdir()
    held = [getattr(fixtures, name)(work, cache=cache) for name in case.fixture]
    for name, file in case.files.items():
        make(work / name, file if isinstance(file, File) else File(text=file))
    before = snapshot(tmp_path)
    capfd.readouterr()
    run = run_process if case.process or case.through else run_here
    outcome = run(case, tmp_path, monkeypatch=monkeypatch, capfd=capfd)
    check(case, outcome)
    check_untouched(case, before=before, after=snapshot(tmp_path))
    del held


def run_process(
    case: Case, root: Path, *, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Outcome:
    argv = [sys.executable, "-m", "bmctl", *case.command]
    if case.through:
        argv = ["bash", "-c", case.through, "bash", *argv]
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV") if name in os.environ}
    env = {name: value for name, value in {**kept, **environment(case, root)}.items() if value is not None}
    done = subprocess.run(argv, cwd=root / "work", env=env, capture_output=True, timeout=TIMEOUT_S, check=False)
    return Outcome(done.returncode, done.stdout.decode(), done.stderr.decode())


def run_here(case: Case, root: Path, *, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Outcome:
    from bmctl.cli import main

    monkeypatch.chdir(root / "work")
    for name, value in environment(case, root).items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    code = main(list(case.command))
    out, err = capfd.readouterr()
    return Outcome(code, out, err)


def environment(case: Case, root: Path) -> dict[str, str | None]:
    base = {
        "HOME": str(root / "home"),
        "TMPDIR": str(root / "tmp"),
        "OMP_NUM_THREADS": "1",
        "NO_COLOR": "1",
        "COLUMNS": "100",
        "PYTHONDONTWRITEBYTECODE": "1",
        "HF_HUB_OFFLINE": "1",
    }
    paths = [path for path in (case.env.get("PYTHONPATH"), os.environ.get("PYTHONPATH")) if path]
    return {**base, **case.env, "PYTHONPATH": os.pathsep.join(paths) or None}


def check(case: Case, outcome: Outcome) -> None:
    assert outcome.exit == case.exit, outcome
    assert "Traceback" not in outcome.stderr + outcome.stdout
    assert re.search(case.stderr or r"\A\Z", outcome.stderr, re.MULTILINE), outcome.stderr
    assert re.fullmatch(case.stdout, outcome.stdout, re.DOTALL), outcome.stdout
    if case.stderr and outcome.exit not in (0, 2):
        assert "error: " in outcome.stderr, outcome.stderr
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", outcome.stderr), repr(outcome.stderr)
    assert len(outcome.stderr) < 20_000


def check_untouched(case: Case, *, before: dict[str, str], after: dict[str, str]) -> None:
    changed = {path for path in before if after.get(path) != before[path]}
    assert changed <= {f"work/{path}" for path in case.changed}
    output = [f"work/{path}" for path in case.new] + [OF_TORCH]
    strays = [path for path in after if path not in before and not any(f"{path}/".startswith(f"{o}/") for o in output)]
    assert not strays


def make(path: Path, file: File) -> None:
    """Make or damage one file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if file.fifo:
        os.mkfifo(path)
    elif file.directory:
        path.mkdir()
    elif file.link is not None:
        path.unlink(missing_ok=True)
        path.symlink_to(file.link)
    elif file.remove:
        path.unlink()
    elif file.move is not None:
        path.rename(path.with_name(file.move))
    else:
        content = content_of(path, file)
        if content is not None:
            path.write_bytes(content)
    if file.mode is not None:
        path.chmod(int(file.mode, 8))


def content_of(path: Path, file: File) -> bytes | None:
    """What to write; None leaves the file as it is."""
    if file.hex is not None:
        return bytes.fromhex(file.hex)
    if file.base64 is not None:
        return base64.b64decode(file.base64)
    if file.repeat is not None:
        return (file.repeat * file.times).encode()
    if file.flip is not None:
        content = bytearray(path.read_bytes())
        content[file.flip] ^= 0xFF
        return bytes(content)
    if file.truncate is not None:
        return path.read_bytes()[: file.truncate]
    if file.replace is not None:
        old, new = file.replace
        text = path.read_text()
        assert old in text
        return text.replace(old, new).encode()
    return file.text.encode() if file.text is not None else None


def snapshot(root: Path) -> dict[str, str]:
    """Every path under `root` with its kind, permissions and content."""
    found = {}
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        content = ""
        if stat.S_ISLNK(status.st_mode):
            content = os.readlink(path)  # noqa: PTH115 (Path.readlink makes a path of it)
        elif stat.S_ISREG(status.st_mode) and os.access(path, os.R_OK):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        found[str(path.relative_to(root))] = f"{stat.filemode(status.st_mode)} {content}"
    return found


def test_every_section_has_a_row_as_a_real_process() -> None:
    document = read_yaml(CASES).data
    for section in SECTIONS:
        rows = document[section]
        assert any(row.get("process") or row.get("through") for row in rows), section


def test_ids_are_unique_and_rows_many() -> None:
    ids = [case.id for case in load_cases()]
    assert len(ids) == len(set(ids)) >= 60
