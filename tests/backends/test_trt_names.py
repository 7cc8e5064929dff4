"""Every name of TensorRT that the shared modules use exists in both libraries, with the same signature or value.

The names are read out of the source, so that the check cannot go stale. TensorRT-RTX is imported. TensorRT's bindings
need libraries that no machine without its big wheel has: they are imported in a process of their own against empty
ones, made with the C compiler; nothing of them is called.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bmctl.backends import trt_engine, trt_runner

pytest.importorskip("tensorrt_rtx", reason="the extra tensorrt-rtx is not installed")

# What the shared modules call their objects, and the class that each is of.
CLASSES = {
    "builder": "Builder",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "problem": "ParserError",
    "settings": "IBuilderConfig",
    "profile": "IOptimizationProfile",
    "tensor": "ITensor",
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
}
OURS = {
    "array", "artifact", "batch", "checked", "device", "dict", "error", "found", "functools", "hashlib", "held",
    "json", "kept", "logger", "manifest", "mended", "meta", "model", "msg", "np", "onnx", "onnx_path", "out", "path",
    "self", "session", "signature", "span", "spec", "torch",
}  # fmt: skip
FILES = [Path(str(module.__file__)) for module in (trt_engine, trt_runner)]

SYMBOLS = """
createInferBuilder_INTERNAL createInferRefitter_INTERNAL createInferRuntime_INTERNAL createNvOnnxParser_INTERNAL
createNvOnnxParserRefitter_INTERNAL getBuilderPluginRegistry getNvOnnxParserVersion getPluginRegistry
initLibNvInferPlugins
""".split()  # noqa: SIM905

DESCRIBE = """
import importlib, json, os, sys
sys.setdlopenflags(os.RTLD_LAZY)
trt = importlib.import_module(sys.argv[1])
found = {}
for name in json.loads(sys.argv[2]):
    value = trt
    for part in name.split("."):
        value = getattr(value, part, None)
    if value is None:
        found[name] = None
    elif isinstance(value, property):
        found[name] = ["property"]
    elif callable(value):
        found[name] = (value.__doc__ or "").splitlines()
    else:
        found[name] = [str(int(value)) if hasattr(value, "__int__") else "value"]
print(json.dumps(found))
"""


def used_names() -> dict[str, str]:
    """Dotted names below the library, such as ``Builder.create_network``, with where they are used."""
    names: dict[str, str] = {}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Attribute):
                continue
            parts = [node.attr]
            base: ast.expr = node.value
            while isinstance(base, ast.Attribute):
                parts.insert(0, base.attr)
                base = base.value
            if not isinstance(base, ast.Name) or base.id in OURS:
                continue
            where = f"{path.name}:{node.lineno}"
            if base.id == "trt":
                if not parts[0].startswith("__"):
                    names[".".join(parts)] = where
            elif base.id in CLASSES:
                names[f"{CLASSES[base.id]}.{parts[0]}"] = where
            else:
                pytest.fail(f"{where}: is {base.id!r} an object of TensorRT's? Name it in CLASSES or in OURS")
    return names


def describe(module: str, names: list[str], *, libraries: Path | None = None) -> dict[str, list[str] | None]:
    environment = dict(os.environ) | {"PYTHONPATH": os.pathsep.join(sys.path)}
    if libraries:
        environment["LD_LIBRARY_PATH"] = str(libraries)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", DESCRIBE, module, json.dumps(names)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, list[str] | None] = json.loads(done.stdout)
    return found


def signatures(lines: list[str], *, name: str) -> set[str]:
    """The lines of a docstring that pybind11 made from C++, without the library's own name."""
    bare = name.rpartition(".")[2]
    found = {re.sub(r"^\d+\. ", "", line) for line in lines if re.match(rf"(\d+\. )?{bare}\(.*\) -> ", line)}
    return {re.sub(r"tensorrt(_rtx)?_bindings\.tensorrt(_rtx)?\.", "", line) for line in found}


@pytest.fixture(scope="module")
def bindings() -> Path:
    """TensorRT's own bindings, installed without the libraries they bind."""
    spec = importlib.util.find_spec("tensorrt_bindings")
    if spec is None or spec.origin is None:
        pytest.skip("tensorrt-cu13-bindings is not installed")
    return Path(spec.origin).parent


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler to make empty libraries with")
    folder = tmp_path_factory.mktemp("libraries")
    (folder / "empty.c").write_text(f"int {', '.join(SYMBOLS)};\n")
    for name in ("nvinfer", "nvinfer_plugin", "nvonnxparser"):
        out = folder / f"lib{name}.so.11"
        subprocess.run([compiler, "-shared", "-fPIC", "-o", str(out), str(folder / "empty.c")], check=True)
    return folder


def test_the_source_is_read() -> None:
    names = used_names()
    assert {name.split(".")[0] for name in names} >= set(CLASSES.values())
    assert {"Builder.build_serialized_network", "BuilderFlag.TF32", "IExecutionContext.execute_async_v3"} <= set(names)
    assert len(names) > 40


def test_names_in_tensorrt_rtx() -> None:
    names = used_names()
    found = describe("tensorrt_rtx", list(names))
    assert [f"{name} at {where}" for name, where in names.items() if found[name] is None] == []


def test_names_in_tensorrts_binary(bindings: Path) -> None:
    """Needs no compiler: every name stands in the shared object as text."""
    binary = (bindings / "tensorrt.so").read_bytes()
    names = used_names()
    parts = {part for name in names for part in name.split(".")}
    # Only the end is sure: linkers let a short string be the tail of a longer one.
    assert sorted(part for part in parts if f"{part}\0".encode() not in binary) == []
    # A name that TensorRT-RTX alone has shows that the test can fail.
    assert b"set_compute_capability\0" not in binary


def test_names_and_signatures_in_tensorrt(bindings: Path, libraries: Path) -> None:
    names = used_names()
    ours = describe("tensorrt_rtx", list(names))
    theirs = describe("tensorrt_bindings", list(names), libraries=libraries)
    missing = [f"{name} at {where}" for name, where in names.items() if theirs[name] is None]
    assert missing == []
    for name in names:
        one, other = ours[name] or [], theirs[name] or []
        if signatures(one, name=name):
            assert signatures(one, name=name) & signatures(other, name=name), f"{name}: {one} against {other}"
        elif one == ["property"] or one[0].isdigit():
            assert one == other, name


def test_what_the_libraries_do_not_share_is_told_apart(bindings: Path, libraries: Path) -> None:
    name = "IBuilderConfig.set_compute_capability"
    assert describe("tensorrt_rtx", [name])[name] is not None
    assert describe("tensorrt_bindings", [name], libraries=libraries)[name] is None
