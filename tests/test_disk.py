"""Under the save protocol: leftovers of the dead, single files, links, room, and the lock on a run."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from tests.test_store import HEADER, Card, child, names, put

from bmctl import disk, store
from bmctl.errors import ResourceError

# -- leftovers --------------------------------------------------------------------------------------


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_rename_never_replaces_even_an_empty_directory(tmp_path: Path) -> None:
    """What a plain rename would do, were the directory made after the last look."""
    (tmp_path / "new").mkdir()
    (tmp_path / "t").mkdir()
    with pytest.raises(ResourceError, match="exists"):
        disk.renameat2(tmp_path / "new", tmp_path / "t", flags=1)
    assert names(tmp_path) == ["new", "t"]


def test_only_the_leftovers_of_the_dead_are_removed(tmp_path: Path) -> None:
    gone = tmp_path / f".t.tmp-{dead_pid()}-0123abcd"
    alive = tmp_path / f".t.tmp-{os.getpid()}-0123abcd"
    mine = tmp_path / ".t.tmp-notes"
    file = tmp_path / f".x.json.tmp-{dead_pid()}-0123abcd"
    for path in (gone, alive, mine):
        path.mkdir()
    file.write_text("half")
    put(tmp_path / "t", "one")
    assert set(names(tmp_path)) == {alive.name, mine.name, "t"}


def test_the_pid_of_a_dead_maker_may_be_anothers_by_now(tmp_path: Path) -> None:
    """In a container the same command often gets the same pid again."""
    leftover = tmp_path / "made-earlier"
    leftover.mkdir()
    time.sleep(1.5)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as later:
        # A rename would make it new: the name is what the earlier process gave it.
        named = f".t.tmp-{later.pid}-0123abcd"
        made = disk._is_maker_alive(later.pid, leftover)
        (tmp_path / named).mkdir()
        assert not made
        disk.remove_leftovers(tmp_path)
        assert (tmp_path / named).is_dir()
        assert later.stdin
        later.stdin.close()


def test_a_leftover_link_goes_and_what_it_points_to_stays(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("x")
    link = tmp_path / f".t.tmp-{dead_pid()}-0123abcd"
    link.symlink_to(tmp_path / "precious")
    disk.remove_leftovers(tmp_path)
    assert (tmp_path / "precious" / "file").read_text() == "x"
    assert names(tmp_path) == ["precious"]


def test_a_directory_still_held_is_no_leftover(tmp_path: Path) -> None:
    """Its pid may be of another container: the lock on it counts."""
    with store.publishing(tmp_path / "t") as temporary:
        foreign = temporary.rename(tmp_path / f".t.tmp-{dead_pid()}-0123abcd")
        disk.remove_leftovers(tmp_path)
        assert foreign.is_dir()
        foreign.rename(temporary)
        store.write_manifest(temporary, Card())


# -- single files, links, room, the lock ------------------------------------------------------------


@pytest.mark.parametrize("point", ["atomic-written", "atomic-renamed"])
def test_one_file_is_old_or_new(tmp_path: Path, point: str) -> None:
    path = tmp_path / "recipe.yaml"
    disk.write_atomic(path, b"old")
    done = child(f"disk.write_atomic(Path({str(path)!r}), b'new')", fault=f"store:{point}")
    assert done.returncode == -signal.SIGKILL
    assert path.read_bytes() == (b"new" if point == "atomic-renamed" else b"old")


def test_a_link_is_replaced_at_once(tmp_path: Path) -> None:
    link = tmp_path / "latest"
    disk.replace_link(link, "step-1")
    done = child(f"disk.replace_link(Path({str(link)!r}), 'step-2')", fault="store:link-made")
    assert done.returncode == -signal.SIGKILL
    assert os.readlink(link) == "step-1"  # noqa: PTH115
    disk.replace_link(link, "step-3")
    assert os.readlink(link) == "step-3"  # noqa: PTH115
    with pytest.raises(ValueError, match="sibling"):
        disk.replace_link(link, "../elsewhere")


def test_room_is_checked_before_it_is_needed(tmp_path: Path) -> None:
    disk.check_room(tmp_path / "new", size_bytes=1)
    assert names(tmp_path / "new") == []
    with pytest.raises(ResourceError, match="bytes free"):
        disk.check_room(tmp_path, size_bytes=shutil.disk_usage(tmp_path).free * 2)


def test_a_run_is_held_by_one_process(tmp_path: Path) -> None:
    run = tmp_path / "run"
    code = f"""
    with disk.locked(Path({str(run)!r})):
        print("held", flush=True)
        sys.stdin.readline()
    """
    holder = subprocess.Popen(
        [sys.executable, "-c", HEADER + textwrap.dedent(code)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(ResourceError, match=f"process {holder.pid}") as caught, disk.locked(run):
        pass
    assert caught.value.exit_code == 7
    holder.kill()  # -9: what it leaves is a file, not a lock
    holder.wait()
    assert (run / ".lock").read_text() == f"{holder.pid}\n"
    with disk.locked(run):
        assert (run / ".lock").read_text() == f"{os.getpid()}\n"
    with disk.locked(run):
        pass
