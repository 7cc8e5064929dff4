"""Predictions: what is fed and what comes out, on a small trained run with its artifacts."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.engine.runs import Seen, make_recipe

import bmctl
from bmctl.core.images import decode
from bmctl.core.requests import Requests
from bmctl.core.runner import Bounds
from bmctl.engine.artifacts.opening import open_parts
from bmctl.engine.deployment import choose
from bmctl.engine.deployment.infer import Prediction, predict, to_csv, to_jsonl
from bmctl.engine.deployment.requests import MAX_NPZ_BYTES, open_requests
from bmctl.engine.loading.data import Data, open_split
from bmctl.errors import (
    DataError,
    DivergedError,
    PackageError,
    UnsupportedError,
)
from bmctl.inputs.image import Spec
from bmctl.inputs.image.pixels import prepare
from bmctl.package import PART, find_package
from bmctl.schema import Signature, TensorSpec
from bmctl.tasks.classify import TOP

SAMPLES = Path(bmctl.__file__).parent / "bundled" / "samples"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """The bundled samples, some of them in a sub-folder."""
    folder = tmp_path / "images"
    (folder / "deeper").mkdir(parents=True)
    for i, path in enumerate(sorted(SAMPLES.glob("*.png"))):
        shutil.copy(path, folder / "deeper" if i % 2 else folder)
    return folder


def eager_logits(run: Path, x: np.ndarray) -> np.ndarray:
    with ExitStack() as stack:
        return open_parts(find_package(run), stack)[PART].run({"input": x})["logits"]


def spec_of(run: Path) -> Spec:
    spec = find_package(run).manifest.input
    assert isinstance(spec, Spec)
    return spec


def fed(run: Path, source: Path, *, batch_size: int) -> Requests:
    """What the run's package is fed of `source`."""
    package = find_package(run)
    inputs = package.manifest.parts[PART].inputs
    return open_requests(source, inputs=inputs, given=package.given, batch_size=batch_size, emit=lambda event: None)


# -- what is fed ------------------------------------------------------------------------------------


def test_files_are_prepared_exactly_as_in_training(trained: Path, images: Path) -> None:
    """The batches are bit for bit those of `prepare`, which training uses, on the decoded images in memory."""
    requests = fed(trained, images, batch_size=4)
    batches = list(requests.batches)
    assert requests.num_samples == 10
    assert [len(batch.names) for batch in batches] == [4, 4, 2]
    paths = sorted(images.rglob("*.png"))
    assert [name for batch in batches for name in batch.names] == [str(path) for path in paths]
    found = np.concatenate([batch.fields["input"] for batch in batches])
    in_memory = prepare(np.stack([decode(path) for path in paths]), spec_of(trained))
    assert found.dtype == np.float32
    assert found.tobytes() == in_memory.tobytes()


def test_the_training_split_itself_gives_the_same_tensor(trained: Path, tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path)
    given = find_package(trained).given
    assert given is not None
    split = open_split(Data(recipe), name="val", given=given)
    pixels = split.samples.read(split.indices[:5])["picture"]
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    (tmp_path / "small.yaml").unlink()
    (batch,) = fed(trained, tmp_path, batch_size=5).batches
    assert batch.fields["input"].tobytes() == split.arrays(list(range(5))).fields["input"].tobytes()


def test_predictions_on_files_are_those_of_the_model_in_memory(trained: Path, images: Path) -> None:
    facts = find_package(trained).manifest.facts
    assert facts is not None
    paths = sorted(images.rglob("*.png"))
    x = prepare([decode(path) for path in paths], spec_of(trained))
    z = torch.from_numpy(eager_logits(trained, x)).double().softmax(dim=1).numpy()
    found = list(predict(trained, images, backend="eager"))
    for i, (one, path) in enumerate(zip(found, paths, strict=True)):
        assert one["input"] == str(path)
        assert one["class_index"] == z[i].argmax()
        assert one["class_name"] == facts["class_names"][one["class_index"]]
        assert one["score"] == pytest.approx(z[i].max(), abs=1e-6)
        scores = [each["score"] for each in one["top"]]
        assert scores == sorted(scores, reverse=True)
        assert len(scores) == TOP
        assert one["top"][0] == {"class_name": one["class_name"], "score": one["score"]}


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "eager", "auto"])
def test_every_backend_says_the_same(backend: str, trained: Path) -> None:
    expected = [one["class_index"] for one in predict(trained, "bundled:samples", backend="eager")]
    found = list(predict(trained, Path("bundled:samples"), backend=backend, batch_size=3))
    assert [one["class_index"] for one in found] == expected
    assert found[0]["input"] == "bundled:samples/0-t-shirt-top.png"


def test_an_image(trained: Path) -> None:
    path = SAMPLES / "8-bag.png"
    (one,) = predict(trained, path)
    assert one["input"] == str(path)


def test_arrays_prepared_or_as_pixels(trained: Path, tmp_path: Path) -> None:
    pixels = np.stack([decode(path) for path in sorted(SAMPLES.glob("*.png"))])
    np.savez(tmp_path / "pixels.npz", input=pixels)
    np.savez(tmp_path / "prepared.npz", input=prepare(pixels, spec_of(trained)), labels=np.arange(10))
    seen = Seen()
    first = list(predict(trained, tmp_path / "pixels.npz", backend="eager", batch_size=3))
    second = list(predict(trained, tmp_path / "prepared.npz", backend="eager", batch_size=3, emit=seen.events.append))
    assert [one["top"] for one in first] == [one["top"] for one in second]
    assert [one["input"] for one in first] == [f"{tmp_path / 'pixels.npz'}#{i}" for i in range(10)]
    assert "labels not read" in seen.notes


def test_a_list_of_images(trained: Path, images: Path) -> None:
    names = [str(path.relative_to(images)) for path in sorted(images.rglob("*.png"))]
    rows = [names[3], names[0], names[3]]
    text = "\ufeffid,path\n" + "".join(f'{i},"{name}"\n' for i, name in enumerate(rows))
    (images / "list.csv").write_text(text, encoding="utf-8")
    found = list(predict(trained, images / "list.csv"))
    assert [one["input"] for one in found] == rows
    assert found[0]["top"] == found[2]["top"]


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
    "npz other size": ("x.npz", {"input": np.zeros((1, 1, 28, 27), np.float32)}, r"expected \[batch, 1, 28, 28\]"),
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


# -- what comes out ---------------------------------------------------------------------------------


class Fake:
    """A runner that gives the same outputs whatever it is fed."""

    bounds: Mapping[str, Bounds] = {}

    def __init__(self, y: np.ndarray) -> None:
        x = TensorSpec(name="input", dtype="float32", shape=("batch", 1, 28, 28))
        self.y = y
        self.signature = Signature(
            inputs=(x,), outputs=(TensorSpec(name="y", dtype="float32", shape=("batch", *y.shape[1:])),)
        )

    def run(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"y": self.y[: len(feed["input"])]}


@pytest.fixture
def serving(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Have such a runner serve, whatever is asked for."""

    def serve(y: np.ndarray, **known: Any) -> None:
        chosen = choose.Chosen({PART: Fake(y)}, ExitStack(), "eager", "a test", **known)
        monkeypatch.setattr("bmctl.engine.deployment.infer.open_source", lambda *args, **kwargs: chosen)

    return serve


@pytest.fixture
def three(tmp_path: Path) -> Path:
    np.savez(tmp_path / "three.npz", input=np.zeros((3, 1, 28, 28), np.float32))
    return tmp_path / "three.npz"


def test_outputs_that_are_not_finite(trained: Path, serving: Callable[..., None], three: Path) -> None:
    serving(np.full((3, 10), np.nan, np.float32))
    with pytest.raises(DivergedError, match="nan or inf"):
        list(predict(trained, three))


def test_what_is_no_classifier(trained: Path, serving: Callable[..., None], three: Path) -> None:
    serving(np.zeros((3, 2, 2), np.float32))
    with pytest.raises(UnsupportedError, match="a classifier gives one output"):
        predict(trained, three)


def test_outputs_that_are_not_what_the_manifest_says(trained: Path, serving: Callable[..., None], three: Path) -> None:
    serving(np.zeros((3, 3), np.float32), task={"kind": "classify"}, facts={"class_names": ["a", "b"]})
    with pytest.raises(PackageError, match=r"gives 'y' \['batch', 3\], its manifest's facts \['batch', 2\]"):
        predict(trained, three)


@pytest.fixture
def two() -> list[Prediction]:
    def ranked(*found: tuple[str, float]) -> list[dict[str, Any]]:
        return [{"class_name": name, "score": score} for name, score in found]

    best = ranked(("T-shirt, top", 0.75), ("bag", 0.25))
    return [
        {"input": 'a "b", c\n.png', "class_name": "T-shirt, top", "class_index": 0, "score": 0.75, "top": best},
        {"input": "x.npz#1", "class_name": "bag", "class_index": 8, "score": 0.333333, "top": best[1:]},
    ]


def test_json_lines(two: list[Prediction]) -> None:
    lines = list(to_jsonl(two))
    assert not any("\n" in line for line in lines)
    assert [json.loads(line) for line in lines] == two
    assert list(json.loads(lines[0])) == ["input", "class_name", "class_index", "score", "top"]


def test_csv(two: list[Prediction], trained: Path) -> None:
    columns = predict(trained, "bundled:samples", backend="eager").columns
    rows = list(csv.reader(io.StringIO("\n".join(to_csv(two, columns=columns)))))
    assert rows[0] == list(columns) == ["input", "class_name", "class_index", "score"]
    assert rows[1] == ['a "b", c\n.png', "T-shirt, top", "0", "0.750000"]
    assert rows[2] == ["x.npz#1", "bag", "8", "0.333333"]


def test_a_prediction_in_a_few_words(two: list[Prediction], trained: Path) -> None:
    assert predict(trained, "bundled:samples", backend="eager").words(two[0]) == "T-shirt, top 75.0%"


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
        opened[0].runners[PART].run({"input": np.zeros((1, 1, 28, 28), np.float32)})
