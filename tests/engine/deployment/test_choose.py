"""Which artifact serves: the fastest of what is right here, and what is refused, with its reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tests.engine.deployment.available import why_not
from tests.engine.runs import Seen

from bmctl.engine.artifacts.deployed import SAMPLE, open_deployed
from bmctl.engine.deployment import choose
from bmctl.engine.deployment.infer import predict
from bmctl.errors import (
    BmctlError,
    DataError,
    DependencyError,
    PackageError,
    UsageError,
)
from bmctl.package import find_package


def test_auto_takes_what_is_right_and_says_why(trained: Path) -> None:
    chosen = choose.choose_runner(trained)
    with chosen.stack:
        assert chosen.backend in ("onnxruntime", "openvino")
        assert "fastest of what is right here" in chosen.why
        assert chosen.why.count(" ms") == 2
        assert "tensorrt_rtx: built, not run" in chosen.why or why_not("tensorrt_rtx") == ""


def test_auto_takes_the_fastest(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow_down(name: str) -> None:
        from bmctl.engine.evaluation.measure import Latency

        def latency(runs: Mapping[str, Any], *, rounds: int) -> dict[str, Latency]:
            for call in runs.values():
                call()
            times = {one: 2.0 if one == name else 1.0 for one in runs}
            return {one: Latency(t, t, t, (t,)) for one, t in times.items()}

        monkeypatch.setattr("bmctl.engine.evaluation.measure.latency", latency)

    for slow, fast in (("onnxruntime", "openvino"), ("openvino", "onnxruntime")):
        slow_down(slow)
        chosen = choose.choose_runner(trained)
        with chosen.stack:
            assert chosen.backend == fast


def test_auto_leaves_out_what_is_wrong_here(run: Path) -> None:
    """An artifact whose runtime disagrees with its recorded sample: here the sample is another one, hashes and all."""
    folder = run / "deploy" / "openvino"
    sample = load_file(folder / SAMPLE)
    save_file({name: array + 100 * ("/outputs/" in name) for name, array in sample.items()}, folder / SAMPLE)
    _reseal(folder)
    chosen = choose.choose_runner(run)
    with chosen.stack:
        assert chosen.backend == "onnxruntime"
        assert "openvino: wrong on this machine" in chosen.why


def test_auto_leaves_out_what_an_older_package_gave(run: Path) -> None:
    for name in ("onnxruntime", "openvino"):
        _edit(run / "deploy" / name / "manifest.json", package="0" * 64)
    chosen = choose.choose_runner(run)
    with chosen.stack:
        assert chosen.backend == "eager"
        assert "openvino: not built from the newest package, 00-train" in chosen.why
    with pytest.raises(PackageError, match="not built from the newest package"):
        choose.choose_runner(run, backend="openvino")


def test_the_package_itself_where_nothing_was_deployed(run: Path) -> None:
    shutil.rmtree(run / "deploy")
    seen = Seen()
    assert len(list(predict(run, "bundled:samples", emit=seen.events.append))) == 10
    assert "eager: the package 00-train itself; nothing was deployed" in seen.notes
    with pytest.raises(PackageError, match="no artifact for openvino; deployed: nothing") as caught:
        predict(run, "bundled:samples", backend="openvino")
    assert "bmctl export" in caught.value.hint


@pytest.mark.parametrize("name", ["model.onnx", SAMPLE])
def test_a_flipped_byte_is_never_served(name: str, run: Path) -> None:
    path = run / "deploy" / "openvino" / name
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(PackageError) as caught:
        predict(run, "bundled:samples")
    assert caught.value.exit_code == 5


def test_the_baseline_is_not_served(run: Path) -> None:
    (run / "deploy" / "baseline").mkdir()
    shutil.move(run / "deploy" / "openvino", run / "deploy" / "baseline" / "openvino")
    with pytest.raises(PackageError, match="no artifact for openvino"):
        predict(run, "bundled:samples", backend="openvino")


def test_a_deploy_directory_and_its_file(trained: Path) -> None:
    folder = trained / "deploy" / "openvino"
    expected = list(predict(trained, "bundled:samples", backend="openvino"))
    for source in (folder, folder / "model.onnx"):
        seen = Seen()
        assert list(predict(source, "bundled:samples", emit=seen.events.append)) == expected
        assert "openvino: what" in seen.notes
    with pytest.raises(UsageError, match="is for openvino, not for onnxruntime"):
        predict(folder, "bundled:samples", backend="onnxruntime")


def test_an_engine_says_what_it_needs(trained: Path) -> None:
    folder = trained / "deploy" / "tensorrt_rtx"
    if not folder.is_dir() or not why_not("tensorrt_rtx"):
        pytest.skip("no engine, or one that runs here")
    for source, backend in ((folder, "auto"), (folder / "model.rtx.engine", "auto"), (trained, "tensorrt_rtx")):
        with pytest.raises(DependencyError, match="built, not run") as caught:
            predict(source, "bundled:samples", backend=backend)
        assert caught.value.exit_code == 6


def test_an_engine_without_its_manifest(trained: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.rtx.engine"
    path.write_bytes(b"vtrt")
    with pytest.raises(PackageError, match="executable code"):
        predict(path, "bundled:samples")


def test_a_bare_onnx_file(trained: Path, tmp_path: Path) -> None:
    path = shutil.copy(trained / "deploy" / "onnxruntime" / "model.onnx", tmp_path / "bare.onnx")
    with pytest.raises(DataError, match="no record of how they are made for it") as caught:
        predict(path, "bundled:samples")
    assert "'input' float32 [batch, 1, 28, 28]" in caught.value.hint
    np.savez(tmp_path / "x.npz", input=np.zeros((2, 28, 28), np.uint8))
    with pytest.raises(DataError, match="no record of how they are made for it"):
        predict(path, tmp_path / "x.npz")
    np.savez(tmp_path / "x.npz", input=np.zeros((2, 1, 28, 28), np.float32))
    expected = [one["class_index"] for one in predict(trained, tmp_path / "x.npz")]
    for backend in ("auto", "openvino"):
        found = list(predict(path, tmp_path / "x.npz", backend=backend))
        assert [one["class_index"] for one in found] == expected
        assert found[0]["class_name"] == str(found[0]["class_index"])
    with pytest.raises(UsageError, match="does not run on tensorrt"):
        predict(path, tmp_path / "x.npz", backend="tensorrt")


@pytest.mark.parametrize("name", ["eager", "onnxruntime"])
def test_a_package_runs_on_its_own(name: str, trained: Path) -> None:
    package = find_package(trained).path
    if name == "eager":
        assert len(list(predict(package, "bundled:samples", backend=name))) == 10
    else:
        with pytest.raises(UsageError, match=r"runs on eager, not on onnxruntime"):
            predict(package, "bundled:samples", backend=name)


BAD_SOURCES: dict[str, tuple[str, Any, type[BmctlError], str]] = {
    "missing": ("nowhere", None, PackageError, "there is nothing at"),
    "other file": ("model.pt", b"PK", PackageError, "neither an .onnx file nor an engine"),
    "lfs pointer": ("model.pt", b"version https://git-lfs.github.com/spec/v1", PackageError, "git lfs pull"),
    "garbage onnx": ("model.onnx", b"\x08garbage", PackageError, "model.onnx"),
    "empty folder": ("folder", {}, PackageError, "neither a package nor a run"),
    "manifest that is none": ("folder", {"manifest.json": b"{"}, PackageError, "not JSON"),
}


@pytest.mark.parametrize("case", BAD_SOURCES)
def test_bad_sources(case: str, tmp_path: Path) -> None:
    name, content, kind, pattern = BAD_SOURCES[case]
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, dict):
        path.mkdir()
        for file, data in content.items():
            (path / file).write_bytes(data)
    with pytest.raises(kind, match=pattern):
        predict(path, "bundled:samples")


def test_an_unknown_backend(trained: Path) -> None:
    with pytest.raises(UsageError, match="no such backend: cuda"):
        predict(trained, "bundled:samples", backend="cuda")


def _edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def _reseal(folder: Path) -> None:
    """Record the files as they are now."""
    from bmctl import store

    files = {name: record.model_dump() for name, record in store.records(folder).items()}
    _edit(folder / "manifest.json", files=files)
    open_deployed(folder)
