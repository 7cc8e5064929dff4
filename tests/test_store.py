"""The save protocol: whatever happens, a published directory is the old one or the new one, whole."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

from bmctl import store
from bmctl.errors import PackageError, ResourceError
from bmctl.schema import Strict


class Card(Strict):
    format: Literal[1] = 1
    text: str = ""
    files: dict[str, store.FileRecord] = {}  # noqa: RUF012


def put(target: Path, text: str, *, overwrite: bool = False) -> None:
    with store.publishing(target, overwrite=overwrite) as temporary:
        (temporary / "a.bin").write_bytes(text.encode() * 1000)
        (temporary / "deep").mkdir()
        (temporary / "deep" / "b.txt").write_text(text)
        store.write_manifest(temporary, Card(text=text, files=store.records(temporary)))


def read(target: Path) -> str:
    card = store.read_manifest(target, Card)
    store.verify(target, card.files)
    return card.text


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def unlinked_user() -> Iterator[int]:
    """A user id that file permissions bind, which root's do not."""
    if os.geteuid() != 0:
        pytest.skip("needs root to become somebody else")
    yield 65534


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    mount = tmp_path / "small"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(mount)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("cannot mount a small disk here")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


HEADER = f"""
import importlib.util, os, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("here", {__file__!r})
here = sys.modules["here"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(here)
from bmctl import disk, store
from bmctl.errors import ResourceError
"""


def child(code: str, *, fault: str = "", **arguments: Any) -> subprocess.CompletedProcess[str]:
    """Run `code` in a new process, with this file's functions at hand as `here`."""
    return subprocess.run(
        [sys.executable, "-c", HEADER + textwrap.dedent(code)],
        env={**os.environ, "BMCTL_FAULT": fault},
        capture_output=True,
        text=True,
        timeout=60,
        **arguments,
    )


# -- publishing -------------------------------------------------------------------------------------


def test_publishes_whole_directories(tmp_path: Path) -> None:
    target = tmp_path / "run" / "packages" / "00-train"
    put(target, "one")
    assert read(target) == "one"
    assert names(target) == ["a.bin", "deep", "manifest.json"]
    assert names(target.parent) == ["00-train"]
    raw = (target / "manifest.json").read_bytes()
    assert raw.endswith(b"}\n")
    assert list(json.loads(raw)) == ["files", "format", "text"]


def test_nothing_is_there_until_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "t"
    with store.publishing(target) as temporary:
        assert temporary.parent == tmp_path
        assert temporary.name.startswith(".")
        store.write_manifest(temporary, Card())
        assert not target.exists()
    assert target.is_dir()


def test_every_file_and_directory_is_synced_before_its_name_is_public(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "t"
    before, after = set(), set()

    def record(handle: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))  # noqa: PTH115
        (after if target.exists() else before).add(str(path.relative_to(tmp_path)).partition("/")[2] or path.name)

    monkeypatch.setattr(os, "fsync", record)
    put(target, "one")
    whole = {"a.bin", "deep", "deep/b.txt", "manifest.json"}
    assert whole < before
    assert len(before - whole) == 1  # the temporary directory itself
    assert after == {tmp_path.name}


def test_existing_target_is_refused_and_kept(tmp_path: Path) -> None:
    target = tmp_path / "t"
    put(target, "one")
    with pytest.raises(ResourceError, match="exists") as caught:
        put(target, "two")
    assert caught.value.exit_code == 7
    assert "--overwrite" in caught.value.hint
    assert read(target) == "one"
    put(target, "two", overwrite=True)
    assert read(target) == "two"
    assert names(tmp_path) == ["t"]


def test_an_empty_directory_in_the_way_is_refused_too(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    with pytest.raises(ResourceError, match="exists"):
        put(tmp_path / "t", "one")
    assert names(tmp_path) == ["t"]


@pytest.mark.parametrize("kind", ["file", "link", "dangling"])
def test_a_target_that_is_no_directory_is_refused(tmp_path: Path, kind: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    target = tmp_path / "t"
    if kind == "file":
        target.write_text("mine")
    else:
        target.symlink_to(tmp_path / ("elsewhere" if kind == "link" else "nowhere"))
    with pytest.raises(ResourceError, match="not a directory"):
        put(target, "one", overwrite=True)
    assert names(tmp_path) == ["elsewhere", "t"]
    assert names(tmp_path / "elsewhere") == []


def test_an_error_in_the_block_leaves_nothing(tmp_path: Path) -> None:
    put(tmp_path / "t", "one")
    with pytest.raises(ZeroDivisionError), store.publishing(tmp_path / "t", overwrite=True) as temporary:
        (temporary / "half").write_text("x")
        raise ZeroDivisionError
    assert names(tmp_path) == ["t"]
    assert read(tmp_path / "t") == "one"


def test_a_directory_without_manifest_is_not_published(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"manifest\.json"), store.publishing(tmp_path / "t") as temporary:
        (temporary / "a").write_text("x")
    assert names(tmp_path) == []


def test_a_link_in_the_block_is_not_published(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="symbolic link"), store.publishing(tmp_path / "t") as temporary:
        store.write_manifest(temporary, Card())
        (temporary / "link").symlink_to("/etc/passwd")
    assert names(tmp_path) == []


def test_a_publisher_that_comes_second_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "t"
    with pytest.raises(ResourceError, match="exists"), store.publishing(target) as temporary:
        store.write_manifest(temporary, Card(text="slow"))
        put(target, "fast")
    assert read(target) == "fast"
    assert names(tmp_path) == ["t"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_concurrent_publishers_leave_one_whole_directory(tmp_path: Path, overwrite: bool) -> None:
    code = f"here.put(Path({str(tmp_path / 't')!r}), sys.argv[1], overwrite={overwrite})"
    wait = 'print("ready", flush=True); sys.stdin.readline()\n'
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", HEADER + wait + code, str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(4)
    ]
    for worker in workers:
        assert worker.stdout
        assert worker.stdout.readline() == "ready\n"
    results = []
    for worker in workers:
        assert worker.stdin
        worker.stdin.write("go\n")
        worker.stdin.flush()
    for worker in workers:
        _, stderr = worker.communicate(timeout=60)
        results.append((worker.returncode, stderr))
    won = [number for number, (code_, _) in enumerate(results) if code_ == 0]
    assert won, results
    assert overwrite or len(won) == 1
    assert all("ResourceError" in stderr for code_, stderr in results if code_)
    assert int(read(tmp_path / "t")) in won
    assert names(tmp_path) == ["t"]


# -- killed, full, forbidden ------------------------------------------------------------------------

POINTS = ["begun", "written", "synced", "renamed", "done"]


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("existing", [False, True])
def test_killed_at_any_point_leaves_old_or_new(tmp_path: Path, point: str, existing: bool) -> None:
    target = tmp_path / "t"
    if existing:
        put(target, "old")
    done = child(f"here.put(Path({str(target)!r}), 'new', overwrite=True)", fault=f"store:{point}")
    assert done.returncode == -signal.SIGKILL, done.stderr
    swapped = point in ("renamed", "done")
    if swapped or existing:
        assert read(target) == ("new" if swapped else "old")
    else:
        assert not target.exists()
    put(tmp_path / "other", "x")  # the next publisher beside it clears what the dead one left
    assert names(tmp_path) == (["other", "t"] if swapped or existing else ["other"])
    put(target, "newer", overwrite=True)
    assert read(target) == "newer"


@pytest.mark.parametrize("point", [*POINTS[:3], "aside", *POINTS[3:]])
def test_killed_where_the_file_system_cannot_swap(tmp_path: Path, point: str) -> None:
    target = tmp_path / "t"
    put(target, "old")
    code = f"store.renameat2 = lambda *_, **__: False; here.put(Path({str(target)!r}), 'new', overwrite=True)"
    done = child(code, fault=f"store:{point}")
    assert done.returncode == -signal.SIGKILL, done.stderr
    put(tmp_path / "other", "x")
    assert read(target) == ("new" if point in ("renamed", "done") else "old")
    assert names(tmp_path) == ["other", "t"]


@pytest.mark.parametrize("point", POINTS[1:])
def test_an_error_at_any_point_is_told_and_leaves_old_or_new(
    tmp_path: Path, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "t", "old")
    monkeypatch.setenv("BMCTL_FAULT", f"store:{point}=EIO")
    with pytest.raises(ResourceError, match="input/output") as caught:
        put(tmp_path / "t", "new", overwrite=True)
    assert str(tmp_path / "t") in caught.value.message
    monkeypatch.delenv("BMCTL_FAULT")
    assert read(tmp_path / "t") == ("new" if point in ("renamed", "done") else "old")
    assert names(tmp_path) == ["t"]


def test_an_error_in_a_swap_of_two_renames_puts_the_old_state_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "t", "old")
    monkeypatch.setattr(store, "renameat2", lambda *_, **__: False)
    monkeypatch.setenv("BMCTL_FAULT", "store:aside=EIO")
    with pytest.raises(ResourceError, match="input/output"):
        put(tmp_path / "t", "new", overwrite=True)
    assert read(tmp_path / "t") == "old"
    assert names(tmp_path) == ["t"]


def test_a_full_disk_is_told_and_the_old_state_stays(small_disk: Path) -> None:
    put(small_disk / "t", "old")
    with pytest.raises(ResourceError, match="disk is full") as caught:
        put(small_disk / "t", "new" * 200, overwrite=True)
    assert caught.value.exit_code == 7
    assert read(small_disk / "t") == "old"
    assert names(small_disk) == ["t"]


def test_a_full_disk_is_told_when_safetensors_writes(small_disk: Path) -> None:
    import torch
    from safetensors.torch import save_file

    with pytest.raises(ResourceError, match="disk is full"), store.publishing(small_disk / "t") as temporary:
        save_file({"a": torch.zeros(2**18)}, temporary / "weights.safetensors")
        store.write_manifest(temporary, Card())
    assert names(small_disk) == []


def test_a_file_past_the_limit_is_told(tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))

    code = f"""
    try:
        here.put(Path({str(tmp_path / "t")!r}), "x" * 9)
    except ResourceError as error:
        print(error.message)
    """
    done = child(code, preexec_fn=limit)
    assert "larger than" in done.stdout, done.stderr
    assert names(tmp_path) == []


def test_a_directory_of_somebody_else_is_told(tmp_path: Path, unlinked_user: int) -> None:
    place = tmp_path / "place"
    place.mkdir()
    place.chmod(0o555)
    code = f"""
    os.setuid({unlinked_user})
    try:
        here.put(Path("place/t"), "x")
    except ResourceError as error:
        print(error.message)
    """
    for path in (tmp_path, *list(tmp_path.parents)[:3]):
        path.chmod(path.stat().st_mode | 0o055)
    done = child(code, cwd=tmp_path)
    assert "permission denied" in done.stdout, done.stderr
    assert names(place) == []


def test_other_errors_of_the_block_keep_their_own_name(tmp_path: Path) -> None:
    """A data set that may not be read is not a full disk."""
    with pytest.raises(PermissionError), store.publishing(tmp_path / "t"):
        raise PermissionError(errno.EACCES, "denied", "/somewhere/else/data.csv")


# -- verify and manifests ---------------------------------------------------------------------------


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


TAMPER = {
    "missing": (lambda p: (p / "a.bin").unlink(), r"a\.bin is missing"),
    "extra": (lambda p: (p / "more.py").write_text("x"), r"more\.py is not in its manifest"),
    "extra empty directory": (lambda p: (p / "void").mkdir(), "void is an empty directory"),
    "flipped": (lambda p: flip(p / "a.bin"), r"a\.bin was changed"),
    "truncated": (lambda p: os.truncate(p / "a.bin", 7), r"a\.bin has 7 bytes; its manifest says 3000"),
    "deep": (lambda p: flip(p / "deep" / "b.txt"), r"deep/b\.txt was changed"),
    "link": (lambda p: _as_link(p / "a.bin"), r"a\.bin is a symbolic link"),
    "linked folder": (lambda p: _as_link(p / "deep"), "deep is a symbolic link"),
    "pipe": (lambda p: os.mkfifo(p / "pipe"), "pipe is not a regular file"),
    "no manifest": (lambda p: (p / "manifest.json").unlink(), r"manifest\.json is missing"),
    "manifest link": (lambda p: _as_link(p / "manifest.json"), r"manifest\.json is a symbolic link"),
    "manifest cut": (lambda p: os.truncate(p / "manifest.json", 40), "not valid JSON"),
    "manifest binary": (lambda p: (p / "manifest.json").write_bytes(b"\xff\xfe\x00"), "not valid JSON"),
    "manifest nan": (lambda p: (p / "manifest.json").write_text('{"format": NaN}'), "NaN is not a number"),
    "manifest twice": (lambda p: (p / "manifest.json").write_text('{"format": 1, "format": 1}'), "stands twice"),
    "manifest deep": (lambda p: (p / "manifest.json").write_text("[" * 10**5), "not valid JSON"),
    "manifest list": (lambda p: (p / "manifest.json").write_text("[]"), "not a bmctl Card"),
    "manifest unknown key": (lambda p: _edit(p, surprise=1), "surprise"),
    "manifest older": (lambda p: _edit(p, format=0, surprise=1), "made by an older bmctl"),
    "manifest newer": (lambda p: _edit(p, format=2, surprise=1), "made by a newer bmctl"),
    "manifest odd format": (lambda p: _edit(p, format="1"), "not a bmctl Card: format"),
    "manifest lfs": (
        lambda p: (p / "manifest.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "Git LFS pointer",
    ),
    "lfs": (
        lambda p: (p / "a.bin").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "Git LFS pointer.*git lfs pull",
    ),
    "html": (lambda p: (p / "a.bin").write_text("\n<!DOCTYPE html><html>log in"), "web page"),
}


def _as_link(path: Path) -> None:
    moved = path.rename(path.parent.parent / f"moved-{path.name}")
    path.symlink_to(moved)


def _edit(path: Path, **fields: object) -> None:
    manifest = path / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | fields))


@pytest.mark.parametrize("case", TAMPER)
def test_what_was_tampered_with_is_named(tmp_path: Path, case: str) -> None:
    spoil, pattern = TAMPER[case]
    target = tmp_path / "t"
    put(target, "one")
    assert read(target) == "one"
    spoil(target)
    with pytest.raises(PackageError, match=pattern) as caught:
        read(target)
    assert caught.value.exit_code == 5


@pytest.mark.parametrize("name", ["/etc/passwd", "../t2/a.bin", "deep/../a.bin", "", "a//b", "a\\b", "a\nb", "./a.bin"])
def test_names_that_escape_are_refused(tmp_path: Path, name: str) -> None:
    put(tmp_path / "t", "one")
    with pytest.raises(PackageError, match="cannot belong"):
        store.verify(tmp_path / "t", {name: store.FileRecord(size_bytes=0, sha256="0" * 64)})


def test_a_manifest_holds_no_nan(tmp_path: Path) -> None:
    class Loose(Strict):
        format: Literal[1] = 1
        metrics: dict[str, object] = {}  # noqa: RUF012

    with pytest.raises(ValueError, match="JSON compliant"):
        store.write_manifest(tmp_path, Loose(metrics={"loss": float("nan")}))


def test_the_identity_follows_every_byte(tmp_path: Path) -> None:
    put(tmp_path / "a", "one")
    put(tmp_path / "b", "one")
    put(tmp_path / "c", "two")
    assert store.manifest_hash(tmp_path / "a") == store.manifest_hash(tmp_path / "b")
    assert store.manifest_hash(tmp_path / "a") != store.manifest_hash(tmp_path / "c")
