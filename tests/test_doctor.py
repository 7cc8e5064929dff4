"""Doctor tells what is there from what is not, and what mends it."""

from __future__ import annotations

import importlib.metadata as metadata
import re
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from bmctl import __version__, doctor
from bmctl.core import memory
from bmctl.doctor import Check, examine


def found(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def only(checks: list[Check], name: str) -> Check:
    (check,) = [check for check in checks if check.name == name]
    return check


def test_everything_that_can_go_wrong_is_looked_at() -> None:
    checks = examine()
    names = [check.name for check in checks]
    assert len(names) == len(set(names))
    assert {
        "python",
        "bmctl",
        "torch",
        "onnxruntime",
        "processor",
        "cores",
        "memory",
        "disk",
        "/dev/shm",
        "gpu",
    } <= set(names)
    assert {"tensorrt", "tensorrt-rtx", "transformers", "telemetry", "downloads"} <= set(names)
    assert found(checks)["bmctl"].value == __version__
    assert all(check.value for check in checks)
    assert all(check.hint for check in checks if check.status == "missing")


def test_every_dependency_of_the_plain_install_is_checked() -> None:
    declared = {re.match(r"[\w.-]+", r)[0] for r in metadata.requires("bmctl") if "extra ==" not in r}
    assert len(declared) > 10
    assert declared <= set(found(examine()))


@pytest.mark.skipif(Path("/proc/driver/nvidia/version").exists(), reason="with a driver torch is asked for the GPUs")
def test_it_loads_nothing_heavy() -> None:
    code = (
        "import sys; from bmctl.doctor import examine; examine(); "
        "print(*sorted({'torch', 'numpy', 'onnx', 'openvino', 'rich', 'pydantic'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PATH": ""})
    assert done.stdout.strip() == ""


@pytest.mark.parametrize(
    ("version", "bounds", "within"),
    [
        ("2.14.1", "<2.15,>=2.14", True),
        ("2.14.0", ">=2.14,<2.15", True),
        ("2.14", ">=2.14.0,<2.15", True),
        ("2.15.0", ">=2.14,<2.15", False),
        ("2.13.9", ">=2.14,<2.15", False),
        ("2.14.1+cpu", ">=2.14,<2.15", True),
        ("2.9.0", ">=2.14", False),
        ("10.0", ">=9,<11", True),
        ("0.7.2", "<0.8,>=0.7.2", True),
        ("3.0.0rc1", "<3", False),
        ("1.0", "", True),
    ],
)
def test_versions_are_compared_as_numbers(
    version: str, bounds: str, within: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    requirement = Requirement(f"torch{bounds}")
    monkeypatch.setattr(doctor, "_version", lambda name: version)
    assert doctor._required(requirement).status == ("ok" if within else "warn")


def required(monkeypatch: pytest.MonkeyPatch, requirement: str, installed: str | None) -> Check:
    monkeypatch.setattr(doctor, "_version", lambda name: installed)
    return doctor._required(Requirement(requirement))


def test_a_dependency_that_is_missing_or_untested_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    requirement = "torch<2.15,>=2.14"
    assert required(monkeypatch, requirement, "2.14.1") == Check("torch", "ok", "2.14.1")
    missing = required(monkeypatch, requirement, None)
    assert (missing.status, missing.hint) == ("missing", "pip install 'torch<2.15,>=2.14'")
    newer = required(monkeypatch, requirement, "2.16.0")
    assert newer.status == "warn"
    assert "outside of the tested <2.15,>=2.14" in newer.value


def test_what_other_platforms_and_extras_need_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["typer>=1", 'b>=1; extra == "x"', 'c>=1; sys_platform == "nowhere"', 'd>=1; python_version >= "3"']
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: lines)
    assert [check.name for check in doctor._dependencies()] == ["typer", "d"]
    assert [one.name for one in doctor._requirements() if doctor._is_of(one, "x")] == ["b"]


def test_an_extra_that_is_not_there_costs_a_feature_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    extras = found(list(doctor._extras()))
    assert set(extras) == set(metadata.metadata("bmctl").get_all("Provides-Extra"))
    assert all(check.status == "warn" for check in extras.values())
    assert extras["tensorrt-rtx"].hint == "pip install 'bmctl[tensorrt-rtx]'"


def test_an_extra_that_is_there_shows_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: "1.7.1" if name == "tensorrt-rtx-cu13" else None)
    extras = found(list(doctor._extras()))
    assert extras["tensorrt-rtx"] == Check("tensorrt-rtx", "ok", "tensorrt-rtx-cu13 1.7.1")
    assert extras["tensorrt"].status == "warn"


def files(monkeypatch: pytest.MonkeyPatch, **content: str) -> None:
    monkeypatch.setattr(doctor, "_read", lambda path: content.get(Path(path).name.replace(".", "_"), ""))


def test_the_processor_is_known_by_what_it_can_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.platform, "machine", lambda: "x86_64")
    files(monkeypatch, cpuinfo="model name\t: Xeon\nflags\t\t: fpu avx2 avx512f amx_bf16 amx_int8\n")
    assert doctor._processor() == Check("processor", "ok", "Xeon; avx512f, amx_bf16, amx_int8, avx2")
    files(monkeypatch, cpuinfo="model name\t: Core\nflags\t\t: fpu avx2\n")
    assert "no bf16: training is in fp32" in doctor._processor().value
    files(monkeypatch, cpuinfo="model name\t: Atom\nflags\t\t: fpu sse2\n")
    assert doctor._processor().status == "warn"


def test_more_threads_than_cores_are_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    files(monkeypatch)
    monkeypatch.setattr(doctor.os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    for name in doctor.THREADS:
        monkeypatch.delenv(name, raising=False)
    assert doctor._threads() == Check("cores", "ok", "2 usable")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert doctor._threads().status == "ok"
    monkeypatch.setenv("OMP_NUM_THREADS", "16")
    check = doctor._threads()
    assert check.status == "warn"
    assert "unset OMP_NUM_THREADS" in check.hint


def test_a_containers_limits_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(doctor.os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    files(monkeypatch, cpu_max="200000 100000\n")
    check = doctor._threads()
    assert (check.status, check.hint) == ("warn", "export OMP_NUM_THREADS=2")
    files(monkeypatch, cpu_max="max 100000\n")
    assert doctor._threads().status == "ok"
    monkeypatch.setattr(memory, "free_bytes", lambda: 2_000_000_000)
    assert doctor._memory() == Check("memory", "warn", "2.0 GB available", "training wants about 4 GB: close something")
    monkeypatch.setattr(memory, "free_bytes", lambda: 64_000_000_000)
    assert doctor._memory().status == "ok"


def test_a_full_disk_and_a_small_shm_are_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage(free=10e6))
    checks = found(list(doctor._disks()))
    assert checks["disk"].status == "warn"
    assert "-o RUN" in checks["disk"].hint
    assert checks["/dev/shm"].status == "warn"
    assert "--shm-size" in checks["/dev/shm"].hint
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage(free=10e9))
    assert all(check.status == "ok" for check in doctor._disks())


def test_a_driver_without_a_usable_gpu_is_warned_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A driver's tool that answers, and a torch that sees nothing."""
    import torch

    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check = doctor._gpu()
    assert check.status == "warn"
    assert check.hint == "nvidia-smi says: NVIDIA-SMI has failed"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "unset CUDA_VISIBLE_DEVICES" in doctor._gpu().hint


def test_a_gpu_is_named_with_its_compute_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA L4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 9))
    assert doctor._gpu() == Check("gpu", "ok", "NVIDIA L4 (SM89)")


@pytest.mark.parametrize(("value", "offline"), [("1", True), ("true", True), ("0", False), ("", False)])
def test_offline_is_said(monkeypatch: pytest.MonkeyPatch, value: str, offline: bool) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    assert ("is set: nothing is fetched" in only(list(doctor._privacy()), "downloads").value) is offline
