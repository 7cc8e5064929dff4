"""Predictions: what serves, what is fed, what comes out; on a small trained run with its artifacts."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file
from tests.engine.runs import Seen, make_context, make_recipe

import bmctl
from bmctl.backends import BACKENDS
from bmctl.core.images import decode
from bmctl.engine.artifacts.deployed import SAMPLE, open_deployed
from bmctl.engine.deployment import choose
from bmctl.engine.deployment.export import export_package
from bmctl.engine.deployment.infer import COLUMNS, Prediction, predict, to_csv, to_jsonl
from bmctl.engine.deployment.requests import MAX_NPZ_BYTES, open_requests
from bmctl.engine.evaluation.evaluate import eager_part
from bmctl.engine.loading.data import Data, open_split
from bmctl.engine.training.train_stage import train_stage
from bmctl.errors import (
    BmctlError,
    DataError,
    DependencyError,
    DivergedError,
    PackageError,
    UnsupportedError,
    UsageError,
)
from bmctl.inputs import Resolved
from bmctl.inputs.image.pixels import prepare
from bmctl.package import find_package, load_model
from bmctl.schema import TensorSpec

SAMPLES = Path(bmctl.__file__).parent / "bundled" / "samples"
BUILT = ("onnxruntime", "openvino", "tensorrt_rtx")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with one trained package and an artifact for each backend that builds here."""
    folder = tmp_path_factory.mktemp("infer")
    recipe = make_recipe(folder, "train.epochs=1")
    context = make_context(folder / "run", recipe)
    train_stage(context)
    package = find_package(context.run)
    backends = [BACKENDS[name].Config() for name in BUILT if "not installed" not in _why_not(name)]
    export_package(context, package, backends=backends, into=context.run / "deploy")
    return context.run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy that a test may harm."""
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """The bundled samples, some of them in a sub-folder."""
    folder = tmp_path / "images"
    (folder / "deeper").mkdir(parents=True)
    for i, path in enumerate(sorted(SAMPLES.glob("*.png"))):
        shutil.copy(path, folder / "deeper" if i % 2 else folder)
    return folder


def _why_not(name: str) -> str:
    module = BACKENDS[name]
    return str(module.unavailable(module.Config()))


def eager_logits(run: Path, x: np.ndarray) -> np.ndarray:
    return eager_part(load_model(find_package(run)))(x)


# -- what is fed ------------------------------------------------------------------------------------


def test_files_are_prepared_exactly_as_in_training(trained: Path, images: Path) -> None:
    """The batches are bit for bit those of `prepare`, which training uses, on the decoded images in memory."""
    manifest = find_package(trained).manifest
    assert manifest.preprocess is not None
    requests = open_requests(
        images, inputs=manifest.inputs, given=Resolved(manifest.preprocess), batch_size=4, emit=lambda event: None
    )
    batches = list(requests.batches)
    assert requests.num_samples == 10
    assert [len(batch.names) for batch in batches] == [4, 4, 2]
    paths = sorted(images.rglob("*.png"))
    assert [name for batch in batches for name in batch.names] == [str(path) for path in paths]
    fed = np.concatenate([batch.fields["input"] for batch in batches])
    in_memory = prepare(np.stack([decode(path) for path in paths]), manifest.preprocess)
    assert fed.dtype == np.float32
    assert fed.tobytes() == in_memory.tobytes()


def test_the_training_split_itself_gives_the_same_tensor(trained: Path, tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path)
    manifest = find_package(trained).manifest
    assert manifest.preprocess is not None
    split = open_split(Data(recipe), name="val", given=Resolved(manifest.preprocess))
    pixels = split.samples.read(split.indices[:5])["picture"]
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    (tmp_path / "small.yaml").unlink()
    found = open_requests(
        tmp_path, inputs=manifest.inputs, given=Resolved(manifest.preprocess), batch_size=5, emit=lambda event: None
    )
    (batch,) = found.batches
    assert batch.fields["input"].tobytes() == split.arrays(list(range(5))).fields["input"].tobytes()


def test_predictions_on_files_are_those_of_the_model_in_memory(trained: Path, images: Path) -> None:
    manifest = find_package(trained).manifest
    assert manifest.preprocess is not None
    paths = sorted(images.rglob("*.png"))
    x = prepare([decode(path) for path in paths], manifest.preprocess)
    z = torch.from_numpy(eager_logits(trained, x)).double().softmax(dim=1).numpy()
    found = list(predict(trained, images, backend="eager", top=3))
    for i, (one, path) in enumerate(zip(found, paths, strict=True)):
        assert one.input == str(path)
        assert one.class_index == z[i].argmax()
        assert one.class_name == manifest.class_names[one.class_index]
        assert one.score == pytest.approx(z[i].max(), rel=1e-5)
        scores = [score for _, score in one.top]
        assert scores == sorted(scores, reverse=True)
        assert len(one.top) == 3 and one.top[0] == (one.class_name, one.score)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "eager", "auto"])
def test_every_backend_says_the_same(backend: str, trained: Path) -> None:
    expected = [one.class_index for one in predict(trained, "bundled:samples", backend="eager")]
    found = list(predict(trained, Path("bundled:samples"), backend=backend, batch_size=3))
    assert [one.class_index for one in found] == expected
    assert found[0].input == "bundled:samples/0-t-shirt-top.png"


def test_an_image(trained: Path) -> None:
    path = SAMPLES / "8-bag.png"
    (one,) = predict(trained, path)
    assert one.input == str(path)


def test_arrays_prepared_or_as_pixels(trained: Path, tmp_path: Path) -> None:
    manifest = find_package(trained).manifest
    assert manifest.preprocess is not None
    pixels = np.stack([decode(path) for path in sorted(SAMPLES.glob("*.png"))])
    np.savez(tmp_path / "pixels.npz", input=pixels)
    np.savez(tmp_path / "prepared.npz", input=prepare(pixels, manifest.preprocess), labels=np.arange(10))
    seen = Seen()
    first = list(predict(trained, tmp_path / "pixels.npz", backend="eager", batch_size=3))
    second = list(predict(trained, tmp_path / "prepared.npz", backend="eager", batch_size=3, emit=seen.events.append))
    assert [one.top for one in first] == [one.top for one in second]
    assert [one.input for one in first] == [f"{tmp_path / 'pixels.npz'}#{i}" for i in range(10)]
    assert "labels not read" in seen.notes


def test_a_list_of_images(trained: Path, images: Path) -> None:
    names = [str(path.relative_to(images)) for path in sorted(images.rglob("*.png"))]
    rows = [names[3], names[0], names[3]]
    text = "\ufeffid,path\n" + "".join(f'{i},"{name}"\n' for i, name in enumerate(rows))
    (images / "list.csv").write_text(text, encoding="utf-8")
    found = list(predict(trained, images / "list.csv"))
    assert [one.input for one in found] == rows
    assert found[0].top == found[2].top


def test_what_is_no_image_is_said(trained: Path, images: Path) -> None:
    (images / "notes.txt").write_text("hello")
    seen = Seen()
    assert len(list(predict(trained, images, emit=seen.events.append))) == 10
    assert "1 files are not images" in seen.notes


def test_all_bad_images_are_named(trained: Path, images: Path) -> None:
    good = images / "0-t-shirt-top.png"
    (images / "a-broken.png").write_bytes(good.read_bytes()[:100])
    (images / "z-empty.jpg").write_bytes(b"")
    os.mkfifo(images / "pipe.png")
    found = predict(trained, images, batch_size=2)
    with pytest.raises(DataError) as caught:
        list(found)
    assert "3 of 13 images cannot be read" in caught.value.message
    for name in ("a-broken.png", "z-empty.jpg", "pipe.png"):
        assert name in caught.value.message


def test_bad_images_may_be_skipped_aloud(trained: Path, images: Path) -> None:
    (images / "a-broken.png").write_bytes(b"")
    seen = Seen()
    found = list(predict(trained, images, on_bad="skip", emit=seen.events.append))
    assert len(found) == 10
    assert "skipped: " in seen.notes and "a-broken.png" in seen.notes


BAD_INPUTS: dict[str, tuple[str, Any, str]] = {
    "missing": ("nowhere.png", None, "does not exist"),
    "empty folder": ("folder", {}, "has no images"),
    "not an image": ("x.png", b"hello", "expected a PNG"),
    "csv without the column": ("x.csv", b"file\na.png\n", r"\['file'\], expected one named 'path'"),
    "csv that is binary": ("x.csv", b"\xff\xfe\x00", "not a CSV file in UTF-8"),
    "empty csv": ("x.csv", b"path\n", "lists no images"),
    "csv with a hole": ("x.csv", b"path,id\na.png,1\n,2\n", "x.csv:3: the path is missing"),
    "npz that is none": ("x.npz", b"hello", "not an .npz file"),
    "npz truncated": ("x.npz", "truncate", "not an .npz file"),
    "npz of objects": ("x.npz", {"input": np.array([{}], dtype=object)}, "not an .npz file of plain arrays"),
    "npz with other names": ("x.npz", {"x": np.zeros(3)}, r"the arrays \['x'\], expected \['input'\]"),
    "npz empty": ("x.npz", {"input": np.zeros((0, 1, 28, 28), np.float32)}, "at least 1"),
    "npz scalar": ("x.npz", {"input": np.float32(1)}, "at least 1"),
    "npz float64": ("x.npz", {"input": np.zeros((1, 1, 28, 28))}, "is float64, expected float32"),
    "npz other size": ("x.npz", {"input": np.zeros((1, 1, 28, 27), np.float32)}, r"expected \[n, 1, 28, 28\]"),
    "npz nan": ("x.npz", {"input": np.full((1, 1, 28, 28), np.nan, np.float32)}, "nan or inf"),
    "npz pixels of 4 channels": ("x.npz", {"input": np.zeros((1, 28, 28, 4), np.uint8)}, "expected images"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_inputs(case: str, trained: Path, tmp_path: Path) -> None:
    name, content, pattern = BAD_INPUTS[case]
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "truncate":
        np.savez(path, input=np.zeros((4, 1, 28, 28), np.float32))
        path.write_bytes(path.read_bytes()[:-200])
    elif isinstance(content, dict) and path.suffix == ".npz":
        np.savez(path, **content)
    elif isinstance(content, dict):
        path.mkdir()
    with pytest.raises(DataError, match=pattern) as caught:
        list(predict(trained, path, backend="onnxruntime"))
    assert caught.value.exit_code == 4


def test_an_archive_that_unpacks_to_too_much(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_NPZ_BYTES == 4 * 2**30
    monkeypatch.setattr("bmctl.engine.deployment.requests.MAX_NPZ_BYTES", 1000)
    np.savez_compressed(tmp_path / "x.npz", input=np.zeros((10, 1, 28, 28), np.float32))
    with pytest.raises(DataError, match="unpacks to"):
        list(predict(trained, tmp_path / "x.npz", backend="onnxruntime"))


def test_nothing_is_unpickled(trained: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "hacked"),)

    np.savez(tmp_path / "x.npz", input=np.array([Evil()], dtype=object))
    with pytest.raises(DataError):
        list(predict(trained, tmp_path / "x.npz", backend="onnxruntime"))
    assert not (tmp_path / "hacked").exists()


# -- what serves ------------------------------------------------------------------------------------


def test_auto_takes_what_is_right_and_says_why(trained: Path) -> None:
    chosen = choose.choose_runner(trained)
    with chosen.runner:
        assert chosen.backend in ("onnxruntime", "openvino")
        assert "fastest of what is right here" in chosen.why
        assert chosen.why.count(" ms") == 2
        assert "tensorrt_rtx: built, not run" in chosen.why or _why_not("tensorrt_rtx") == ""


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
        with chosen.runner:
            assert chosen.backend == fast


def test_auto_leaves_out_what_is_wrong_here(run: Path) -> None:
    """An artifact whose runtime disagrees with its recorded sample: here the sample is another one, hashes and all."""
    folder = run / "deploy" / "openvino"
    sample = load_file(folder / SAMPLE)
    save_file({name: array if name == "input" else array + 100 for name, array in sample.items()}, folder / SAMPLE)
    _reseal(folder)
    chosen = choose.choose_runner(run)
    with chosen.runner:
        assert chosen.backend == "onnxruntime"
        assert "openvino: wrong on this machine" in chosen.why


def test_auto_leaves_out_what_an_older_package_gave(run: Path) -> None:
    for name in ("onnxruntime", "openvino"):
        _edit(run / "deploy" / name / "manifest.json", package="0" * 64)
    chosen = choose.choose_runner(run)
    with chosen.runner:
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
    if not folder.is_dir() or not _why_not("tensorrt_rtx"):
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
    with pytest.raises(DataError, match="no record of how images are prepared") as caught:
        predict(path, "bundled:samples")
    assert "'input' float32 ['n', 1, 28, 28]" in caught.value.hint
    np.savez(tmp_path / "x.npz", input=np.zeros((2, 28, 28), np.uint8))
    with pytest.raises(DataError, match="no record of how images are prepared"):
        predict(path, tmp_path / "x.npz")
    np.savez(tmp_path / "x.npz", input=np.zeros((2, 1, 28, 28), np.float32))
    expected = [one.class_index for one in predict(trained, tmp_path / "x.npz")]
    for backend in ("auto", "openvino"):
        found = list(predict(path, tmp_path / "x.npz", backend=backend))
        assert [one.class_index for one in found] == expected
        assert found[0].class_name == str(found[0].class_index)
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


# -- calls of the right size ------------------------------------------------------------------------


class Counting:
    """A runner that takes 3 to 4 samples and gives each one's first pixel, and one minus it."""

    inputs = (TensorSpec(name="x", shape=(None, 1), dtype="float32"),)
    outputs = (TensorSpec(name="y", shape=(None, 2), dtype="float32"),)
    batch: tuple[int, int | None] = (3, 4)

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def run(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.sizes.append(len(feed["x"]))
        return {"y": np.concatenate([feed["x"], 1 - feed["x"]], axis=1)}

    def __enter__(self) -> Counting:
        return self

    def __exit__(self, *raised: object) -> None: ...


@pytest.mark.parametrize(("size", "calls"), [(1, [3]), (3, [3]), (4, [4]), (9, [4, 4, 3])])
def test_calls_stay_within_the_profile(size: int, calls: list[int]) -> None:
    runner = Counting()
    x = np.arange(size, dtype=np.float32)[:, None]
    y = choose.run_batch(runner, {"x": x})
    assert runner.sizes == calls
    np.testing.assert_array_equal(y[:, :1], x)


def test_outputs_that_are_not_finite(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "bmctl.engine.deployment.infer.run_batch", lambda runner, feed: np.full((10, 10), np.nan, np.float32)
    )
    with pytest.raises(DivergedError, match="nan or inf"):
        list(predict(trained, "bundled:samples"))


def test_what_is_no_classifier(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = Counting()
    runner.outputs = (TensorSpec(name="y", shape=(None, 2, 2), dtype="float32"),)  # type: ignore[misc]
    chosen = choose.Chosen(runner, "eager", "a test", None, ())
    monkeypatch.setattr("bmctl.engine.deployment.infer.open_source", lambda *args, **kwargs: chosen)
    with pytest.raises(UnsupportedError, match="a classifier gives one output"):
        predict(trained, "bundled:samples")


# -- what comes out ---------------------------------------------------------------------------------


@pytest.fixture
def two() -> Iterator[Prediction]:
    best = (("T-shirt, top", 0.75), ("bag", 0.25))
    return iter(
        [
            Prediction(input='a "b", c\n.png', class_name="T-shirt, top", class_index=0, score=0.75, top=best),
            Prediction(input="x.npz#1", class_name="bag", class_index=8, score=1 / 3, top=(("bag", 1 / 3),)),
        ]
    )


def test_json_lines(two: Iterator[Prediction]) -> None:
    lines = list(to_jsonl(two))
    assert not any("\n" in line for line in lines)
    first, second = (json.loads(line) for line in lines)
    assert list(first) == ["input", "class_name", "class_index", "score", "top"]
    assert first["input"] == 'a "b", c\n.png'
    assert first["top"] == [{"class_name": "T-shirt, top", "score": 0.75}, {"class_name": "bag", "score": 0.25}]
    assert second["score"] == 0.333333


def test_csv(two: Iterator[Prediction]) -> None:
    rows = list(csv.reader(io.StringIO("\n".join(to_csv(two)))))
    assert rows[0] == list(COLUMNS) == ["input", "class_name", "class_index", "score"]
    assert rows[1] == ['a "b", c\n.png', "T-shirt, top", "0", "0.750000"]
    assert rows[2] == ["x.npz#1", "bag", "8", "0.333333"]


def test_progress_is_told(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bmctl.engine.deployment.infer.EVENT_PERIOD_S", 0.0)
    seen = Seen()
    list(predict(trained, "bundled:samples", batch_size=4, emit=seen.events.append))
    assert [event["step"] for event in seen.of("step")] == [4, 8, 10]
    assert seen.of("start")[0]["steps"] == seen.of("done")[0]["steps"] == 10
    assert seen.of("done")[0]["backend"] in ("onnxruntime", "openvino")


def test_the_model_is_closed_when_the_inputs_do_not_fit(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[choose.Chosen] = []

    def spy(*args: Any, **kwargs: Any) -> choose.Chosen:
        opened.append(choose.open_source(*args, **kwargs))
        return opened[0]

    monkeypatch.setattr("bmctl.engine.deployment.infer.open_source", spy)
    with pytest.raises(DataError):
        predict(trained, "nowhere.png", backend="onnxruntime")
    with pytest.raises(ValueError, match="closed"):
        opened[0].runner.run({})


def _edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def _reseal(folder: Path) -> None:
    """Record the files as they are now."""
    from bmctl import store

    files = {name: record.model_dump() for name, record in store.records(folder).items()}
    _edit(folder / "manifest.json", files=files)
    open_deployed(folder)
