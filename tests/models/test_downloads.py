"""Published weights, from a server on loopback; offline it says so."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from tests.specs import image_spec

from bmctl import models
from bmctl.errors import DependencyError, PackageError, RecipeError
from bmctl.models import ModelSpec, downloads
from bmctl.models import torchvision as of_torchvision

from .conftest import Hub
from .test_contract import TINY_VIT

HUB_SCRIPT = """
import json, sys, torch
from bmctl import models
from bmctl.errors import BmctlError
from bmctl.models import ModelConfig
from tests.specs import image_spec

def picture(size):
    small = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
    return small.repeat_interleave(size // 32, 2).repeat_interleave(size // 32, 3)

def build(name, num_classes):
    known = models.published(ModelConfig(name=name, pretrained=True))
    size = known.of("image").get("size", (32, 32))
    spec = models.resolve(image_spec(name, num_classes=num_classes, channels=3, size=size))
    model = models.build(spec, pretrained=True).eval()
    with torch.no_grad():
        logits = model(picture(size[0]))[0].tolist()
    return {"spec": spec.model_dump(), "known": known.model_dump(), "logits": logits}

for line in sys.argv[1:]:
    name, _, num_classes = line.rpartition(" ")
    try:
        print(json.dumps(build(name, int(num_classes))))
    except BmctlError as error:
        print(json.dumps(error.to_dict()))
"""
VIT = "transformers:someone/tiny-vit"


def from_hub(url: str, cache: Path, *models: str, offline: bool = False) -> list[dict]:
    """Build published models in a process of its own: the hub's address is read when its library is imported."""
    env = os.environ | {"HF_ENDPOINT": url, "HF_HOME": str(cache), "HF_HUB_OFFLINE": str(int(offline))}
    command = [sys.executable, "-c", HUB_SCRIPT, *models]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def picture(size: int) -> torch.Tensor:
    small = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
    return small.repeat_interleave(size // 32, 2).repeat_interleave(size // 32, 3)


def publish_vit(hub: Hub) -> torch.nn.Module:
    """A tiny ViT of transformers with 5 classes, as its owner would have uploaded it."""
    spec = image_spec("transformers:vit", args=TINY_VIT, num_classes=5, channels=3, size=(32, 32))
    model = models.build(spec).eval()
    folder = hub.root / "someone" / "tiny-vit"
    folder.mkdir(parents=True)
    model.model.config.id2label = {index: f"class {index}" for index in range(5)}
    model.model.save_pretrained(folder)
    processor = {
        "do_resize": True,
        "size": {"height": 32, "width": 32},
        "image_mean": [0.4] * 3,
        "image_std": [0.2] * 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps({**processor, "resample": 3}))
    return model


def publish_text(hub: Hub) -> None:
    """A repository of another kind that brings its own code."""
    folder = hub.root / "someone" / "text"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "t5", "auto_map": {"AutoConfig": "evil.Config"}}))
    (folder / "preprocessor_config.json").write_text("{}")
    (folder / "evil.py").write_text("raise SystemExit('ran')")


def test_transformers_from_the_hub_and_then_offline(hub: Hub, tmp_path: Path) -> None:
    model = publish_vit(hub)
    publish_text(hub)
    with torch.no_grad():
        expected = model(picture(32))[0]
    names = (f"{VIT} 5", f"{VIT} 3", "transformers:nobody/nothing 5", "transformers:someone/text 5")
    found, other, nothing, text = from_hub(hub.url, tmp_path, *names)
    torch.testing.assert_close(torch.tensor(found["logits"]), expected)
    known = found["known"]["input"] | {"class_names": found["known"]["class_names"]}
    assert (known["size"], known["mean"], known["interpolation"]) == ([32, 32], [0.4] * 3, "bicubic")
    assert known["class_names"] == [f"class {index}" for index in range(5)]
    # The package's record builds the same structure with no hub at all.
    again = models.build(ModelSpec.model_validate_json(json.dumps(found["spec"])))
    again.load_state_dict(model.state_dict(), strict=True)
    assert len(other["logits"]) == 3
    assert (nothing["exit_code"], text["exit_code"]) == (6, 3)
    assert "no such model" in nothing["message"]
    assert "takes texts; the data give input float32" in text["message"]
    assert not any("evil" in asked for asked in hub.asked)
    cached, absent = from_hub("http://127.0.0.1:9", tmp_path, f"{VIT} 5", "timm:test_vit 5", offline=True)
    assert cached["logits"] == found["logits"]
    assert absent["exit_code"] == 6
    assert "cannot be downloaded (HF_HUB_OFFLINE is set" in absent["message"]
    assert "import a local file" in absent["hint"]


def test_timm_from_the_hub_and_with_a_new_head(hub: Hub, tmp_path: Path) -> None:
    import timm

    model = timm.create_model("test_vit", num_classes=1000).eval()
    folder = hub.root / "timm" / "test_vit.r160_in1k"
    folder.mkdir(parents=True)
    save_file(model.state_dict(), folder / "model.safetensors")
    with torch.no_grad():
        expected = model(picture(160))[0]
    found, other = from_hub(hub.url, tmp_path, "timm:test_vit 1000", "timm:test_vit 4")
    torch.testing.assert_close(torch.tensor(found["logits"]), expected)
    assert found["known"]["num_classes"] == 1000
    assert len(other["logits"]) == 4


@pytest.mark.slow  # the hub's library tries several times, waiting in between
@pytest.mark.parametrize("name", ["timm:test_vit", VIT])
def test_an_unreachable_hub_is_told(tmp_path: Path, name: str) -> None:
    (found,) = from_hub("http://127.0.0.1:9", tmp_path, f"{name} 5")
    assert found["exit_code"] == 6
    assert "cannot be downloaded" in found["message"]
    assert "HF_HUB_OFFLINE" not in found["message"]


# -- torchvision ------------------------------------------------------------------------------------


@pytest.fixture
def published(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """torchvision's shufflenet with weights of our own, on loopback, in place of the published ones."""
    import torchvision

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    state = torchvision.models.shufflenet_v2_x0_5(weights=None).state_dict()
    (hub.root / "files").mkdir()
    torch.save(state, hub.root / "files" / "x.pth")
    prefix = hashlib.sha256((hub.root / "files" / "x.pth").read_bytes()).hexdigest()[:8]
    (hub.root / "files" / "x.pth").rename(hub.root / "files" / f"shuffle-{prefix}.pth")
    weights = SimpleNamespace(url=f"{hub.url}/files/shuffle-{prefix}.pth")
    monkeypatch.setattr(of_torchvision, "weights_of", lambda name: weights)
    return state


def shufflenet(num_classes: int) -> torch.nn.Module:
    spec = image_spec("torchvision:shufflenet_v2_x0_5", num_classes=num_classes, channels=3, size=(32, 32))
    return models.build(spec, pretrained=True)


def test_torchvision_is_fetched_once(hub: Hub, published: dict[str, torch.Tensor]) -> None:
    for _ in range(2):
        model = shufflenet(1000)
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in published.items())
    assert len(hub.asked) == 1


def test_torchvision_gets_a_new_head(published: dict[str, torch.Tensor]) -> None:
    state = shufflenet(7).state_dict()
    differing = [name for name, tensor in published.items() if not torch.equal(state[name], tensor)]
    assert differing == ["fc.weight", "fc.bias"]


def test_weights_with_another_hash_are_refused(hub: Hub, published: dict[str, torch.Tensor]) -> None:
    (path,) = (hub.root / "files").iterdir()
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(PackageError, match="SHA-256"):
        shufflenet(7)


def test_an_unreachable_server_is_told(hub: Hub, published: dict[str, torch.Tensor], tmp_path: Path) -> None:
    (path,) = (hub.root / "files").iterdir()
    path.unlink()
    with pytest.raises(DependencyError, match="cannot be downloaded"):
        shufflenet(7)
    assert not list((tmp_path / "torch").rglob("*.pth*"))


def test_offline_holds_for_torchvision_too(
    hub: Hub, published: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DependencyError, match="HF_HUB_OFFLINE is set"):
        shufflenet(7)
    assert not hub.asked


def test_a_pickle_that_would_run_code_is_refused(hub: Hub, published: dict[str, torch.Tensor], tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "ran",))

    path = hub.root / "files" / "evil.pth"
    torch.save({"weight": Evil()}, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(PackageError, match="not a plain state dict"):
        downloads.fetch_weights(f"{hub.url}/files/evil.pth", sha256_prefix=digest)
    assert not (tmp_path / "ran").exists()


def test_weights_of_another_model_are_refused(published: dict[str, torch.Tensor]) -> None:
    spec = image_spec("torchvision:resnet18", num_classes=7, channels=3, size=(32, 32))
    with pytest.raises(RecipeError, match="do not fit"):
        models.build(spec, pretrained=True)
