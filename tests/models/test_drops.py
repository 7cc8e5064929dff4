"""`model.dropout` and `model.stochastic_depth` of every source: they reach the model, or are refused."""

from __future__ import annotations

import pytest
import torch
from tests.specs import image_spec

from bmctl import models
from bmctl.errors import RecipeError
from bmctl.models import ModelConfig, ModelSpec
from bmctl.models.own.networks import StochasticDepth

TINY_VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
# Name, field, other arguments, the constructor's name for it.
TAKEN = [
    ("bmctl:rescnn", "dropout", {"width": 4}, "dropout"),
    ("bmctl:rescnn", "stochastic_depth", {"width": 4}, "stochastic_depth"),
    ("bmctl:mlp", "dropout", {"hidden": (8, 8)}, "dropout"),
    ("torchvision:mobilenet_v3_small", "dropout", {}, "dropout"),
    ("torchvision:densenet121", "dropout", {}, "drop_rate"),
    ("torchvision:convnext_tiny", "stochastic_depth", {}, "stochastic_depth_prob"),
    ("torchvision:efficientnet_b0", "stochastic_depth", {}, "stochastic_depth_prob"),
    ("timm:test_vit", "dropout", {}, "drop_rate"),
    ("timm:test_vit", "stochastic_depth", {}, "drop_path_rate"),
    ("timm:resnet18", "stochastic_depth", {"zero_init_last": False}, "drop_path_rate"),
    ("transformers:vit", "dropout", TINY_VIT, "hidden_dropout_prob"),
    ("transformers:mobilenet_v1", "dropout", {"depth_multiplier": 0.25, "min_depth": 4}, "classifier_dropout_prob"),
    ("transformers:convnext", "stochastic_depth", {"hidden_sizes": (8, 8, 8, 8)}, "drop_path_rate"),
]
REFUSED = [
    ("bmctl:mlp", "stochastic_depth"),
    ("torchvision:resnet18", "dropout"),
    ("torchvision:swin_t", "stochastic_depth"),
    ("timm:vgg11", "stochastic_depth"),
    ("transformers:resnet", "dropout"),
    ("transformers:cvt", "dropout"),
]


def spec_of(name: str, args: dict, **drops: float) -> ModelSpec:
    config = ModelConfig.model_validate({"name": name, "args": args, **drops})
    return image_spec(name, args=models.spec_args(config), num_classes=5, channels=3, size=(32, 32))


@pytest.mark.parametrize(("name", "field", "args", "argument"), TAKEN)
def test_it_reaches_the_model(name: str, field: str, args: dict, argument: str) -> None:
    spec = ModelSpec.model_validate_json(spec_of(name, args, **{field: 0.5}).model_dump_json())
    assert spec.args == {**args, argument: 0.5}
    model, plain = models.build(spec), models.build(spec_of(name, args, **{field: 0.0}))
    assert list(model.state_dict()) == list(plain.state_dict())
    if name.startswith("bmctl:"):
        assert list(models.build(spec_of(name, args)).state_dict()) == list(plain.state_dict())
    plain.load_state_dict(model.state_dict())
    x = torch.randn(8, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), plain.eval()(x))
        still = [module for module in model.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
        model.train()
        for module in still:
            module.eval()
        assert not torch.equal(model(x), model(x))


@pytest.mark.parametrize(("name", "field"), REFUSED)
def test_a_model_that_has_none_is_refused(name: str, field: str) -> None:
    with pytest.raises(RecipeError, match=rf"model\.{field}: {name} takes no") as caught:
        models.build(spec_of(name, {}, **{field: 0.1}))
    assert "bmctl:rescnn" in str(caught.value.hint)


def test_one_argument_under_two_names_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"model\.dropout and model\.args\.drop_rate are the same"):
        spec_of("timm:test_vit", {"drop_rate": 0.2}, dropout=0.1)


def test_stochastic_depth_keeps_the_mean_and_drops_whole_samples() -> None:
    torch.manual_seed(0)
    module = StochasticDepth(0.25)
    out = module(torch.ones(4000, 2, 3, 3))
    samples = out.flatten(1)
    assert (samples == samples[:, :1]).all()
    assert samples.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert out.mean() == pytest.approx(1.0, abs=0.03)
    model = models.build(spec_of("bmctl:rescnn", {}, stochastic_depth=0.3))
    assert [block.drop.p for block in model.blocks] == pytest.approx([0.1, 0.2, 0.3])


def test_a_bad_probability_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"model\.args\.dropout: must be less than 1, got 1"):
        models.build(image_spec("bmctl:mlp", args={"dropout": 1}))
