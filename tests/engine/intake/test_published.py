"""Import of published models, by a real hub client from a hub on loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.specs import image_spec

from bmctl import models, package
from bmctl.restore import load_model


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
    from bmctl.recipe import Recipe
    from bmctl.restore import load_model

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
        names = manifest.facts["class_names"]
        print(json.dumps({"code": 0, "classes": names[:3], "num_classes": len(names),
                          "mean": manifest.input.mean, "size": manifest.input.size, "total": total}))
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
    again = load_model(package.find_package(tmp_path / "a"))
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
