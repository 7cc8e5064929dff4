"""Pixel convolutions with a stride over few channels: trained to the end, with gradients that are right."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from bmctl.engine.computing import strided

ROOT = Path(__file__).parents[3]


def run(script: str, *words: str) -> str:
    """In a process of its own: this one must outlive what it tries."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, f"{done.returncode}: {done.stderr[-2000:]}"
    return done.stdout


@pytest.mark.parametrize(
    ("layer", "is_concerned"),
    [
        (nn.Conv2d(3, 48, 1, stride=2), True),
        (nn.Conv2d(15, 4, 1, stride=(1, 2)), True),
        (nn.Conv2d(3, 48, 1, stride=2, padding="valid"), True),
        (nn.Conv2d(16, 48, 1, stride=2), False),
        (nn.Conv2d(3, 48, 1), False),
        (nn.Conv2d(3, 48, 1, stride=2, padding=1), False),
        (nn.Conv2d(3, 48, 2, stride=2), False),
        (nn.Conv2d(6, 48, 1, stride=2, groups=2), False),
        (nn.ConvTranspose2d(3, 48, 1, stride=2), False),
    ],
)
def test_which_layers_are_concerned(layer: nn.Module, is_concerned: bool) -> None:
    assert strided.concerned(nn.Sequential(nn.ReLU(), layer)) == (["1"] if is_concerned else [])


def test_all_others_compute_as_ever_and_nothing_is_left() -> None:
    torch.manual_seed(0)
    native, x = F.conv2d, torch.randn(2, 16, 9, 9).contiguous(memory_format=torch.channels_last)
    layers = [nn.Conv2d(16, 8, 1, stride=2), nn.Conv2d(16, 8, 3, stride=2, padding=1), nn.Conv2d(16, 8, 1)]
    before = [layer(x) for layer in layers]
    with strided.within_bounds():
        assert F.conv2d is not native
        after = [layer(x) for layer in layers]
    assert F.conv2d is native
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_gradients_are_right_and_in_bounds() -> None:
    """At sizes at which torch's own backward pass kills the process on every CPU that was tried."""
    out = run("""
import torch
from torch.nn import functional as F
from bmctl.engine.computing.strided import within_bounds

torch.manual_seed(0)
for channels in (2, 3, 15):
    for dtype, most in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        x = torch.randn(8, channels, 96, 96, dtype=dtype).contiguous(memory_format=torch.channels_last)
        w, b = torch.randn(48, channels, 1, 1, dtype=dtype), torch.randn(48, dtype=dtype)
        x, w, b = (each.requires_grad_() for each in (x, w, b))
        exact = [each.detach().double().contiguous().requires_grad_() for each in (x, w, b)]
        with within_bounds():
            y = F.conv2d(x, w, b, 2)
            dy = torch.randn_like(y)
            y.backward(dy)
        F.conv2d(*exact, stride=2).backward(dy.double())
        assert y.is_contiguous(memory_format=torch.channels_last)
        for mine, right in zip((x, w, b), exact):
            error = (mine.grad.double() - right.grad).abs().max() / right.grad.abs().max()
            assert error <= most, (channels, dtype, float(error))
print("done")
""")
    assert out == "done\n"


def test_a_model_with_such_a_layer_is_trained_to_the_end(tmp_path: Path) -> None:
    out = run(
        """
import sys
from pathlib import Path
import torch
from torch import nn
from tests.engine.runs import Seen, fit, make_context, make_recipe

folder, seen = Path(sys.argv[1]), Seen()
recipe = make_recipe(folder, "train.epochs=1", "data.train.limit=64")
layers = [nn.Upsample(96), nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 48, 1, stride=2), nn.ReLU()]
model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10))
names = list(model.state_dict())
context = make_context(folder / "run", recipe, seen=seen)
result = fit(context, model)
assert list(result.model.state_dict()) == names and not any(m._forward_hooks for m in model.modules())
print(result.steps, seen.notes)
""",
        str(tmp_path),
    )
    assert out.startswith("2 ")
    assert "channels_last: 2 computed pixel by pixel" in out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["repvgg_a0", "mobileone_s0", "fastvit_t8"])
def test_timms_models_with_such_layers(tmp_path: Path, name: str) -> None:
    chance = np.random.default_rng(0)
    for number in range(48):
        folder = tmp_path / "images" / ("train", "val", "test")[number % 3] / ("a", "b")[number // 3 % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(chance.integers(0, 256, (96, 96, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    (tmp_path / "r.yaml").write_text(f"""
name: strided
model: {{name: "timm:{name}"}}
data: {{source: {{kind: folder, root: {tmp_path}/images}}, input: {{size: [96, 96]}}}}
task: {{kind: classify}}
train: {{epochs: 1, batch_size: 8}}
launch: {{device: cpu}}
""")
    script = "from bmctl.cli import main; import sys; sys.exit(main(sys.argv[1:]))"
    run(script, "train", "-r", str(tmp_path / "r.yaml"), "-o", str(tmp_path / "run"))
    assert (tmp_path / "run" / "packages" / "00-train").is_dir()
