"""Import of foreign state dicts: what fits, however people save it; and what is refused."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.engine.intake.imports import WITH_DATA, make_context, message_of, rescnn
from tests.specs import image_spec

from bmctl import models, package
from bmctl.core.images import decode
from bmctl.engine.intake import statedict
from bmctl.engine.intake.importing import import_stage
from bmctl.errors import BmctlError, DataError, PackageError, RecipeError, ResourceError, UsageError
from bmctl.inputs.image.pixels import prepare
from bmctl.restore import load_model

TINY = "torchvision:squeezenet1_1"


def classes_of(found: package.ModelPackage) -> list[str]:
    assert found.manifest.facts is not None
    names: list[str] = found.manifest.facts["class_names"]
    return names


def test_real_weights_by_position(tmp_path: Path, shared_data: Path) -> None:
    """EfficientNet-Lite0 under another project's names: it must see what is on the photographs."""
    context = make_context(tmp_path)
    path = shared_data / "vision" / "efficientnet-lite0-57934424.pth"
    found = import_stage(context, str(path), model="timm:tf_efficientnet_lite0", match="position")
    manifest = found.manifest
    assert manifest.stage == "import"
    assert found.path == context.run / "packages" / "00-import"
    assert manifest.model is not None
    assert (manifest.model.told, manifest.model.given[0].shape[2:]) == ({"num_classes": 1000}, (224, 224))
    assert manifest.metrics["num_params"] == 4652008
    assert manifest.input is not None
    assert (manifest.input.mean, manifest.input.crop) == ((0.5, 0.5, 0.5), 0.875)
    log = (context.run / "logs" / "import.tsv").read_text().splitlines()
    assert log[0] == "in the file\tin the model\tshape"
    assert log[1] == "_conv_stem.weight\tconv_stem.weight\t[32, 3, 3, 3]" or log[1].endswith("[32, 3, 3, 3]")
    assert len(log) > 290
    model = load_model(package.open_package(found.path))
    animals = shared_data / "vision" / "tuxpaint160" / "animals"
    photos = {"pink_flamingo": "flamingo", "peacock": "peacock", "hen": "hen", "rooster": "cock"}
    pixels = [decode(animals / f"animals_birds_{name}.jpg") for name in photos]
    with torch.inference_mode():
        logits = model(torch.from_numpy(prepare(pixels, manifest.input)))
    assert torch.isfinite(logits).all()
    assert [classes_of(found)[int(k)].split(",")[0] for k in logits.argmax(1)] == list(photos.values())


def test_real_weights_of_another_model_say_where_they_part(tmp_path: Path, shared_data: Path) -> None:
    path = shared_data / "vision" / "efficientnet-lite0-57934424.pth"
    with pytest.raises(PackageError, match=r"the first to differ is tensor \d+, in the file .* in the model") as caught:
        import_stage(make_context(tmp_path), str(path), model="torchvision:mobilenet_v2", match="position")
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
def test_state_dicts_as_people_save_them(tmp_path: Path, wrap: Callable[..., Any], note: str, match: Any) -> None:
    if "prefix" in note and match == "position":
        note = ""  # by position names do not matter
    model = rescnn()
    path = tmp_path / "w.pth"
    torch.save(wrap(model.state_dict()), path)
    context = make_context(tmp_path, **WITH_DATA)
    found = import_stage(context, str(path), model="bmctl:rescnn", match=match)
    assert note in context.emit.text  # type: ignore[attr-defined]
    again = load_model(found)
    for key, tensor in model.state_dict().items():
        wanted = tensor.bfloat16().float() if note.startswith("widened") and tensor.is_floating_point() else tensor
        assert torch.equal(again.state_dict()[key], wanted), key


def test_safetensors_and_the_recipe_s_model(tmp_path: Path) -> None:
    save_file(rescnn().state_dict(), tmp_path / "w.safetensors")
    context = make_context(tmp_path, model={"name": "bmctl:rescnn", "args": {"width": 32}}, **WITH_DATA)
    found = import_stage(context, str(tmp_path / "w.safetensors"))
    manifest = found.manifest
    assert manifest.model is not None
    assert manifest.model.args == {"width": 32}
    assert len(classes_of(found)) == 10
    assert not classes_of(found)[0].startswith("class_")  # the data's own
    assert manifest.task is not None
    assert manifest.data_fingerprint
    val = manifest.metrics["val"]
    assert val["metric"] == "accuracy"
    assert 0 <= val["low"] <= val["value"] <= val["high"] <= 1
    assert "bmctl:rescnn" in (found.path / "recipe.yaml").read_text()


def test_the_same_import_is_not_done_twice(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file(rescnn().state_dict(), path)
    arguments = {"model": "bmctl:rescnn"}
    first = import_stage(make_context(tmp_path, **WITH_DATA), str(path), **arguments)
    identity = first.hash
    context = make_context(tmp_path, **WITH_DATA)
    assert import_stage(context, str(path), **arguments).hash == identity
    assert [event["event"] for event in context.emit] == ["skip"]  # type: ignore[attr-defined]
    changed = {key: value + 1 for key, value in rescnn().state_dict().items()}
    save_file(changed, path)
    with pytest.raises(ResourceError, match="starts with") as caught:
        import_stage(make_context(tmp_path, **WITH_DATA), str(path), **arguments)
    assert "--overwrite" in caught.value.hint
    assert package.open_package(first.path).hash == identity
    again = import_stage(make_context(tmp_path, overwrite=True, **WITH_DATA), str(path), **arguments)
    assert again.hash != identity


def test_the_classes_are_counted_in_the_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    spec = image_spec(TINY, num_classes=7, channels=3, size=(64, 64))
    torch.save(models.build(spec).state_dict(), tmp_path / "w.pt")
    for match in ("name", "position"):
        found = import_stage(make_context(tmp_path, match), str(tmp_path / "w.pt"), model=TINY, match=match)  # type: ignore[arg-type]
        assert classes_of(found) == [f"class_{k}" for k in range(7)]
        assert "val" not in found.manifest.metrics


def test_the_publisher_s_names_for_its_number_of_classes(tmp_path: Path) -> None:
    spec = image_spec(TINY, num_classes=1000, channels=3, size=(224, 224))
    torch.save(models.build(spec).state_dict(), tmp_path / "w.pt")
    found = import_stage(make_context(tmp_path), str(tmp_path / "w.pt"), model=TINY)
    assert classes_of(found)[0] == "tench"
    assert found.manifest.input is not None
    assert tuple(found.manifest.input.mean) == (0.485, 0.456, 0.406)


def test_another_number_of_classes_than_the_data_s(tmp_path: Path) -> None:
    torch.save(rescnn(7).state_dict(), tmp_path / "w.pt")
    context = make_context(tmp_path, **WITH_DATA)
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
def test_a_malicious_pickle_is_refused_and_does_not_run(tmp_path: Path, name: str, zipped: bool) -> None:
    sentinel = tmp_path / "ran"
    loaded = {**rescnn().state_dict(), "evil": Malicious(sentinel)}
    torch.save(loaded, tmp_path / name, _use_new_zipfile_serialization=zipped)
    with pytest.raises(PackageError) as caught:
        import_stage(make_context(tmp_path, **WITH_DATA), str(tmp_path / name), model="bmctl:rescnn")
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
def test_state_dicts_that_do_not_fit(tmp_path: Path, case: str) -> None:
    change, match, pattern = BAD[case]
    torch.save(change(rescnn().state_dict()), tmp_path / "w.pt")
    context = make_context(tmp_path, **WITH_DATA)
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
def test_files_that_are_no_weights(tmp_path: Path, name: str, content: bytes, pattern: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PackageError, match=pattern):
        import_stage(make_context(tmp_path, **WITH_DATA), str(tmp_path / name), model="bmctl:rescnn")


def test_a_truncated_file(tmp_path: Path) -> None:
    torch.save(rescnn().state_dict(), tmp_path / "w.pt")
    os.truncate(tmp_path / "w.pt", 50_000)
    with pytest.raises(PackageError, match="cannot be read"):
        import_stage(make_context(tmp_path, **WITH_DATA), str(tmp_path / "w.pt"), model="bmctl:rescnn")


def test_what_to_say_and_what_not(tmp_path: Path) -> None:
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
            import_stage(make_context(tmp_path), source, model=model)
        assert text in message_of(caught), message_of(caught)


def test_prefixes_are_put_on_as_well() -> None:
    found = {"vit.weight": torch.zeros(1), "vit.bias": torch.zeros(1)}
    wanted = {f"model.{name}": tensor for name, tensor in found.items()}
    state, notes = statedict.align_prefix(found, wanted)
    assert list(state) == list(wanted)
    assert notes == ["put the prefix 'model.' before every name"]
