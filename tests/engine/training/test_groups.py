"""Who decays, at which rate each layer learns, and what Muon takes."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from tests.specs import image_spec
from torch import nn

from bmctl import models
from bmctl.core.masks import set_mask
from bmctl.engine.training.groups import layer_scales, matrices, parameter_groups, undecayed
from bmctl.engine.training.optim import build_optimizer
from bmctl.errors import RecipeError
from bmctl.fit import AdamW, Muon

ROOT = Path(__file__).parents[3]


def build(name: str, **args: object) -> nn.Module:
    return models.build(image_spec(name, args=args, num_classes=5, channels=3, size=(32, 32)))


def test_norms_biases_and_what_the_model_names_do_not_decay() -> None:
    model = build("timm:test_vit")
    weights = dict(model.named_parameters())
    free = undecayed(model, decay_all=False)
    assert free == {name for name, weight in weights.items() if weight.dim() < 2} | {"pos_embed", "cls_token"}
    assert undecayed(model, decay_all=True) == {"pos_embed", "cls_token"} & set(weights)
    wrapped = nn.Sequential(model)
    assert "0.pos_embed" in undecayed(wrapped, decay_all=True)
    decayed, rest = sorted(parameter_groups(model, AdamW()), key=lambda group: -group["weight_decay"])
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.05, 0.0)
    assert len(decayed["params"]) + len(rest["params"]) == len(weights)
    assert len(parameter_groups(model, AdamW(weight_decay=0.0))) == 1


def test_each_block_learns_slower_than_the_one_after_it() -> None:
    scales = layer_scales(build("bmctl:rescnn", width=4), 0.5)
    assert scales["head.weight"] == scales["head.bias"] == 1.0
    assert [scales[f"blocks.{index}.conv1.weight"] for index in range(3)] == [0.125, 0.25, 0.5]
    assert scales["blocks.1.shortcut.0.weight"] == 0.25
    assert scales["stem.0.weight"] == scales["stem.1.bias"] == 0.0625
    vit = layer_scales(build("timm:test_vit"), 0.5)
    assert vit["norm.weight"] == vit["head.weight"] == 1.0
    assert vit["pos_embed"] == vit["patch_embed.proj.weight"] == min(vit.values())


def test_a_rate_is_set_for_each_layer() -> None:
    model = build("bmctl:rescnn", width=4)
    optimizers = build_optimizer(model, AdamW(lr=0.5, layer_decay=0.5))
    rate = {id(weight): group["lr"] for group in optimizers.param_groups for weight in group["params"]}
    assert rate[id(model.head.weight)] == 0.5
    optimizers.set_rate(0.1)
    rate = {id(weight): group["lr"] for group in optimizers.param_groups for weight in group["params"]}
    assert rate[id(model.head.weight)] == 0.1
    assert rate[id(model.stem[0].weight)] == 0.1 * 0.0625
    order = [[tuple(weight.shape) for weight in group["params"]] for group in optimizers.param_groups]
    again = build_optimizer(copy.deepcopy(model), AdamW(lr=0.5, layer_decay=0.5))
    assert order == [[tuple(weight.shape) for weight in group["params"]] for group in again.param_groups]


def test_layer_decay_without_blocks_is_refused() -> None:
    with pytest.raises(RecipeError, match="no repeated blocks"):
        build_optimizer(build("bmctl:mlp"), AdamW(layer_decay=0.5))


def test_muon_takes_matrices_but_no_tables_no_pruned_ones_and_not_the_last() -> None:
    model = build("bmctl:mlp", hidden=(8, 6))
    assert matrices(model) == ["layers.1.weight", "layers.3.weight"]
    set_mask(model.layers[1], torch.rand(model.layers[1].weight.shape) > 0.5)
    assert matrices(model) == ["layers.3.weight"]
    table = nn.ModuleDict({"embed": nn.Embedding(9, 4), "inside": nn.Linear(4, 3), "head": nn.Linear(3, 2)})
    assert matrices(table) == ["inside.weight"]
    two = nn.ModuleDict({"head": nn.Linear(3, 3), "other": nn.Linear(3, 3)})
    two.get_classifier = lambda: (two["head"], two["other"])  # type: ignore[assignment]
    assert matrices(two) == []
    with pytest.raises(RecipeError, match="muon is for matrices"):
        build_optimizer(build("bmctl:rescnn", width=4), Muon(name="muon"))


def test_an_overflow_in_one_part_leaves_all_as_they_were() -> None:
    model = build("bmctl:mlp", hidden=(8, 6))
    optimizers = build_optimizer(model, Muon(name="muon"))
    assert len(optimizers.parts) == 2
    before = copy.deepcopy(model.state_dict())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for overflows in (True, False):
        scaler.scale(model(torch.randn(4, 3, 32, 32)).square().mean()).backward()
        if overflows:
            model.layers[-1].bias.grad[0] = torch.inf  # AdamW's
        optimizers.unscale(scaler)
        optimizers.step(scaler)
        scaler.update()
        optimizers.zero_grad()
        same = [torch.equal(before[name], tensor) for name, tensor in model.state_dict().items()]
        assert all(same) if overflows else not any(same)
    assert scaler.get_scale() == 1.0


SHARDED = """
    import copy, os, sys
    import torch, torch.distributed as dist
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, distribute_tensor
    from tests.engine.training.test_optim import CONFIGS, Odd, train
    from bmctl.engine.training.optim import build_optimizer

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    full = lambda tensor: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()

    def read(key, like):
        spread = isinstance(like, DTensor)
        return distribute_tensor(state[key], like.device_mesh, like.placements) if spread else state[key]

    for config in CONFIGS:
        torch.manual_seed(0)
        plain = Odd()
        plain.scale = nn.Parameter(torch.tensor([1.5]))  # FSDP takes no scalars
        shared = copy.deepcopy(plain)
        fully_shard(shared, mesh=mesh)
        one, other = build_optimizer(plain, config), build_optimizer(shared, config)
        train(plain, one, first=0, last=3)
        train(shared, other, first=0, last=3)
        for a, b in zip(plain.parameters(), shared.parameters(), strict=True):
            torch.testing.assert_close(b.full_tensor(), a, rtol=1e-5, atol=1e-7)
        state = {key: full(value) for key, value in other.tensors(shared).items()}
        half = copy.deepcopy(plain)
        with torch.no_grad():
            for a, b in zip(half.parameters(), shared.parameters(), strict=True):
                a.copy_(b.full_tensor())
        fully_shard(half, mesh=mesh)
        resumed = build_optimizer(half, config)
        resumed.load(half, state, read)
        now = other.tensors(shared)
        for key, value in resumed.tensors(half).items():
            assert type(value) is type(now[key]), key
            assert not isinstance(value, DTensor) or value.placements == now[key].placements, key
        train(shared, other, first=3, last=5)
        train(half, resumed, first=3, last=5)
        for a, b in zip(shared.parameters(), half.parameters(), strict=True):
            assert torch.equal(a.to_local(), b.to_local()), config
    dist.destroy_process_group()
    print("done")
"""


@pytest.mark.slow
def test_sharded_parameters_step_like_whole_ones_and_their_state_goes_on(tmp_path) -> None:
    """Two processes, every optimizer: the same weights within rounding, and after a load the same bits."""
    script = tmp_path / "sharded.py"
    script.write_text(textwrap.dedent(SHARDED))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr[-4000:]
    assert ran.stdout.count("done") == 2
