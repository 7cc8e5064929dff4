"""Low rank: the best approximation, truly in two factors."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from pydantic import ValidationError
from tests.methods.conftest import residual, vit
from torch import nn

from bmctl.core import masks
from bmctl.core.layers import Factors
from bmctl.errors import PackageError, RecipeError, UnsupportedError
from bmctl.methods import MethodContext, magnitude, svd
from bmctl.methods.svd import Config


def linear(rows: int = 24, columns: int = 192) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(columns, rows)).eval()


def test_linear_is_the_best_approximation_of_its_rank(context: MethodContext) -> None:
    model = linear()
    w_OI = model[1].weight.detach().clone()
    svd.apply(model, Config(rank=5), context)
    first, second = model[1]
    assert first.weight.shape == (5, 192)
    assert second.weight.shape == (24, 5)
    s_R = torch.linalg.svdvals(w_OI.double())
    error = (w_OI - second.weight @ first.weight).detach().norm()
    assert float(error) == pytest.approx(float(s_R[5:].square().sum().sqrt()), rel=1e-4)


@pytest.mark.parametrize("geometry", [{}, {"stride": 2, "padding": 1}, {"padding": "same", "dilation": 2}])
def test_a_low_rank_convolution_is_reproduced(geometry: dict, context: MethodContext, images: torch.Tensor) -> None:
    conv = nn.Conv2d(3, 16, 3, **geometry)
    with torch.no_grad():
        low = torch.randn(16, 4) @ torch.randn(4, 27)
        conv.weight.copy_(low.reshape(16, 3, 3, 3))
    model = nn.Sequential(conv).eval()
    before = model(images)
    meta = svd.apply(model, Config(rank=4), context)
    assert meta["layers"] == {"0": 4}
    assert [tuple(layer.weight.shape) for layer in model[0]] == [(4, 3, 3, 3), (16, 4, 1, 1)]
    assert torch.allclose(model(images), before, atol=1e-4)


def test_energy_keeps_as_few_as_reach_it(context: MethodContext) -> None:
    model = linear()
    s_R = torch.linalg.svdvals(model[1].weight.detach().double()).square()
    rank = svd.apply(model, Config(energy=0.6), context)["layers"]["1"]
    share = s_R.cumsum(0) / s_R.sum()
    assert share[rank - 1] >= 0.6 > share[rank - 2]


def test_ratio_bounds_the_parameters(build, context: MethodContext) -> None:
    model = build()
    sizes = {name: layer.weight.numel() for name, layer in model.named_modules() if hasattr(layer, "weight")}
    for name in svd.apply(model, Config(ratio=0.5), context)["layers"]:
        assert sum(layer.weight.numel() for layer in model.get_submodule(name)) <= 0.5 * sizes[name]


def test_every_layer_gets_smaller_or_is_left_and_said(build, context: MethodContext) -> None:
    model = build()
    before = sum(p.numel() for p in model.parameters())
    meta = svd.apply(model, Config(rank=8), context)
    assert sum(p.numel() for p in model.parameters()) < before
    assert meta["kept"]
    assert not set(meta["kept"]) & set(meta["layers"])


def test_grouped_and_special_layers_are_left(context: MethodContext) -> None:
    kept = svd.apply(residual(), Config(rank=4), context)["kept"]
    assert kept["depthwise"] == "has 16 groups"


def test_a_layer_that_is_never_called_is_left(context: MethodContext) -> None:
    class Direct(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.read = nn.Linear(192, 32), nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(self.used(x.flatten(1)), self.read.weight)

    meta = svd.apply(Direct().eval(), Config(rank=2), context)
    assert list(meta["layers"]) == ["used"]
    assert "without calling" in meta["kept"]["read"]


def test_restore_needs_only_the_ranks(build, context: MethodContext, images: torch.Tensor) -> None:
    model = build()
    meta = json.loads(json.dumps(svd.apply(model, Config(ratio=0.5), context)))
    other = build()
    svd.restore(other, Config(ratio=0.5), meta)
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(other.eval()(images), model(images))


def test_factors_are_not_factorised_again(build, context: MethodContext) -> None:
    model = build()
    first = svd.apply(model, Config(ratio=0.6), context)
    with pytest.raises(UnsupportedError, match="is a factor of an earlier svd step"):
        svd.apply(model, Config(ratio=0.3, include=tuple(f"{name}.*" for name in first["layers"])), context)


def test_a_mask_that_is_dropped_is_said(context: MethodContext) -> None:
    model = linear()
    magnitude.apply(model, magnitude.Config(sparsity=0.5), context)
    meta = svd.apply(model, Config(rank=4), context)
    assert "mask is dropped" in meta["notes"][0]
    assert not masks.masked_layers(model)


def test_include_and_ignore(context: MethodContext) -> None:
    meta = svd.apply(vit(), Config(rank=4, include=("blocks.*",), ignore=("*.fc1",)), context)
    assert meta["layers"]
    assert all(name.startswith("blocks.") and not name.endswith("fc1") for name in meta["layers"])
    with pytest.raises(RecipeError, match=r"svd\.include: 'layer4'"):
        svd.apply(vit(), Config(rank=4, include=("layer4",)), context)


def test_nothing_smaller_is_refused(context: MethodContext) -> None:
    with pytest.raises(UnsupportedError, match="no layer gets smaller"):
        svd.apply(linear(), Config(energy=0.999999), context)


@pytest.mark.parametrize("given", [{}, {"rank": 3, "ratio": 0.5}])
def test_exactly_one_criterion(given: dict) -> None:
    with pytest.raises(ValidationError, match="exactly one of rank, ratio and energy"):
        Config(**given)


@pytest.mark.parametrize("layers", [{"1": 25}, {"1": 0}, {"1": "4"}, {"0": 2}, {"9": 2}])
def test_a_meta_that_does_not_fit_is_refused(layers: dict) -> None:
    with pytest.raises(PackageError):
        svd.restore(linear(), Config(rank=1), {"layers": layers})


def test_the_result_does_not_depend_on_threads(build, context: MethodContext) -> None:
    models = [build()]
    models.append(copy.deepcopy(models[0]))
    threads = torch.get_num_threads()
    for model, num in zip(models, (1, 2), strict=True):
        torch.set_num_threads(num)
        svd.apply(model, Config(ratio=0.5), context)
    torch.set_num_threads(threads)
    for name, tensor in models[0].state_dict().items():
        assert torch.equal(tensor, models[1].state_dict()[name])


def test_no_full_size_weight_is_left(context: MethodContext) -> None:
    model = linear()
    svd.apply(model, Config(rank=4), context)
    assert isinstance(model[1], Factors)
    assert max(p.numel() for p in model.parameters()) < 24 * 192
