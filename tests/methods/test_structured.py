"""Structured pruning: the right channels go everywhere, and the structure comes back from its meta alone."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from tests.methods.conftest import context_of, residual, vit
from torch import nn

from bmctl.core import masks
from bmctl.errors import PackageError, RecipeError, UnsupportedError
from bmctl.methods import MethodContext, magnitude, structured
from bmctl.methods.structured import Config


def num_params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def again_from(meta: dict, build, model: nn.Module, config: Config) -> nn.Module:
    """A second model with the structure of the first, from its meta as JSON."""
    other = build()
    structured.restore(other, config, json.loads(json.dumps(meta)))
    other.load_state_dict(model.state_dict(), strict=True)
    return other.eval()


@pytest.mark.parametrize("scope", ["group", "global"])
def test_restore_needs_only_the_meta(scope: str, build, context: MethodContext) -> None:
    model, config = build(), Config(ratio=0.5, scope=scope)
    before = num_params(model)
    meta = structured.apply(model, config, context)
    assert num_params(model) < 0.75 * before
    other = again_from(meta, build, model, config)
    x = torch.randn(5, 3, 8, 8)
    assert torch.equal(other(x), model(x))
    assert {n: tuple(p.shape) for n, p in other.named_parameters()} == {
        n: tuple(p.shape) for n, p in model.named_parameters()
    }


def test_half_of_every_group_is_about_a_quarter(context: MethodContext) -> None:
    meta = structured.apply(residual(), Config(ratio=0.5), context)
    assert sorted(meta["groups"].values()) == [[16, 8], [24, 12], [32, 16]]


def test_channels_that_do_nothing_go_first_and_nothing_changes(context: MethodContext) -> None:
    """Channels of weight zero are the least important, and without them the outputs are the same."""
    model = residual()
    with torch.no_grad():
        idle = [1, 4, 5, 7, 8, 12, 19, 23, 0, 10, 11, 13]
        model.left.weight[idle] = 0
        model.left.bias[idle] = 0
        model.right.weight[:, idle] = 0
    x = torch.randn(4, 3, 8, 8)
    before = model(x)
    ignore = ("stem", "right", "depthwise", "grouped")
    meta = structured.apply(model, Config(ratio=0.5, ignore=ignore), context)
    assert meta["groups"] == {"left": [24, 12]}
    assert torch.allclose(model(x), before, atol=1e-6)


def test_attention_loses_the_same_places_in_every_head(context: MethodContext) -> None:
    model = vit()  # 3 heads of 8
    qkv, proj = model.blocks[0].attn.qkv, model.blocks[0].attn.proj
    weak = [0, 3, 5, 6]
    with torch.no_grad():
        tags = torch.arange(72.0)
        qkv.bias.copy_(tags)
        rows = torch.tensor([part * 24 + head * 8 + place for part in range(3) for head in range(3) for place in weak])
        qkv.weight[rows] *= 1e-3
        proj.weight[:, rows[:12]] *= 1e-3
    structured.apply(model, Config(ratio=0.5, ignore=("patch_embed.proj", "blocks.*.mlp.*", "blocks.1.*")), context)
    kept = torch.tensor([row for row in range(72) if row % 8 not in weak])
    left = model.blocks[0].attn.qkv.bias
    assert model.blocks[0].attn.head_dim == 4
    assert model.blocks[0].attn.attn_dim == 12
    assert torch.equal(left[12:], tags[kept][12:])
    assert torch.allclose(left[:12], tags[kept][:12] * 0.5**0.5)  # queries keep the scale of the scores


def test_attention_scores_keep_their_scale(context: MethodContext, images: torch.Tensor) -> None:
    """Head places without weight change nothing when they go, though the head gets narrower."""
    model = vit()
    weak = [0, 3, 5, 6]
    with torch.no_grad():
        for block in model.blocks:
            rows = torch.tensor([p * 24 + head * 8 + place for p in range(3) for head in range(3) for place in weak])
            block.attn.qkv.weight[rows] = 0
            block.attn.qkv.bias[rows] = 0
            block.attn.proj.weight[:, rows[:12]] = 0
    before = model(images)
    structured.apply(model, Config(ratio=0.5, ignore=("patch_embed.proj", "blocks.*.mlp.*")), context)
    assert model.blocks[1].attn.head_dim == 4
    assert torch.allclose(model(images), before, atol=1e-6)


def test_the_classes_stay(build, context: MethodContext, images: torch.Tensor) -> None:
    model = build()
    structured.apply(model, Config(ratio=0.7), context)
    assert model(images).shape == (2, 10)


def test_a_convolution_may_be_the_output_layer(context: MethodContext) -> None:
    def build() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 10, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        ).eval()

    model = build()
    meta = structured.apply(model, Config(), context)
    assert meta["groups"] == {"0": [16, 8]}


def test_channels_are_rounded(context: MethodContext) -> None:
    meta = structured.apply(residual(), Config(ratio=0.6, round_to=8), context)
    assert {after % 8 for _, after in meta["groups"].values()} == {0}


def test_a_global_ratio_is_met_and_no_group_is_emptied(context: MethodContext) -> None:
    model = residual()
    with torch.no_grad():
        model.left.weight *= 1e-3
        model.right.weight *= 1e-3
    meta = structured.apply(model, Config(ratio=0.4, scope="global", max_ratio=0.75), context)
    assert all(after >= before / 4 for before, after in meta["groups"].values())


def test_pruning_to_nothing_is_refused(context: MethodContext) -> None:
    with pytest.raises(UnsupportedError, match="nothing would be left of the 32 channels of grouped"):
        structured.apply(residual(), Config(ratio=0.98), context)
    with pytest.raises(UnsupportedError, match="cannot be reached"):
        structured.apply(residual(), Config(ratio=0.9, max_ratio=0.5, scope="global"), context)
    with pytest.raises(UnsupportedError, match="nothing left to prune"):
        structured.apply(residual(), Config(ignore=("*",)), context)


def test_a_pattern_that_matches_nothing_is_refused(context: MethodContext) -> None:
    with pytest.raises(RecipeError, match="matches none") as caught:
        structured.apply(residual(), Config(ignore=("stemm",)), context)
    assert caught.value.hint == "did you mean 'stem'?"


def test_a_model_that_cannot_be_traced_is_refused() -> None:
    import torchvision

    model = torchvision.models.shufflenet_v2_x0_5(num_classes=10).eval()
    context = context_of({"input": torch.randn(2, 3, 32, 32)})
    with pytest.raises(UnsupportedError, match="ShuffleNetV2 cannot be traced"):
        structured.apply(model, Config(), context)


def test_a_model_that_does_not_run_afterwards_is_refused(context: MethodContext) -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.conv(x).reshape(len(x), 16, 64).mean(2))

    with pytest.raises(UnsupportedError, match="does not run after pruning"):
        structured.apply(Fixed().eval(), Config(), context)


def test_torchvisions_vit_keeps_its_plain_width() -> None:
    import torchvision

    def build() -> nn.Module:
        return torchvision.models.VisionTransformer(
            image_size=8, patch_size=4, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=10
        ).eval()

    images = torch.randn(2, 3, 8, 8)
    context = context_of({"input": images})
    model = build()
    meta = structured.apply(model, Config(), context)
    assert model.hidden_dim == 8
    other = again_from(meta, build, model, Config())
    assert torch.equal(other(images), model(images))


def test_masks_are_cut_with_their_weights(build, context: MethodContext, images: torch.Tensor) -> None:
    model = build()
    first = magnitude.apply(model, magnitude.Config(sparsity=0.5), context)
    sparse = {name: layer.weight.detach().clone() for name, layer in masks.masked_layers(model).items()}
    meta = structured.apply(model, Config(ratio=0.25), context)
    for name, layer in masks.masked_layers(model).items():
        assert torch.equal(layer.weight == 0, ~masks.get_mask(layer)), name
    assert any(layer.weight.shape != sparse[name].shape for name, layer in masks.masked_layers(model).items())
    other = build()
    magnitude.restore(other, magnitude.Config(), first)
    structured.restore(other, Config(), json.loads(json.dumps(meta)))
    other.load_state_dict(copy.deepcopy(model.state_dict()), strict=True)
    optimizer = torch.optim.AdamW(other.parameters(), lr=1e-2)
    other.train()(images).square().mean().backward()
    optimizer.step()
    for name, layer in masks.masked_layers(other).items():
        assert bool((layer.weight[~masks.get_mask(layer)] == 0).all()), name


def test_frozen_parameters_stay_frozen(context: MethodContext) -> None:
    model = residual()
    model.left.weight.requires_grad_(False)
    structured.apply(model, Config(), context)
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == {"left.weight"}
    assert all(p.grad is None for p in model.parameters())


def test_the_result_does_not_depend_on_threads_or_random_state(build, context: MethodContext) -> None:
    models = [build()]
    models.append(copy.deepcopy(models[0]))
    threads = torch.get_num_threads()
    metas = []
    for model, num in zip(models, (1, 2), strict=True):
        torch.set_num_threads(num)
        torch.manual_seed(num)
        state = torch.get_rng_state()
        metas.append(structured.apply(model, Config(), context))
        assert torch.equal(state, torch.get_rng_state())
    torch.set_num_threads(threads)
    assert metas[0] == metas[1]
    for name, tensor in models[0].state_dict().items():
        assert torch.equal(tensor, models[1].state_dict()[name])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"shapes": {"left.weight": [2**40, 16, 3, 3]}}, "left.weight"),
        ({"shapes": {"left.weight": [0, 16, 3, 3]}}, "left.weight"),
        ({"shapes": {"left.weight": [8]}}, "left.weight"),
        ({"shapes": {"gone.weight": [8]}}, "gone"),
        ({"shapes": {"left.forward": [8]}}, "left.forward"),
        ({"attributes": {"left": {"forward": 3}}}, "forward"),
        ({"attributes": {"left": {"head_dim": 3}}}, "head_dim"),
        ({"attributes": {"left": {"out_channels": "9"}}}, "out_channels"),
    ],
)
def test_a_meta_that_does_not_fit_is_refused(change: dict, match: str) -> None:
    with pytest.raises(PackageError, match=match):
        structured.restore(residual(), Config(), {"shapes": {}, "attributes": {}} | change)
