"""Magnitude pruning: which weights go, and that they stay away."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from bmctl.core import masks
from bmctl.errors import PackageError, RecipeError, UnsupportedError
from bmctl.methods import MethodContext, magnitude
from bmctl.methods.magnitude import Config

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-2),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.5),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, momentum=0.5, weight_decay=1e-2),
}


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.ReLU(), nn.Linear(32, 10)).eval()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, *, steps: int = 4) -> None:
    model.train()
    for step in range(steps):
        x = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    model.eval()


def zeros(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: layer.weight == 0 for name, layer in masks.masked_layers(model).items()}


def test_prunes_exactly_the_smallest_over_all_layers(context: MethodContext) -> None:
    model = mlp()
    before = torch.cat([model[1].weight.detach().flatten(), model[3].weight.detach().flatten()])
    magnitude.apply(model, Config(sparsity=0.3), context)
    after = torch.cat([model[1].weight.detach().flatten(), model[3].weight.detach().flatten()])
    gone = round(0.3 * before.numel())
    assert int((after == 0).sum()) == gone
    assert torch.equal(after == 0, before.abs() <= before.abs().sort().values[gone - 1])
    assert torch.equal(after[after != 0], before[after != 0])


def test_ties_are_cut_at_the_exact_number(context: MethodContext) -> None:
    model = mlp()
    nn.init.ones_(model[1].weight)
    nn.init.ones_(model[3].weight)
    magnitude.apply(model, Config(sparsity=0.5), context)
    assert sum(int((layer.weight == 0).sum()) for layer in (model[1], model[3])) == (192 * 32 + 320) // 2


def test_ignored_and_small_layers_stay_dense(context: MethodContext) -> None:
    model = mlp()
    meta = magnitude.apply(model, Config(sparsity=0.5, ignore=("1",)), context)
    assert list(meta["layers"]) == ["3"]
    assert not masks.has_mask(model[1])
    model = mlp()
    assert list(magnitude.apply(model, Config(min_weights=1000), context)["layers"]) == ["1"]


def test_a_pattern_that_matches_nothing_is_refused(context: MethodContext) -> None:
    with pytest.raises(RecipeError, match=r"magnitude\.ignore: 'heads'"):
        magnitude.apply(mlp(), Config(ignore=("heads",)), context)


def test_nothing_left_to_prune_is_refused(context: MethodContext) -> None:
    with pytest.raises(UnsupportedError, match="left to prune"):
        magnitude.apply(mlp(), Config(ignore=("*",)), context)
    model = mlp()
    magnitude.apply(model, Config(sparsity=0.5), context)
    with pytest.raises(UnsupportedError, match="pruned already"):
        magnitude.apply(model, Config(sparsity=0.5), context)


def test_a_second_step_keeps_what_the_first_pruned(context: MethodContext) -> None:
    model = mlp()
    magnitude.apply(model, Config(sparsity=0.3), context)
    first = zeros(model)
    magnitude.apply(model, Config(sparsity=0.6), context)
    for name, gone in zeros(model).items():
        assert bool(gone[first[name]].all())
    assert sum(int(gone.sum()) for gone in zeros(model).values()) == round(0.6 * (192 * 32 + 320))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_pruned_weights_stay_exactly_zero(name: str, context: MethodContext, build) -> None:
    model = build()
    magnitude.apply(model, Config(sparsity=0.5), context)
    before, gone = copy.deepcopy(model.state_dict()), zeros(model)
    train(model, OPTIMIZERS[name](model.parameters()))
    for layer, pruned in gone.items():
        weight = model.get_submodule(layer).weight
        assert bool((weight[pruned] == 0).all()), layer
        assert bool((weight[~pruned] != before[f"{layer}.weight"][~pruned]).any()), f"{layer} was not trained"


def test_a_kept_weight_at_zero_may_move(context: MethodContext) -> None:
    model = mlp()
    magnitude.apply(model, Config(sparsity=0.5), context)
    kept = masks.get_mask(model[3])
    with torch.no_grad():
        model[3].weight[kept] = 0
    train(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert bool((model[3].weight[kept] != 0).any())
    assert bool((model[3].weight[~kept] == 0).all())


@pytest.mark.parametrize("change", ["copy", "parameter"])
def test_masks_hold_in_copies_and_replaced_parameters(change: str, context: MethodContext) -> None:
    model = mlp()
    magnitude.apply(model, Config(sparsity=0.5), context)
    gone = zeros(model)
    if change == "copy":
        model = copy.deepcopy(model)
    else:
        model[1].weight = nn.Parameter(model[1].weight.detach().clone())
    train(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    for name, pruned in gone.items():
        assert bool((model.get_submodule(name).weight[pruned] == 0).all())


def test_masks_hold_under_data_parallelism(context: MethodContext, tmp_path: Path) -> None:
    model = mlp()
    magnitude.apply(model, Config(sparsity=0.5), context)
    gone = zeros(model)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        shared = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        train(shared, torch.optim.AdamW(shared.parameters(), lr=1e-2))
    finally:
        torch.distributed.destroy_process_group()
    for name, pruned in gone.items():
        weight = model.get_submodule(name).weight
        assert bool((weight[pruned] == 0).all())
        assert bool((weight.grad[~pruned] != 0).any())


def test_restore_gives_the_same_state_and_goes_on_the_same(context: MethodContext, build) -> None:
    model = build()
    meta = json.loads(json.dumps(magnitude.apply(model, Config(sparsity=0.5), context)))
    again = build()
    magnitude.restore(again, Config(sparsity=0.5), meta)
    again.load_state_dict(copy.deepcopy(model.state_dict()), strict=True)
    assert list(again.state_dict()) == list(model.state_dict())
    for one in (model, again):
        train(one, torch.optim.SGD(one.parameters(), lr=0.1, momentum=0.9))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_a_mask_takes_one_bit_per_weight(context: MethodContext) -> None:
    model = mlp()
    magnitude.apply(model, Config(sparsity=0.5), context)
    assert model[1].weight_mask.dtype == torch.uint8
    assert model[1].weight_mask.shape == (192 * 32 // 8,)


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 3, 3), (7,), (8,)])
def test_packing_is_exact(shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape) > 0.5
    bits = masks.pack(mask)
    assert bits.shape == (masks.num_bytes(mask.shape),)
    assert torch.equal(masks.unpack(bits, mask.shape), mask)


@pytest.mark.parametrize("name", ["nothing", "2"])
def test_a_package_of_another_model_is_refused(name: str) -> None:
    with pytest.raises(PackageError, match=name):
        magnitude.restore(mlp(), Config(), {"layers": {name: 4}})


def test_the_result_does_not_depend_on_threads_or_random_state(context: MethodContext, build) -> None:
    models = [build()]
    models.append(copy.deepcopy(models[0]))
    threads = torch.get_num_threads()
    for model, num in zip(models, (1, 2), strict=True):
        torch.set_num_threads(num)
        torch.manual_seed(num)
        state = torch.get_rng_state()
        magnitude.apply(model, Config(sparsity=0.5), context)
        assert torch.equal(state, torch.get_rng_state())
        assert torch.get_num_threads() == num
    torch.set_num_threads(threads)
    for name, tensor in models[0].state_dict().items():
        assert torch.equal(tensor, models[1].state_dict()[name])
