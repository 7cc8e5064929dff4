"""How much memory there is, how much a process may still take before the kernel ends it, and how much it has taken."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

PROC, CGROUP = Path("/proc"), Path("/sys/fs/cgroup")


def free_bytes(*, proc: Path = PROC, cgroup: Path = CGROUP) -> int:
    """What this machine has left, or the tightest container around this process; caches count as free.

    Source: https://docs.kernel.org/admin-guide/cgroup-v2.html#memory and, of version 1, cgroup-v1/memory.html
    """
    left = [limit - used + cached for limit, used, cached in _containers(proc, cgroup)]
    return max(0, min([_left_in_the_machine(proc), *left]))


def total_bytes(*, proc: Path = PROC, cgroup: Path = CGROUP) -> int:
    """Of this machine, or of the tightest container around this process."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([machine, *(limit for limit, _, _ in _containers(proc, cgroup))])


def resident_bytes(*, proc: Path = PROC) -> int:
    """Of this process, now; 0 where the system does not tell."""
    return _fields(proc / "self" / "status").get("VmRSS", 0) * 1024


def keep_freed() -> None:
    """Let glibc keep what a step frees for the next one: giving every activation back costs a tenth of a CPU step.

    Source: https://man7.org/linux/man-pages/man3/mallopt.3.html
    """
    mallopt = _of_glibc("mallopt")
    if mallopt is not None:
        for parameter in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            mallopt(parameter, 2**30)


def give_back() -> None:
    """Return to the system what was freed and kept: it would count as taken.

    Source: https://man7.org/linux/man-pages/man3/malloc_trim.3.html
    """
    trim = _of_glibc("malloc_trim")
    if trim is not None:
        trim(0)


def reset_peak(*, proc: Path = PROC) -> None:
    """Forget the highest resident size so far; where Linux forbids it, the highest ever stands for it."""
    try:
        (proc / "self" / "clear_refs").write_text("5")
    except OSError:
        return


def peak_bytes(*, proc: Path = PROC) -> int:
    """Highest resident size since `reset_peak`; 0 where the system does not tell."""
    return _fields(proc / "self" / "status").get("VmHWM", 0) * 1024


def _of_glibc(name: str) -> Callable[..., int] | None:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def _left_in_the_machine(proc: Path) -> int:
    available = _fields(proc / "meminfo").get("MemAvailable")
    if available is not None:
        return available * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2  # not Linux: half of what there is


def _containers(proc: Path, cgroup: Path) -> Iterator[tuple[int, int, int]]:
    """Limit, use, and cache in that use, of each group that this process is in, under version 2 and under version 1."""
    for line in _lines(proc / "self" / "cgroup"):
        _, kinds, name = line.split(":", 2)
        if not kinds:
            names, root = ("memory.max", "memory.current", "inactive_file"), cgroup
        elif "memory" in kinds.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            root = cgroup / "memory"
        else:
            continue
        group = Path(name.strip("/"))
        # In a container of its own the name may be the host's; then the root is what is seen from inside.
        for folder in {root, *(root / part for part in (group, *group.parents))}:
            limit, used = _number(folder / names[0]), _number(folder / names[1])
            if limit is not None and used is not None:
                yield limit, used, _fields(folder / "memory.stat").get(names[2], 0)


def _fields(path: Path) -> dict[str, int]:
    """Numbers by name from lines such as ``VmRSS:   1234 kB`` or ``inactive_file 1234``."""
    pairs = (line.replace(":", " ").split() for line in _lines(path))
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) > 1 and pair[1].isdigit()}


def _number(path: Path) -> int | None:
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdigit() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
