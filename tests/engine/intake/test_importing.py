"""Import: published models from a hub on loopback, foreign state dicts, ONNX files; and what is refused."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file
from tests.specs import image_spec
from torch import nn

from bmctl import models, package
from bmctl.core.images import decode
from bmctl.engine.context import StageContext
from bmctl.engine.intake import statedict
from bmctl.engine.intake.importing import import_stage
from bmctl.engine.parallel import Group
from bmctl.errors import BmctlError, DataError, PackageError, RecipeError, ResourceError, UnsupportedError, UsageError
from bmctl.inputs.image.pixels import prepare
from bmctl.processes.signals import Stop
from bmctl.recipe import Recipe

TINY = "torchvision:squeezenet1_1"


class Events(list[dict[str, Any]]):
    def __call__(self, event: Any) -> None:
        self.append(dict(event))

    @property
    def text(self) -> str:
        return "\n".join(str(event.get("text", "")) for event in self)


@pytest.fixture
def make_context(tmp_path: Path) -> Callable[..., StageContext]:
    def make(name: str = "run", *, overwrite: bool = False, **recipe: Any) -> StageContext:
        run = tmp_path / name
        run.mkdir(exist_ok=True)
        return StageContext(
            run=run,
            recipe=Recipe.model_validate({"name": "imported", **recipe}),
            group=Group(rank=0, local_rank=0, world=1, device=torch.device("cpu"), threads=1),
            stop=Stop(),
            emit=Events(),
            overwrite=overwrite,
        )

    return make


DATA = {"source": {"kind": "bundled"}, "train": {"limit": 100}, "val": {"limit": 100}}
WITH_DATA = {"data": DATA, "task": {"kind": "classify"}}


def rescnn(num_classes: int = 10) -> nn.Module:
    torch.manual_seed(3)
    return models.build(image_spec("bmctl:rescnn", num_classes=num_classes)).eval()


def message_of(caught: pytest.ExceptionInfo[BmctlError]) -> str:
    return f"{caught.value.message} | {caught.value.hint}"


# -- state dicts ------------------------------------------------------------------------------------


def test_real_weights_by_position(shared_data: Path, make_context: Callable[..., StageContext]) -> None:
    """EfficientNet-Lite0 under another project's names: it must see what is on the photographs."""
    context = make_context()
    path = shared_data / "vision" / "efficientnet-lite0-57934424.pth"
    found = import_stage(context, str(path), model="timm:tf_efficientnet_lite0", match="position")
    manifest = found.manifest
    assert manifest.stage == "import"
    assert found.path == context.run / "packages" / "00-import"
    assert manifest.model is not None
    assert (manifest.model.told, manifest.model.given[0].shape[2:]) == ({"num_classes": 1000}, (224, 224))
    assert manifest.metrics["num_params"] == 4652008
    assert manifest.preprocess is not None
    assert (manifest.preprocess.mean, manifest.preprocess.crop) == ((0.5, 0.5, 0.5), 0.875)
    log = (context.run / "logs" / "import.tsv").read_text().splitlines()
    assert log[0] == "in the file\tin the model\tshape"
    assert log[1] == "_conv_stem.weight\tconv_stem.weight\t[32, 3, 3, 3]" or log[1].endswith("[32, 3, 3, 3]")
    assert len(log) > 290
    model = package.load_model(package.open_package(found.path))
    animals = shared_data / "vision" / "tuxpaint160" / "animals"
    photos = {"pink_flamingo": "flamingo", "peacock": "peacock", "hen": "hen", "rooster": "cock"}
    pixels = [decode(animals / f"animals_birds_{name}.jpg") for name in photos]
    with torch.inference_mode():
        logits = model(torch.from_numpy(prepare(pixels, manifest.preprocess)))
    assert torch.isfinite(logits).all()
    assert [manifest.class_names[int(k)].split(",")[0] for k in logits.argmax(1)] == list(photos.values())


def test_real_weights_of_another_model_say_where_they_part(
    shared_data: Path, make_context: Callable[..., StageContext]
) -> None:
    path = shared_data / "vision" / "efficientnet-lite0-57934424.pth"
    with pytest.raises(PackageError, match=r"the first to differ is tensor \d+, in the file .* in the model") as caught:
        import_stage(make_context(), str(path), model="torchvision:mobilenet_v2", match="position")
    assert caught.value.message.count("[") == 2


@pytest.mark.parametrize(
    ("wrap", "note"),
    [
        (lambda s: s, ""),
        (lambda s: {"state_dict": s, "epoch": 3, "optimizer": {"lr": 1.0}}, "took the entry 'state_dict'"),
        (lambda s: {"model": {"state_dict": s}}, "took the entry 'model'"),
        (lambda s: {f"module.{k}": v for k, v in s.items()}, "took the prefix 'module.' off"),
        (lambda s: {"model": {f"module._orig_mod.{k}": v for k, v in s.items()}}, "took the prefix '_orig_mod.' off"),
        (lambda s: {k: v.bfloat16() if v.is_floating_point() else v for k, v in s.items()}, "widened bfloat16"),
        (lambda s: {k: v for k, v in s.items() if "num_batches" not in k}, "num_batches_tracked are not in the file"),
    ],
)
@pytest.mark.parametrize("match", ["name", "position"])
def test_state_dicts_as_people_save_them(
    tmp_path: Path, make_context: Callable[..., StageContext], wrap: Callable[..., Any], note: str, match: Any
) -> None:
    if "prefix" in note and match == "position":
        note = ""  # by position names do not matter
    model = rescnn()
    path = tmp_path / "w.pth"
    torch.save(wrap(model.state_dict()), path)
    context = make_context(**WITH_DATA)
    found = import_stage(context, str(path), model="bmctl:rescnn", match=match)
    assert note in context.emit.text  # type: ignore[attr-defined]
    again = package.load_model(found)
    for key, tensor in model.state_dict().items():
        wanted = tensor.bfloat16().float() if note.startswith("widened") and tensor.is_floating_point() else tensor
        assert torch.equal(again.state_dict()[key], wanted), key


def test_safetensors_and_the_recipe_s_model(tmp_path: Path, make_context: Callable[..., StageContext]) -> None:
    save_file(rescnn().state_dict(), tmp_path / "w.safetensors")
    context = make_context(model={"name": "bmctl:rescnn", "args": {"width": 32}}, **WITH_DATA)
    found = import_stage(context, str(tmp_path / "w.safetensors"))
    manifest = found.manifest
    assert manifest.model is not None
    assert manifest.model.args == {"width": 32}
    assert len(manifest.class_names) == 10
    assert not manifest.class_names[0].startswith("class_")  # the data's own
    assert manifest.task is not None
    assert manifest.data_fingerprint
    val = manifest.metrics["val"]
    assert val["metric"] == "accuracy"
    assert 0 <= val["low"] <= val["value"] <= val["high"] <= 1
    assert "bmctl:rescnn" in (found.path / "recipe.yaml").read_text()


def test_the_same_import_is_not_done_twice(tmp_path: Path, make_context: Callable[..., StageContext]) -> None:
    path = tmp_path / "w.safetensors"
    save_file(rescnn().state_dict(), path)
    arguments = {"model": "bmctl:rescnn"}
    first = import_stage(make_context(**WITH_DATA), str(path), **arguments)
    identity = first.hash
    context = make_context(**WITH_DATA)
    assert import_stage(context, str(path), **arguments).hash == identity
    assert [event["event"] for event in context.emit] == ["skip"]  # type: ignore[attr-defined]
    changed = {key: value + 1 for key, value in rescnn().state_dict().items()}
    save_file(changed, path)
    with pytest.raises(ResourceError, match="starts with") as caught:
        import_stage(make_context(**WITH_DATA), str(path), **arguments)
    assert "--overwrite" in caught.value.hint
    assert package.open_package(first.path).hash == identity
    again = import_stage(make_context(overwrite=True, **WITH_DATA), str(path), **arguments)
    assert again.hash != identity


def test_the_classes_are_counted_in_the_file(tmp_path: Path, make_context: Callable[..., StageContext]) -> None:
    torch.manual_seed(0)
    spec = image_spec(TINY, num_classes=7, channels=3, size=(64, 64))
    torch.save(models.build(spec).state_dict(), tmp_path / "w.pt")
    for match in ("name", "position"):
        found = import_stage(make_context(match), str(tmp_path / "w.pt"), model=TINY, match=match)  # type: ignore[arg-type]
        assert found.manifest.class_names == tuple(f"class_{k}" for k in range(7))
        assert found.manifest.task is None
        assert "val" not in found.manifest.metrics


def test_the_publisher_s_names_for_its_number_of_classes(
    tmp_path: Path, make_context: Callable[..., StageContext]
) -> None:
    spec = image_spec(TINY, num_classes=1000, channels=3, size=(224, 224))
    torch.save(models.build(spec).state_dict(), tmp_path / "w.pt")
    found = import_stage(make_context(), str(tmp_path / "w.pt"), model=TINY)
    assert found.manifest.class_names[0] == "tench"
    assert found.manifest.preprocess is not None
    assert tuple(found.manifest.preprocess.mean) == (0.485, 0.456, 0.406)


def test_another_number_of_classes_than_the_data_s(tmp_path: Path, make_context: Callable[..., StageContext]) -> None:
    torch.save(rescnn(7).state_dict(), tmp_path / "w.pt")
    context = make_context(**WITH_DATA)
    with pytest.raises(DataError, match=r"7 classes apart; the recipe's data has 10") as caught:
        import_stage(context, str(tmp_path / "w.pt"), model="bmctl:rescnn")
    assert caught.value.exit_code == 4
    assert "pretrained: true" in caught.value.hint
    assert package.list_packages(context.run) == []


class Malicious:
    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.sentinel,))


@pytest.mark.parametrize("name", ["w.pt", "w.pth", "w.bin", "w.ckpt", "w.safetensors"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_pickle_is_refused_and_does_not_run(
    tmp_path: Path, make_context: Callable[..., StageContext], name: str, zipped: bool
) -> None:
    sentinel = tmp_path / "ran"
    loaded = {**rescnn().state_dict(), "evil": Malicious(sentinel)}
    torch.save(loaded, tmp_path / name, _use_new_zipfile_serialization=zipped)
    with pytest.raises(PackageError) as caught:
        import_stage(make_context(**WITH_DATA), str(tmp_path / name), model="bmctl:rescnn")
    assert caught.value.exit_code == 5
    assert ("would run code" if name != "w.safetensors" else "pickle") in message_of(caught)
    assert not sentinel.exists()
    torch.load((tmp_path / name).rename(tmp_path / "w.pkl"), weights_only=False)  # it would have
    assert sentinel.exists()


def _nan(state: dict[str, torch.Tensor]) -> Any:
    state["head.bias"][2] = float("nan")
    return state


def _renamed(state: dict[str, torch.Tensor]) -> Any:
    return {key.replace("stem", "trunk"): value for key, value in state.items()}


def _swapped(state: dict[str, torch.Tensor]) -> Any:
    """Equal shapes in another order: weight and bias of a norm layer change places."""
    names = list(state)
    at = names.index("stem.1.weight")
    names[at], names[at + 1] = names[at + 1], names[at]
    return {name: state[name] for name in names}


BAD: dict[str, tuple[Any, str, str]] = {
    "nan": (_nan, "name", "head.bias.*nan or inf"),
    "renamed": (_renamed, "name", r"5 of the model's .*stem\.0\.weight.*trunk\.0\.weight.*--match position"),
    "missing": (lambda s: {k: v for k, v in s.items() if k != "head.bias"}, "name", r"head\.bias"),
    "extra": (lambda s: {**s, "more": torch.zeros(1)}, "name", "1 of the file's .* not in the model .more"),
    "shape": (lambda s: {**s, "stem.0.weight": torch.zeros(32, 1, 5, 5)}, "name", r"\[32, 1, 5, 5\].*\[32, 1, 3, 3\]"),
    "shape by position": (
        lambda s: {**s, "stem.0.weight": torch.zeros(32, 1, 5, 5)},
        "position",
        r"tensor 0, in the file stem\.0\.weight \[32, 1, 5, 5\], in the model stem\.0\.weight \[32, 1, 3, 3\]",
    ),
    "order": (_swapped, "position", r"tensor 1, in the file stem\.1\.bias \[32\], in the model stem\.1\.weight"),
    "short": (lambda s: dict(list(s.items())[:-1]), "position", r"the model goes on with head\.bias"),
    "long": (lambda s: {**s, "more": torch.zeros(1)}, "position", "the file goes on with more"),
    "some counters": (
        lambda s: {k: v for k, v in s.items() if k != "stem.1.num_batches_tracked"},
        "position",
        "num_batches_tracked, the model",
    ),
    "double": (lambda s: {k: v.double() for k, v in s.items()}, "name", "float64, the model has torch.float32"),
    "integers": (lambda s: {k: v.long() for k, v in s.items()}, "name", "int64, the model has torch.float32"),
    "empty": (lambda s: {}, "name", "not a state dict"),
    "a list": (lambda s: list(s.values()), "name", "holds a list"),
    "not only tensors": (lambda s: {**s, "lr": 0.1}, "name", "lr is no tensor"),
    "an unknown wrapper": (lambda s: {"stuff": s}, "name", "stuff is no tensor"),
}


@pytest.mark.parametrize("case", BAD)
def test_state_dicts_that_do_not_fit(tmp_path: Path, make_context: Callable[..., StageContext], case: str) -> None:
    change, match, pattern = BAD[case]
    torch.save(change(rescnn().state_dict()), tmp_path / "w.pt")
    context = make_context(**WITH_DATA)
    with pytest.raises(PackageError) as caught:
        import_stage(context, str(tmp_path / "w.pt"), model="bmctl:rescnn", match=match)  # type: ignore[arg-type]
    assert caught.value.exit_code == 5
    assert re.search(pattern, message_of(caught)), message_of(caught)
    assert package.list_packages(context.run) == []


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        (b"", "cannot be read|not a safetensors"),
        (b"garbage" * 100, "cannot be read|not a safetensors|refused"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
        (b"<!doctype html><html>", "web page"),
    ],
)
def test_files_that_are_no_weights(
    tmp_path: Path, make_context: Callable[..., StageContext], name: str, content: bytes, pattern: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PackageError, match=pattern):
        import_stage(make_context(**WITH_DATA), str(tmp_path / name), model="bmctl:rescnn")


def test_a_truncated_file(tmp_path: Path, make_context: Callable[..., StageContext]) -> None:
    torch.save(rescnn().state_dict(), tmp_path / "w.pt")
    os.truncate(tmp_path / "w.pt", 50_000)
    with pytest.raises(PackageError, match="cannot be read"):
        import_stage(make_context(**WITH_DATA), str(tmp_path / "w.pt"), model="bmctl:rescnn")


def test_what_to_say_and_what_not(tmp_path: Path, make_context: Callable[..., StageContext]) -> None:
    torch.save(rescnn().state_dict(), tmp_path / "w.pt")
    (tmp_path / "w.txt").write_text("x")
    cases: list[tuple[type[BmctlError], str, str | None, str]] = [
        (UsageError, str(tmp_path / "w.pt"), None, "--model timm:NAME"),
        (UsageError, "timm:resnet18", "timm:resnet18", "leave it out"),
        (UsageError, str(tmp_path / "w.onnx"), "timm:resnet18", "leave it out"),
        (UsageError, str(tmp_path / "w.pt"), "bmctl:rescnn", "--recipe"),  # of which size, without data?
        (RecipeError, str(tmp_path / "w.pt"), "timm:resnet1888", "timm:resnet18"),
        (RecipeError, "timm:resnet1888", None, "timm:resnet18"),
        (RecipeError, "bmctl:rescnn", None, "bmctl train"),
        (PackageError, str(tmp_path / "nowhere.pt"), "bmctl:rescnn", "nothing at"),
        (PackageError, "tmm:resnet18", None, "bmctl import timm:NAME"),
        (PackageError, str(tmp_path), None, "directory"),
        (PackageError, str(tmp_path / "w.txt"), "bmctl:rescnn", ".safetensors"),
    ]
    for kind, source, model, text in cases:
        with pytest.raises(kind) as caught:
            import_stage(make_context(), source, model=model)
        assert text in message_of(caught), message_of(caught)


def test_prefixes_are_put_on_as_well() -> None:
    found = {"vit.weight": torch.zeros(1), "vit.bias": torch.zeros(1)}
    wanted = {f"model.{name}": tensor for name, tensor in found.items()}
    state, notes = statedict.align_prefix(found, wanted)
    assert list(state) == list(wanted)
    assert notes == ["put the prefix 'model.' before every name"]


# -- ONNX files -------------------------------------------------------------------------------------


def write_graph(
    path: Path,
    *,
    batch: int | str = "n",
    size: tuple[Any, Any] = (28, 28),
    num_classes: int = 10,
    channels: int = 1,
    external: bool = False,
) -> None:
    """Mean over pixels, then a linear layer."""
    w_CK = np.random.default_rng(0).standard_normal((channels, num_classes)).astype(np.float32)
    nodes = [
        helper.make_node("ReduceMean", ["x", "axes"], ["m"], keepdims=0),
        helper.make_node("MatMul", ["m", "w"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, channels, *size])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, num_classes])],
        [numpy_helper.from_array(np.array([2, 3]), "axes"), numpy_helper.from_array(w_CK, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, path, save_as_external_data=external, location="weights.bin", size_threshold=0)


def test_an_onnx_file_becomes_a_frozen_package(tmp_path: Path, make_context: Callable[..., StageContext]) -> None:
    write_graph(tmp_path / "m.onnx")
    context = make_context()
    found = package.open_package(import_stage(context, str(tmp_path / "m.onnx")).path)
    manifest = found.manifest
    assert manifest.frozen
    assert manifest.model is None
    assert found.graphs[package.PART].read_bytes() == (tmp_path / "m.onnx").read_bytes()
    signature = manifest.parts[package.PART]
    assert [(spec.name, spec.shape, spec.dtype) for spec in signature.inputs] == [
        ("x", ("batch", 1, 28, 28), "float32")
    ]
    assert [(spec.name, spec.shape, spec.role) for spec in signature.outputs] == [("y", ("batch", 10), "scores")]
    assert manifest.facts is None
    assert manifest.task is None
    assert "the graph's batch is free" in manifest.notes
    assert any("only parity, latency and size" in note for note in manifest.notes)
    with pytest.raises(UnsupportedError):
        load_model(found)
    again = make_context()
    assert import_stage(again, str(tmp_path / "m.onnx")).hash == found.hash


def test_a_fixed_batch_is_recorded(tmp_path: Path, make_context: Callable[..., StageContext]) -> None:
    write_graph(tmp_path / "m.onnx", batch=3)
    manifest = import_stage(make_context(**WITH_DATA), str(tmp_path / "m.onnx")).manifest
    assert manifest.parts[package.PART].inputs[0].shape == (3, 1, 28, 28)
    assert "the graph's batch is fixed (x: 3)" in manifest.notes
    assert manifest.metrics["val"]["num_samples"] == 100


def test_external_data_comes_along(tmp_path: Path, make_context: Callable[..., StageContext]) -> None:
    (tmp_path / "here").mkdir()
    write_graph(tmp_path / "here" / "m.onnx", external=True)
    found = package.open_package(import_stage(make_context(), str(tmp_path / "here" / "m.onnx")).path)
    assert (found.graphs[package.PART].parent / "weights.bin").read_bytes() == (
        tmp_path / "here" / "weights.bin"
    ).read_bytes()
    onnx.checker.check_model(str(found.graphs[package.PART]))


def test_an_onnx_file_is_evaluated_on_data(tmp_path: Path, make_context: Callable[..., StageContext]) -> None:
    write_graph(tmp_path / "m.onnx", size=("h", "w"))
    manifest = import_stage(make_context(**WITH_DATA), str(tmp_path / "m.onnx")).manifest
    assert manifest.input is not None
    assert tuple(manifest.input.size) == (28, 28)
    assert manifest.metrics["val"]["metric"] == "accuracy"
    assert manifest.data_fingerprint
    assert manifest.facts is not None
    assert not manifest.facts["class_names"][0].startswith("class_")


@pytest.mark.parametrize(
    ("graph", "pattern"),
    [
        ({"num_classes": 7}, r"gives 'y' float32 \[batch, 7\]; .* needs .* \[batch, 10\]"),
        ({"channels": 2}, r"takes 'x' float32 \[batch, 2, 28, 28\]; .* gives .* \[batch, 1, 28, 28\]"),
    ],
)
def test_an_onnx_file_that_does_not_fit_the_data(
    tmp_path: Path, make_context: Callable[..., StageContext], graph: dict[str, Any], pattern: str
) -> None:
    write_graph(tmp_path / "m.onnx", **graph)
    with pytest.raises(DataError, match=pattern):
        import_stage(make_context(**WITH_DATA), str(tmp_path / "m.onnx"))


def test_an_onnx_file_at_another_size_than_the_recipe(
    tmp_path: Path, make_context: Callable[..., StageContext]
) -> None:
    write_graph(tmp_path / "m.onnx", size=(32, 32))
    manifest = import_stage(make_context("a", **WITH_DATA), str(tmp_path / "m.onnx")).manifest
    assert manifest.input is not None
    assert tuple(manifest.input.size) == (32, 32)
    data = {**DATA, "input": {"size": 28}}
    with pytest.raises(DataError, match=r"takes 'x' float32 \[batch, 1, 32, 32\]; .* gives .*1, 28, 28\]"):
        import_stage(make_context("b", **{**WITH_DATA, "data": data}), str(tmp_path / "m.onnx"))


@pytest.mark.parametrize("content", [b"", b"garbage", b"version https://git-lfs.github.com/spec/v1\n"])
def test_what_is_no_onnx_file(tmp_path: Path, make_context: Callable[..., StageContext], content: bytes) -> None:
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(PackageError) as caught:
        import_stage(make_context(), str(tmp_path / "m.onnx"))
    assert caught.value.exit_code == 5


# -- published models, over a real hub client -------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """What huggingface_hub asks of a server: /OWNER/NAME/resolve/REVISION/FILE."""

    root: Path
    asked: list[str]

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        self.asked.append(self.path)
        owner, name, *rest = self.path.strip("/").split("/")
        path = self.root / owner / name / "/".join(rest[2:])
        if not (self.root / owner / name).is_dir() or rest[:1] != ["resolve"]:
            return self._fail("RepoNotFound")
        if not path.is_file():
            return self._fail("EntryNotFound")
        content = path.read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{len(content):040x}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.end_headers()
        if body:
            self.wfile.write(content)
        return None

    def _fail(self, code: str) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, Path, list[str]]]:
    asked: list[str] = []
    handler = type("Handler", (Hub,), {"root": tmp_path / "hub", "asked": asked})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", tmp_path / "hub", asked
    server.shutdown()
    server.server_close()


def in_new_process(code: str, *, home: Path, endpoint: str, **environment: str) -> list[dict[str, Any]]:
    """Run imports where huggingface_hub reads its environment anew; each gives one line of JSON."""
    header = """
    import json, sys, torch, importlib.util
    from pathlib import Path
    from bmctl.engine.context import StageContext
    from bmctl.engine.intake.importing import import_stage
    from bmctl.engine.parallel import Group
    from bmctl.processes.signals import Stop
    from bmctl.errors import BmctlError
    from bmctl.package import load_model
    from bmctl.recipe import Recipe

    def attempt(source, run):
        run = Path(run); run.mkdir(parents=True, exist_ok=True)
        group = Group(rank=0, local_rank=0, world=1, device=torch.device("cpu"), threads=1)
        context = StageContext(run=run, recipe=Recipe(name="x"), group=group, stop=Stop(), emit=lambda event: None)
        try:
            package = import_stage(context, source)
        except BmctlError as error:
            print(json.dumps({"code": error.exit_code, "message": error.message, "hint": error.hint}))
            return
        manifest = package.manifest
        total = sum(t.double().abs().sum().item() for t in load_model(package).state_dict().values())
        print(json.dumps({"code": 0, "classes": manifest.class_names[:3], "num_classes": len(manifest.class_names),
                          "mean": manifest.preprocess.mean, "size": manifest.preprocess.size, "total": total}))
    """
    variables = {
        **{k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TORCH_"))},
        "HF_HOME": str(home / "hf"),
        "TORCH_HOME": str(home / "torch"),
        "HF_ENDPOINT": endpoint,
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(header) + textwrap.dedent(code)],
        env=variables,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def total_of(state: dict[str, torch.Tensor]) -> float:
    return sum(tensor.double().abs().sum().item() for tensor in state.values())


def test_a_published_timm_model(hub: tuple[str, Path, list[str]], tmp_path: Path) -> None:
    endpoint, root, asked = hub
    torch.manual_seed(5)
    name = "timm:test_efficientnet.r160_in1k"
    state = models.build(image_spec(name, num_classes=1000, channels=3, size=(160, 160))).state_dict()
    (root / "timm" / "test_efficientnet.r160_in1k").mkdir(parents=True)
    save_file(state, root / "timm" / "test_efficientnet.r160_in1k" / "model.safetensors")
    code = f"attempt({name!r}, {str(tmp_path / 'a')!r})"
    (found,) = in_new_process(code, home=tmp_path, endpoint=endpoint)
    assert found["code"] == 0, found
    assert found["total"] == pytest.approx(total_of(state), rel=1e-12)
    assert found["num_classes"] == 1000
    assert found["classes"][0].startswith("tench")
    assert found["size"] == [160, 160]
    assert asked
    asked.clear()
    code = f"""
    attempt({name!r}, {str(tmp_path / "b")!r})
    attempt("timm:test_resnet.r160_in1k", {str(tmp_path / "c")!r})
    attempt("torchvision:resnet18", {str(tmp_path / "d")!r})
    """
    cached, absent, torchvision = in_new_process(code, home=tmp_path, endpoint=endpoint, HF_HUB_OFFLINE="1")
    assert cached == found
    assert absent["code"] == torchvision["code"] == 6
    assert "HF_HUB_OFFLINE" in absent["message"]
    assert "HF_HUB_OFFLINE" in torchvision["message"]
    assert asked == []


def test_a_published_transformers_model(
    hub: tuple[str, Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    endpoint, root, asked = hub
    repository = root / "someone" / "tiny-vit"
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=32,
        patch_size=16,
        id2label={0: "cat", 1: "dog", 2: "unicorn"},
        label2id={"cat": 0, "dog": 1, "unicorn": 2},
    )
    torch.manual_seed(6)
    model = transformers.ViTForImageClassification(config)
    model.save_pretrained(repository)
    processor = {"size": {"height": 32, "width": 32}, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.5, 0.5]}
    (repository / "preprocessor_config.json").write_text(json.dumps(processor))
    code = f"""
    attempt("transformers:someone/tiny-vit", {str(tmp_path / "a")!r})
    attempt("transformers:someone/nothing", {str(tmp_path / "b")!r})
    """
    found, absent = in_new_process(code, home=tmp_path, endpoint=endpoint)
    assert found["code"] == 0, found
    assert found["classes"] == ["cat", "dog", "unicorn"]
    assert found["mean"] == [0.1, 0.2, 0.3]
    assert found["total"] == pytest.approx(total_of(model.state_dict()), rel=1e-12)
    assert absent["code"] == 6
    assert "no such model" in absent["message"]
    # Once imported, the package needs neither the hub nor the cache.
    asked.clear()
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("something reached for the network"))
    again = package.load_model(package.find_package(tmp_path / "a"))
    assert total_of(again.state_dict()) == pytest.approx(found["total"], rel=1e-12)
    assert asked == []


def test_an_unreachable_hub(tmp_path: Path) -> None:
    code = f"""
    import time
    time.sleep = lambda seconds: None  # the client's pauses between five attempts
    attempt("timm:test_resnet.r160_in1k", {str(tmp_path / "a")!r})
    """
    (found,) = in_new_process(code, home=tmp_path, endpoint="http://127.0.0.1:9")
    assert found["code"] == 6
    assert "cannot be downloaded" in found["message"]
    assert "bmctl import FILE" in found["hint"]
