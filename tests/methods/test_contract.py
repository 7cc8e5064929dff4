"""What every module method promises, alone and in every chain of two, on every kind of model.

The package reloads bit for bit, can be trained on, compressed on, and exported; pruned weights stay zero all along.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from tests.methods.conftest import context_of
from tests.specs import image_spec, manifest_of, signature_of, text_spec
from torch import nn

from bmctl import models, package
from bmctl.core import masks
from bmctl.core.noise import noise
from bmctl.engine.artifacts.graph import export_onnx
from bmctl.errors import UnsupportedError
from bmctl.methods import METHODS, of_verb
from bmctl.models import ModelSpec
from bmctl.restore import load_model
from bmctl.schema import Signature

STEPS: dict[str, list[dict[str, Any]]] = {
    # First and second use of each: a second one has to find something left to do.
    "magnitude": [{"sparsity": 0.4}, {"sparsity": 0.7}],
    "structured": [{"ratio": 0.5}, {"ratio": 0.25}],
    "svd": [{"ratio": 0.6}, {"ratio": 0.4}],
}
# Those that are whole before any training; of lora see test_lora.py.
MODULE_METHODS = [
    name for name, method in METHODS.items() if method.LEVEL == "module" and not hasattr(method, "finish")
]
CHAINS = [(name,) for name in MODULE_METHODS] + [(a, b) for a in MODULE_METHODS for b in MODULE_METHODS]
SPECS = {
    "rescnn": image_spec("bmctl:rescnn", args={"width": 8}, size=(8, 8)),
    "mlp": image_spec("bmctl:mlp", args={"hidden": (32, 16)}, size=(8, 8)),
    "resnet18": image_spec("torchvision:resnet18", channels=3, size=(32, 32)),
    "vit_tiny": image_spec("timm:vit_tiny_patch16_224", args={"patch_size": 4, "depth": 2}, channels=3, size=(8, 8)),
    "encoder": text_spec("bmctl:encoder", args={"width": 32, "depth": 2, "heads": 2}, num_classes=10),
}


def marks_of(spec: str, chain: tuple[str, ...]) -> list[pytest.MarkDecorator]:
    """Every chain runs fast on one model with convolutions, residuals and batch statistics, every method on all."""
    if spec != "rescnn" and len(chain) > 1:
        return [pytest.mark.soak]
    return [pytest.mark.slow] if spec in ("resnet18", "vit_tiny") else []


CASES = [
    pytest.param(spec, chain, id=f"{spec}-{'-'.join(chain)}", marks=marks_of(spec, chain))
    for spec in SPECS
    for chain in CHAINS
]


def test_every_module_method_is_covered() -> None:
    assert set(STEPS) == set(MODULE_METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_each_says_what_it_is(name: str) -> None:
    method = METHODS[name]
    assert method.LEVEL in ("module", "graph") and method.Config.model_fields["method"].default == name
    assert isinstance(method.QUANTIZES, bool) and isinstance(method.CALIBRATES, bool)
    assert not method.CALIBRATES or method.num_samples(method.Config()) > 0
    assert name in of_verb(method.VERB)


@pytest.mark.parametrize(("verb", "names"), [("prune", ["structured", "magnitude"]), ("lowrank", ["svd", "lora"])])
def test_a_verbs_default_comes_first(verb: str, names: list[str]) -> None:
    assert of_verb(verb) == names and of_verb("quantize") == ["ptq", "cast"]


def make(spec: ModelSpec) -> nn.Module:
    """A model whose batch statistics are no longer the initial ones."""
    torch.manual_seed(0)
    model = models.build(spec)
    with torch.no_grad():
        model.train()(*samples(spec, 8, seed=1).values())
    return model.eval()


def samples(spec: ModelSpec, num: int, *, seed: int) -> dict[str, torch.Tensor]:
    """What the model takes, in its order."""
    taken = Signature(inputs=spec.given, outputs=())
    found = noise(taken, sizes={"batch": num, "tokens": 6}, seed=seed, limits={"input_ids": 50})
    return {name: torch.from_numpy(array) for name, array in found.items()}


def train(model: nn.Module, spec: ModelSpec) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    model.train()
    for step in range(3):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(*samples(spec, 8, seed=step).values()), torch.arange(8)).backward()
        optimizer.step()
    model.eval()


def apply(model: nn.Module, spec: ModelSpec, name: str, *, use: int) -> package.Structure:
    """One step in place, and what the manifest records of it."""
    config = METHODS[name].Config(method=name, **STEPS[name][use])
    meta = METHODS[name].apply(model, config, context_of(samples(spec, 2, seed=5)))
    return package.Structure(step=config.model_dump(mode="json"), meta=meta)


def reload(model: nn.Module, spec: ModelSpec, history: Sequence[package.Structure], target: Path) -> nn.Module:
    package.save_package(target, manifest=manifest_of(spec, history=tuple(history)), recipe_yaml="", model=model)
    return load_model(package.open_package(target))


def assert_same(one: nn.Module, other: nn.Module, spec: ModelSpec) -> None:
    """The same tensors under the same names, the same structure, and the same outputs, bit for bit."""
    mine, theirs = one.state_dict(), other.state_dict()
    assert list(mine) == list(theirs)
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name]), name
    assert str(one) == str(other)
    fields = samples(spec, 3, seed=9).values()
    with torch.no_grad():
        assert torch.equal(one(*fields), other(*fields))


def assert_masks_hold(model: nn.Module, *, expected: bool) -> None:
    masked = masks.masked_layers(model)
    assert bool(masked) == expected
    for name, layer in masked.items():
        assert bool((layer.weight[~masks.get_mask(layer)] == 0).all()), name


@pytest.mark.parametrize(("name", "chain"), CASES)
def test_chains(name: str, chain: tuple[str, ...], tmp_path: Path) -> None:
    spec = SPECS[name]
    model = make(spec)
    dense = sum(p.numel() for p in model.parameters())
    history: list[package.Structure] = []
    for position, method in enumerate(chain):
        if chain[: position + 1] == ("svd", "svd"):
            with pytest.raises(UnsupportedError, match="is a factor of an earlier svd step"):
                apply(model, spec, method, use=1)
            return
        history.append(apply(model, spec, method, use=chain[:position].count(method)))
        again = reload(model, spec, history, tmp_path / f"{position}-{method}")
        assert_same(model, again, spec)
        train(model, spec)
        train(again, spec)
        assert_same(model, again, spec)
        masked = "magnitude" in chain[: position + 1]
        if masked and chain[: position + 1] != ("magnitude", "svd"):
            assert_masks_hold(again, expected=True)
        model = again
    if set(chain) != {"magnitude"}:
        assert sum(p.numel() for p in model.parameters()) < dense
    example = {name: tensor.numpy() for name, tensor in samples(spec, 2, seed=5).items()}
    export_onnx(model, signature=signature_of(spec), example=example, out=tmp_path / "model.onnx")
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert not [tensor.name for tensor in graph.initializer if masks.MASK in tensor.name]
