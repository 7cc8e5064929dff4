"""What there is, what is free, and what is taken: of the machine or of the tightest container."""

from __future__ import annotations

import os

import pytest

from bmctl.core import memory

MIB = 2**20


def write(folder, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_free_without_containers(tmp_path) -> None:
    write(tmp_path, {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:    4000 kB\n", "proc/self/cgroup": "0::/\n"})
    assert memory.free_bytes(proc=tmp_path / "proc", cgroup=tmp_path / "cgroup") == 4000 * 1024


@pytest.mark.parametrize(
    ("line", "folder", "names"),
    [
        ("0::/a/b", "cgroup/a", ("memory.max", "memory.current", "inactive_file")),
        ("0::/somewhere/on/the/host", "cgroup", ("memory.max", "memory.current", "inactive_file")),
        (
            "4:cpu,memory:/a",
            "cgroup/memory/a",
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ),
    ],
)
def test_the_tightest_container_counts(tmp_path, line, folder, names) -> None:
    limit, used, cached = names
    write(
        tmp_path,
        {
            "proc/meminfo": "MemAvailable: 4000 kB\n",
            "proc/self/cgroup": f"9:name=systemd:/\n{line}\n",
            f"{folder}/{limit}": "1000000\n",
            f"{folder}/{used}": "700000\n",
            f"{folder}/memory.stat": f"anon 1\n{cached} 100000\n",
        },
    )
    where = {"proc": tmp_path / "proc", "cgroup": tmp_path / "cgroup"}
    assert memory.free_bytes(**where) == 400_000
    assert memory.total_bytes(**where) == 1_000_000


def test_no_limit_is_no_limit(tmp_path) -> None:
    files = {"proc/meminfo": "MemAvailable: 4 kB\n", "proc/self/cgroup": "0::/\n", "cgroup/memory.max": "max\n"}
    write(tmp_path, files)
    where = {"proc": tmp_path / "proc", "cgroup": tmp_path / "cgroup"}
    assert memory.free_bytes(**where) == 4096
    assert memory.total_bytes(**where) == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_this_machine() -> None:
    assert memory.total_bytes() > memory.free_bytes() > 10 * MIB
    assert memory.peak_bytes() >= memory.resident_bytes() > 10 * MIB
