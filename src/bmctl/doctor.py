"""What this machine can do and what is missing: one Check per thing that can go wrong.

Almost all is read from files and package metadata; torch is loaded only where a GPU driver is there to be asked about.
"""

from __future__ import annotations

import importlib.metadata as metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from bmctl import __version__

OLDEST_PYTHON = (3, 11)
LOW_DISK_BYTES = 2e9
LOW_MEMORY_BYTES = 4e9
LOW_SHM_BYTES = 64e6
LEAN_ISA = ("avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8", "avx2", "asimd", "bf16", "i8mm")
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
EXTRAS = {
    "tensorrt": "TensorRT engines, on a machine with an NVIDIA GPU",
    "tensorrt-rtx": "TensorRT-RTX engines, built on any machine",
    "transformers": "models by name from transformers",
    "sklearn": "the digits data set",
    "peft": "low-rank adaptation of models: the method lora",
    "parquet": "tables in Parquet",
    "rl": "environments to learn to play in",
}


@dataclass(frozen=True)
class Check:
    """One thing looked at.

    Attributes:
        status: ``missing`` keeps bmctl from working; ``warn`` costs a feature or speed.
        hint: What mends it, or the empty string.
    """

    name: str
    status: Literal["ok", "warn", "missing"]
    value: str
    hint: str = ""


def examine() -> list[Check]:
    """Look at everything: interpreter, packages, processor, memory, disk, GPU, extras, privacy."""
    return [
        *_interpreter(),
        *_dependencies(),
        _processor(),
        _threads(),
        _memory(),
        *_disks(),
        _gpu(),
        *_extras(),
        *_privacy(),
    ]


# -- software -----------------------------------------------------------------------------------------


def _interpreter() -> Iterator[Check]:
    found, wanted = platform.python_version(), ".".join(map(str, OLDEST_PYTHON))
    if sys.version_info < OLDEST_PYTHON:
        yield Check("python", "missing", found, f"bmctl needs {wanted} or newer")
    else:
        yield Check("python", "ok", f"{found} ({sys.executable})")
    yield Check("bmctl", "ok", __version__)


def _dependencies() -> list[Check]:
    """Every requirement of the plain install, against the bounds that this version was tested within."""
    return [_required(one) for one in _requirements() if one.marker is None or one.marker.evaluate({"extra": ""})]


def _requirements() -> list[Requirement]:
    try:
        return [Requirement(text) for text in metadata.requires("bmctl") or ()]
    except metadata.PackageNotFoundError:
        return []


def _required(requirement: Requirement) -> Check:
    name, bounds = requirement.name, requirement.specifier
    found = _version(name)
    if found is None:
        return Check(name, "missing", "not installed", f"pip install '{name}{bounds}'")
    if not bounds.contains(found, prereleases=True):
        return Check(name, "warn", f"{found}, outside of the tested {bounds}", f"pip install '{name}{bounds}'")
    return Check(name, "ok", found)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _extras() -> Iterator[Check]:
    for extra, use in EXTRAS.items():
        names = [one.name for one in _requirements() if _is_of(one, extra)]
        found = [f"{name} {version}" for name in names if (version := _version(name))]
        if names and len(found) == len(names):
            yield Check(extra, "ok", ", ".join(found))
        else:
            yield Check(extra, "warn", f"not installed: {use}", f"pip install 'bmctl[{extra}]'")


def _is_of(requirement: Requirement, extra: str) -> bool:
    marker = requirement.marker
    return marker is not None and marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""})


# -- hardware -----------------------------------------------------------------------------------------


def _processor() -> Check:
    info = _read("/proc/cpuinfo")
    name = _field(info, "model name") or platform.processor() or platform.machine()
    flags = set((_field(info, "flags") or _field(info, "Features") or "").split())
    isa = [flag for flag in LEAN_ISA if flag in flags]
    value = f"{name}; {', '.join(isa) or 'no vector extensions known'}"
    if platform.machine() in ("x86_64", "AMD64") and info and not flags & {"avx2", "avx512f"}:
        return Check("processor", "warn", value, "without AVX2 training and int8 are slow here")
    if not flags & {"avx512_bf16", "amx_bf16", "bf16"}:
        return Check("processor", "ok", f"{value}; no bf16: training is in fp32")
    return Check("processor", "ok", value)


def _threads() -> Check:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota()
    set_to = {name: os.environ[name] for name in THREADS if os.environ.get(name)}
    value = f"{cores} usable" + (f", limited to the time of {quota:g}" if quota and quota < cores else "")
    value += "".join(f"; {name}={number}" for name, number in set_to.items())
    over = [name for name, number in set_to.items() if number.isdigit() and int(number) > cores]
    if over:
        return Check("cores", "warn", value, f"more threads than cores ruin all speed: unset {' '.join(over)}")
    if quota and quota < cores:
        return Check("cores", "warn", value, f"export OMP_NUM_THREADS={max(1, int(quota))}")
    return Check("cores", "ok", value)


def _quota() -> float | None:
    """Cores' worth of time that a container may use; None without a limit."""
    parts = _read("/sys/fs/cgroup/cpu.max").split()
    return int(parts[0]) / int(parts[1]) if len(parts) == 2 and parts[0].isdigit() else None


def _memory() -> Check:
    from bmctl.core import memory

    free = memory.free_bytes()
    value = f"{free / 1e9:.1f} GB available"
    low = free < LOW_MEMORY_BYTES
    return Check("memory", "warn" if low else "ok", value, "training wants about 4 GB: close something" if low else "")


def _disks() -> Iterator[Check]:
    here = Path.cwd()
    free = shutil.disk_usage(here).free
    if not os.access(here, os.W_OK):
        yield Check("disk", "warn", f"{here} is read-only", "name another place: -o RUN")
    elif free < LOW_DISK_BYTES:
        yield Check(
            "disk", "warn", f"{free / 1e9:.1f} GB free in {here}", "free some space, or name another place: -o RUN"
        )
    else:
        yield Check("disk", "ok", f"{free / 1e9:,.1f} GB free in {here}")
    shm = Path("/dev/shm")
    if shm.is_dir():
        size = shutil.disk_usage(shm).free
        hint = "loader workers need it: docker run --shm-size 1g, or data.num_workers=0" if size < LOW_SHM_BYTES else ""
        yield Check("/dev/shm", "warn" if hint else "ok", f"{size / 1e6:,.0f} MB free", hint)
    else:
        yield Check("/dev/shm", "warn", "not there", "loader workers need it: set data.num_workers=0")


def _gpu() -> Check:
    """NVIDIA GPUs as torch sees them; torch is asked only where a driver is there."""
    if not Path("/proc/driver/nvidia/version").exists() and not shutil.which("nvidia-smi"):
        return Check("gpu", "ok", "no NVIDIA driver: everything runs on the CPU; engines are built, not run")
    if _version("torch") is None:
        return Check("gpu", "warn", "a driver is there, torch is not", "pip install bmctl")
    import torch

    if not torch.cuda.is_available():
        return Check("gpu", "warn", f"a driver is there, torch {torch.__version__} sees no GPU", _driver_hint())
    names = [
        f"{torch.cuda.get_device_name(i)} (SM{''.join(map(str, torch.cuda.get_device_capability(i)))})"
        for i in range(torch.cuda.device_count())
    ]
    return Check("gpu", "ok", ", ".join(names))


def _driver_hint() -> str:
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return "CUDA_VISIBLE_DEVICES is empty: unset CUDA_VISIBLE_DEVICES"
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return "install the driver that this torch's CUDA needs"
    try:
        done = subprocess.run([smi, "-L"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi -L does not answer: {error}"
    first = (done.stdout or done.stderr).strip().splitlines()
    return f"nvidia-smi says: {first[0]}" if first else "nvidia-smi says nothing"


# -- privacy ------------------------------------------------------------------------------------------


def _privacy() -> Iterator[Check]:
    yield Check("telemetry", "ok", "bmctl sends nothing; OpenVINO's and NNCF's telemetry is kept out")
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        yield Check("downloads", "ok", "HF_HUB_OFFLINE is set: nothing is fetched")
    else:
        yield Check(
            "downloads", "ok", "only pretrained models that a recipe or import names; HF_HUB_OFFLINE=1 forbids them"
        )


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _field(text: str, name: str) -> str | None:
    match = re.search(rf"^{re.escape(name)}\s*:\s*(.*)$", text, flags=re.MULTILINE)
    return match[1].strip() if match else None
