"""Packages: what was saved comes back bit for bit, and nothing else is ever taken for a package."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.methods.conftest import context_of
from tests.specs import image_spec, manifest_of, parts_of
from torch import nn

from bmctl import __version__, models, package, store, weights
from bmctl.errors import BmctlError, DivergedError, PackageError, ResourceError, UnsupportedError
from bmctl.inputs import Resolved
from bmctl.inputs.image import Spec
from bmctl.methods import magnitude, structured, svd
from bmctl.models import ModelSpec
from bmctl.package import GraphFile, Manifest, ModelPackage, Structure
from bmctl.restore import load_model
from bmctl.schema import Span

RECIPE = "name: test\n"
SPECS = {
    "rescnn": image_spec("bmctl:rescnn"),
    "mlp": image_spec("bmctl:mlp"),
    "resnet18": image_spec("torchvision:resnet18", num_classes=7, channels=3, size=(64, 64)),
    "vit": image_spec("timm:vit_tiny_patch16_224", num_classes=5, channels=1, size=(32, 48)),
}


def lived_in(spec: ModelSpec) -> nn.Module:
    """Random weights, with batch statistics that are not those of a fresh model."""
    torch.manual_seed(1)
    model = models.build(spec).train()
    with torch.no_grad():
        for _ in range(2):
            model(torch.randn(4, *spec.given[0].shape[1:]) + 1)
    return model.eval()


@pytest.fixture
def saved(tmp_path: Path) -> ModelPackage:
    spec = SPECS["mlp"]
    return package.save_package(
        tmp_path / "run" / "packages" / "00-train", manifest=manifest_of(spec), recipe_yaml=RECIPE, model=lived_in(spec)
    )


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest, as somebody would who knows what he does: hashes are made to fit."""
    fields = json.loads((path / "manifest.json").read_text())
    change(fields)
    fields["files"] = {name: record.model_dump() for name, record in store.records(path).items()}
    (path / "manifest.json").write_text(json.dumps(fields))


# -- round trips ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPECS)
def test_a_model_comes_back_bit_for_bit(tmp_path: Path, name: str) -> None:
    spec = SPECS[name]
    model = lived_in(spec)
    written = package.save_package(tmp_path / "p", manifest=manifest_of(spec), recipe_yaml=RECIPE, model=model)
    again = load_model(package.open_package(tmp_path / "p"))
    assert not again.training
    old, new = model.state_dict(), again.state_dict()
    assert list(old) == list(new)
    assert all(old[key].dtype == new[key].dtype and torch.equal(old[key], new[key]) for key in old)
    x = torch.randn(3, *spec.given[0].shape[1:])
    with torch.inference_mode():
        assert torch.equal(model(x), again(x))
    assert sorted(path.name for path in (tmp_path / "p").iterdir()) == [
        "manifest.json",
        "recipe.yaml",
        "weights.safetensors",
    ]
    assert written.manifest == package.open_package(tmp_path / "p").manifest
    assert written.manifest.metrics["size_bytes"] == written.weights.stat().st_size


def test_batch_statistics_are_saved(tmp_path: Path) -> None:
    spec = SPECS["rescnn"]
    model = lived_in(spec)
    written = package.save_package(tmp_path / "p", manifest=manifest_of(spec), recipe_yaml=RECIPE, model=model)
    stored = load_file(written.weights)
    assert stored["stem.1.num_batches_tracked"] == 2
    assert stored["stem.1.running_mean"].abs().sum() > 0


def test_channels_last_and_views_are_stored_plainly(tmp_path: Path) -> None:
    spec = SPECS["rescnn"]
    model = lived_in(spec).to(memory_format=torch.channels_last)
    big = torch.randn(1000, 128)
    model.head.weight = nn.Parameter(big[5:15])
    written = package.save_package(tmp_path / "p", manifest=manifest_of(spec), recipe_yaml=RECIPE, model=model)
    assert written.weights.stat().st_size < 1_400_000
    again = load_model(written)
    assert torch.equal(again.head.weight, big[5:15])
    assert torch.equal(again.stem[0].weight, model.stem[0].weight)


@pytest.mark.parametrize("chain", [["magnitude"], ["structured"], ["svd"], ["structured", "svd"], ["svd", "magnitude"]])
def test_a_compressed_model_comes_back_bit_for_bit(tmp_path: Path, chain: list[str]) -> None:
    spec = SPECS["rescnn"]
    model = lived_in(spec)
    x = torch.randn(2, 1, 28, 28)
    configs = {
        "magnitude": (magnitude, magnitude.Config(sparsity=0.5)),
        "structured": (structured, structured.Config(ratio=0.5)),
        "svd": (svd, svd.Config(ratio=0.5)),
    }
    history = []
    for name in chain:
        method, config = configs[name]
        meta = method.apply(model, config, context_of({"input": x}))
        history.append(Structure(step=config.model_dump(mode="json"), meta=meta))
    model.eval()
    manifest = manifest_of(spec, history=tuple(history))
    package.save_package(tmp_path / "p", manifest=manifest, recipe_yaml=RECIPE, model=model)
    again = load_model(package.open_package(tmp_path / "p"))
    with torch.inference_mode():
        assert torch.equal(model(x), again(x))
    assert {name: tuple(t.shape) for name, t in model.state_dict().items()} == {
        name: tuple(t.shape) for name, t in again.state_dict().items()
    }


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False)
        self.second = nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("empty", torch.zeros(0))
        self.register_buffer("also_empty", torch.zeros(0))


def test_tied_weights_are_stored_once_and_tied_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, path = Tied(), tmp_path / "w.safetensors"
    aliases = weights.save_weights(model, path)
    assert aliases == {"second.weight": "first.weight"}
    assert set(load_file(path)) == {"first.weight", "empty", "also_empty"}
    again = Tied()
    weights.load_weights(again, path, aliases=aliases)
    assert torch.equal(again.second.weight, model.first.weight)
    with pytest.raises(PackageError, match="share memory"):
        weights.load_weights(Tied(), path, aliases={})


def test_two_saves_of_one_model_are_one_package(tmp_path: Path) -> None:
    """The hash stands for the content: nothing of when or where is in it."""
    spec = SPECS["mlp"]
    model = lived_in(spec)
    first, second = (
        package.save_package(tmp_path / name, manifest=manifest_of(spec), recipe_yaml=RECIPE, model=model)
        for name in ("a", "b")
    )
    assert first.hash == second.hash
    assert first.hash == hashlib.sha256((tmp_path / "a" / "manifest.json").read_bytes()).hexdigest()


def test_every_field_comes_back(tmp_path: Path) -> None:
    spec = SPECS["mlp"]
    manifest = manifest_of(
        spec,
        parent="a" * 64,
        original="b" * 64,
        axes={"tokens": Span(min=0, opt=3, max=9)},
        input=Spec(size=(28, 28), channels=1, mean=(0.1 + 0.2,), std=(1 / 3,), crop=0.875),
        task={"kind": "classify"},
        facts={"kind": "classify", "class_names": ["a", "ü\n"]},
        metrics={"val": {"value": 0.1 + 0.2, "low": 1e-300}},
        calibration={"split": "train"},
        notes=("one",),
    )
    files = {"tokenizer.json": b"{}", "tables/colour.json": b'["red"]'}
    package.save_package(tmp_path / "p", manifest=manifest, recipe_yaml=RECIPE, model=lived_in(spec), files=files)
    again = package.open_package(tmp_path / "p")
    found = again.manifest
    filled_in = {"versions", "files", "metrics"}
    assert found.model_dump(exclude=filled_in) == manifest.model_dump(exclude=filled_in)
    assert found.metrics["val"] == manifest.metrics["val"]
    assert found.bmctl == __version__
    assert found.versions["torch"] == torch.__version__.partition("+")[0]
    assert (tmp_path / "p" / "recipe.yaml").read_text() == RECIPE
    assert again.given == Resolved(manifest.input, files)


def test_a_derived_manifest_knows_where_it_comes_from(saved: ModelPackage, tmp_path: Path) -> None:
    step = Structure(step={"method": "magnitude"}, meta={})
    first = package.derive(saved, stage="magnitude", key="k1", structure=step, metrics={"num_params": 3})
    assert (first.parent, first.original) == (saved.hash, saved.hash)
    model = load_model(saved)
    second = package.save_package(tmp_path / "p1", manifest=first, recipe_yaml=RECIPE, model=model)
    third = package.derive(second, stage="magnitude", key="k2", structure=step, metrics={})
    assert (third.parent, third.original) == (second.hash, saved.hash)
    assert len(third.history) == 2
    assert third.model == saved.manifest.model


# -- finding ----------------------------------------------------------------------------------------


def test_a_run_means_its_newest_package(saved: ModelPackage) -> None:
    run = saved.path.parents[1]
    assert package.find_package(run).path == saved.path
    assert package.find_package(str(saved.path)).path == saved.path
    model = load_model(saved)
    for name in ("02-svd", "10-ptq", "9-odd"):
        manifest = saved.manifest.model_copy(update={"stage": name})
        package.save_package(run / "packages" / name, manifest=manifest, recipe_yaml=RECIPE, model=model)
    (run / "packages" / ".11-x.tmp-1-00000000").mkdir()
    (run / "packages" / "notes").mkdir()
    (run / "packages" / "12-file").write_text("")
    assert package.find_package(run).manifest.stage == "10-ptq"
    assert [path.name for path in package.list_packages(run)] == ["00-train", "02-svd", "9-odd", "10-ptq"]


def test_nothing_to_find_says_what_to_do(tmp_path: Path) -> None:
    cases = {
        "nowhere": (lambda p: None, "no package or run at", "ls"),
        "file.onnx": (lambda p: p.write_text("x"), "is a file", "bmctl import"),
        "empty": (lambda p: p.mkdir(), "neither a package nor a run", "ls"),
        "run": (lambda p: (p / "packages").mkdir(parents=True), "no package yet", "bmctl train"),
    }
    for name, (make, message, hint) in cases.items():
        make(tmp_path / name)
        with pytest.raises(PackageError, match=message) as caught:
            package.find_package(tmp_path / name)
        assert caught.value.exit_code == 5
        assert hint in caught.value.hint


def test_a_run_is_known_by_its_manifest_too(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"format": 1, "kind": "run"}')
    with pytest.raises(PackageError, match="no package yet"):
        package.find_package(tmp_path)


def test_a_package_without_weights_is_not_taken_for_a_run(saved: ModelPackage) -> None:
    saved.weights.unlink()
    with pytest.raises(PackageError, match=r"weights\.safetensors is missing"):
        package.find_package(saved.path)


def test_a_package_is_adopted_by_another_run(saved: ModelPackage, tmp_path: Path) -> None:
    other = tmp_path / "other"
    copy = package.adopt(saved, into=other)
    assert copy.path == other / "packages" / "00-train"
    assert copy.hash == saved.hash
    package.open_package(copy.path)
    assert package.adopt(saved, into=other).path == copy.path
    third = package.save_package(
        tmp_path / "third", manifest=manifest_of(SPECS["mlp"]), recipe_yaml="other", model=load_model(saved)
    )
    with pytest.raises(ResourceError, match="starts with another package"):
        package.adopt(third, into=other)


# -- frozen packages --------------------------------------------------------------------------------


def graph_file(folder: Path, *, data: str) -> GraphFile:
    """An ONNX file with a data file beside it, as far as packages are concerned."""
    (folder / data).parent.mkdir(parents=True)
    (folder / data).write_bytes(b"weights")
    (folder / "some.onnx").write_bytes(folder.name.encode())
    return GraphFile(folder / "some.onnx", data=[data])


def two_parts(*names: str) -> Manifest:
    (part,) = parts_of(SPECS["mlp"]).values()
    return manifest_of(SPECS["mlp"], parent="c" * 64, parts=dict.fromkeys(names, part))


def test_a_frozen_package_is_its_graphs(tmp_path: Path) -> None:
    manifest = two_parts("encoder", "decoder")
    graphs = {part: graph_file(tmp_path / part, data=f"data/{part}.bin") for part in manifest.parts}
    written = package.save_package(tmp_path / "p", manifest=manifest, recipe_yaml=RECIPE, graphs=graphs)
    found = package.open_package(tmp_path / "p")
    assert found.manifest.frozen
    assert {part: path.read_bytes() for part, path in found.graphs.items()} == {
        "encoder": b"encoder",
        "decoder": b"decoder",
    }
    assert all((found.graphs[part].parent / "data" / f"{part}.bin").read_bytes() == b"weights" for part in graphs)
    assert written.hash == found.hash
    assert found.manifest.metrics["size_bytes"] == 2 * len(b"encoderweights")
    with pytest.raises(UnsupportedError, match="frozen") as caught:
        load_model(found)
    assert caught.value.exit_code == 11
    assert "cccccccccccc" in caught.value.hint
    assert "its parent" in caught.value.hint


def test_data_files_of_two_parts_do_not_overwrite_each_other(tmp_path: Path) -> None:
    manifest = two_parts("encoder", "decoder")
    graphs = {part: graph_file(tmp_path / part, data="data/w.bin") for part in manifest.parts}
    with pytest.raises(ResourceError, match=r"two parts of the package have a data file named data/w\.bin"):
        package.save_package(tmp_path / "p", manifest=manifest, recipe_yaml=RECIPE, graphs=graphs)
    assert not (tmp_path / "p").exists()


def test_a_graph_that_was_lost_is_missed(tmp_path: Path) -> None:
    manifest = two_parts("encoder", "decoder")
    graphs = {"encoder": graph_file(tmp_path / "encoder", data="data/w.bin")}
    package.save_package(tmp_path / "p", manifest=manifest, recipe_yaml=RECIPE, graphs=graphs)
    with pytest.raises(PackageError, match=r"does not record graphs/decoder\.onnx"):
        package.open_package(tmp_path / "p")


def test_a_package_is_a_model_or_graphs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a model or graphs"):
        package.save_package(tmp_path / "p", manifest=manifest_of(None), recipe_yaml=RECIPE)
    assert list(tmp_path.iterdir()) == []


# -- refused ----------------------------------------------------------------------------------------


def flip(path: Path, *, at: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 1
    path.write_bytes(data)


FILES = ["recipe.yaml", "weights.safetensors", "manifest.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["gone", "cut", "flipped", "empty", "link", "lfs", "html"])
def test_each_file_tampered_with_is_refused(saved: ModelPackage, tmp_path: Path, name: str, how: str) -> None:
    path = saved.path / name
    if how == "gone":
        path.unlink()
    elif how == "cut":
        os.truncate(path, path.stat().st_size - 1 if name != "manifest.json" else 100)
    elif how == "flipped":
        flip(path, at=0.5 if name != "manifest.json" else 0.0)
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "link":
        path.symlink_to(path.rename(tmp_path / "moved"))
    elif how == "lfs":
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n")
    else:
        path.write_text("<!DOCTYPE html>\n<html>not found")
    with pytest.raises(PackageError, match=name.replace(".", r"\.")) as caught:
        package.open_package(saved.path)
    assert caught.value.exit_code == 5
    if how == "lfs":
        assert "git lfs pull" in caught.value.message
    if how == "html":
        assert "web page" in caught.value.message


def test_an_extra_file_is_refused(saved: ModelPackage) -> None:
    (saved.path / "setup.py").write_text("x")
    with pytest.raises(PackageError, match=r"setup\.py is not in its manifest"):
        package.open_package(saved.path)


EDITS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "newer": (lambda m: m.update(format=3), "has format 3, made by a newer bmctl; this one reads format 2"),
    "older": (
        lambda m: m.update(format=1, surprise=1),
        "has format 1, made by an older bmctl; this one reads format 2",
    ),
    "unknown key": (lambda m: m.update(surprise=1), "surprise"),
    "wrong type": (lambda m: m.update(notes="x"), "notes"),
    "no model": (lambda m: m.update(model=None), "does not say of which model"),
    "no parts": (lambda m: m.update(parts={}), "names no part"),
    "frozen": (lambda m: m.update(frozen=True), r"does not record graphs/model\.onnx"),
    "unknown model": (lambda m: m["model"].update(name="bmctl:nothing"), "no model 'bmctl:nothing'"),
    "model of nobody": (lambda m: m["model"].update(name="os:system"), "cannot be built|model"),
    "model arguments": (lambda m: m["model"].update(args={"hidden": [0]}), "cannot be built"),
    "other model": (lambda m: m["model"].update(args={"hidden": [100, 50]}), "does not fit"),
    "other number of classes": (
        lambda m: m["model"]["told"].update(num_classes=11),
        r"float32 \[10, 256\].*\[11, 256\]",
    ),
    "unknown step": (lambda m: m.update(history=[{"step": {"method": "os.system"}, "meta": {}}]), "os.system"),
    "no step": (lambda m: m.update(history=[{"step": {}, "meta": {}}]), "no module can go through"),
    "graph step": (lambda m: m.update(history=[{"step": {"method": "ptq"}, "meta": {}}]), "no module can go through"),
    "bad step": (
        lambda m: m.update(history=[{"step": {"method": "svd", "rank": -1}, "meta": {}}]),
        "cannot be replayed",
    ),
    "bad meta": (
        lambda m: m.update(history=[{"step": {"method": "svd", "rank": 2}, "meta": {"layers": {"nowhere": 2}}}]),
        "nowhere",
    ),
    "alias": (lambda m: m.update(aliases={"layers.1.weight": "layers.3.weight"}), "share memory"),
}


@pytest.mark.parametrize("case", EDITS)
def test_each_edited_manifest_is_refused(saved: ModelPackage, case: str) -> None:
    change, pattern = EDITS[case]
    edit(saved.path, change)
    with pytest.raises(PackageError, match=pattern) as caught:
        load_model(package.open_package(saved.path))
    assert caught.value.exit_code == 5


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../b", "a\\b"])
def test_names_in_a_manifest_do_not_escape(saved: ModelPackage, name: str) -> None:
    (saved.path.parent / "outside").write_text("x")
    fields = json.loads((saved.path / "manifest.json").read_text())
    fields["files"][name] = {"size_bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
    (saved.path / "manifest.json").write_text(json.dumps(fields))
    with pytest.raises(PackageError, match="cannot belong"):
        package.open_package(saved.path)


def _replace(saved: ModelPackage, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(saved.weights)
    change(tensors)
    save_file(tensors, saved.weights)
    edit(saved.path, lambda m: None)


SWAPS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "missing": (lambda t: t.pop("layers.1.bias"), r"layers\.1\.bias is missing"),
    "extra": (lambda t: t.update(evil=torch.zeros(1)), "evil is not in the model"),
    "shape": (
        lambda t: t.update({"layers.1.bias": torch.zeros(3)}),
        r"is float32 \[3\], the model has float32 \[512\]",
    ),
    "dtype": (lambda t: t.update({"layers.1.bias": torch.zeros(512).half()}), r"is float16 \[512\]"),
    "nan": (lambda t: t["layers.1.bias"].fill_(float("nan")), r"nan or inf in layers\.1\.bias"),
    "inf": (lambda t: t["layers.1.weight"][3].fill_(float("-inf")), r"nan or inf in layers\.1\.weight"),
}


@pytest.mark.parametrize("case", SWAPS)
def test_weights_that_do_not_fit_are_refused(saved: ModelPackage, case: str) -> None:
    change, pattern = SWAPS[case]
    _replace(saved, change)
    with pytest.raises(PackageError, match=pattern) as caught:
        load_model(package.open_package(saved.path))
    assert caught.value.exit_code == 5


class Malicious:
    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.sentinel,))


@pytest.mark.parametrize("form", ["zip", "legacy", "lfs", "html", "garbage", "huge header"])
def test_what_is_no_safetensors_is_not_loaded(saved: ModelPackage, tmp_path: Path, form: str) -> None:
    """A pickle under the name of safetensors, with a manifest that vouches for it, is still no safetensors."""
    sentinel = tmp_path / "ran"
    if form in ("zip", "legacy"):
        torch.save({"a": Malicious(sentinel)}, saved.weights, _use_new_zipfile_serialization=form == "zip")
        assert form == "legacy" or zipfile.is_zipfile(io.BytesIO(saved.weights.read_bytes()))
    else:
        content = {
            "lfs": b"version https://git-lfs.github.com/spec/v1\n",
            "html": b"<html>",
            "garbage": os.urandom(1000),
            "huge header": b"\xff" * 8 + b"{}",
        }
        saved.weights.write_bytes(content[form])
    edit(saved.path, lambda m: None)
    with pytest.raises(PackageError, match="not a safetensors file") as caught:
        load_model(package.open_package(saved.path))
    assert caught.value.exit_code == 5
    assert not sentinel.exists()
    expected = {"lfs": "git lfs pull", "html": "web page", "zip": "pickle", "legacy": "pickle"}
    assert expected.get(form, "") in caught.value.message


def test_the_malicious_pickle_would_run(tmp_path: Path) -> None:
    """The test above means something: loaded as a pickle, the file does run its code."""
    torch.save({"a": Malicious(tmp_path / "ran")}, tmp_path / "w.pt")
    torch.load(tmp_path / "w.pt", weights_only=False)
    assert (tmp_path / "ran").exists()


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    model = lived_in(SPECS["rescnn"])
    model.stem[1].running_var[3] = float("inf")
    with pytest.raises(DivergedError, match=r"stem\.1\.running_var") as caught:
        package.save_package(tmp_path / "p", manifest=manifest_of(SPECS["rescnn"]), recipe_yaml=RECIPE, model=model)
    assert caught.value.exit_code == 9
    assert list(tmp_path.iterdir()) == []


def test_an_existing_package_is_not_overwritten(saved: ModelPackage) -> None:
    model, before = load_model(saved), saved.hash
    with pytest.raises(ResourceError, match="exists"):
        package.save_package(saved.path, manifest=manifest_of(SPECS["mlp"]), recipe_yaml="new", model=model)
    assert package.open_package(saved.path).hash == before
    package.save_package(saved.path, manifest=manifest_of(SPECS["mlp"]), recipe_yaml="new", model=model, overwrite=True)
    assert package.open_package(saved.path).hash != before


def test_verification_can_be_left_out(saved: ModelPackage) -> None:
    flip(saved.weights, at=0.9)
    assert package.open_package(saved.path, verify=False).path == saved.path
    with pytest.raises(BmctlError):
        package.open_package(saved.path)


def test_importing_it_is_light() -> None:
    code = "import sys, bmctl.package, bmctl.store; print([n for n in ('torch', 'numpy', 'onnx') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
