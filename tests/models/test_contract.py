"""What every source of models has to hold, over the whole table."""

from __future__ import annotations

import pytest
import torch
from tests.specs import image_spec

from bmctl import models
from bmctl.errors import RecipeError
from bmctl.models import MODELS, ModelConfig, ModelSpec

TINY_VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "patch_size": 8,
}
# One small model or more of each source: name, arguments, channels, size.
SMALL: dict[str, list[tuple[str, dict[str, object], int, tuple[int, int]]]] = {
    "bmctl": [
        ("rescnn", {}, 1, (28, 28)),
        ("rescnn", {"width": 4}, 3, (17, 40)),
        ("mlp", {}, 1, (28, 28)),
        ("mlp", {"hidden": (8, 8, 8)}, 3, (9, 5)),
    ],
    "torchvision": [
        ("resnet18", {}, 3, (28, 28)),
        ("shufflenet_v2_x0_5", {}, 3, (32, 32)),
        ("googlenet", {}, 3, (64, 64)),
    ],
    "timm": [("test_vit", {}, 1, (32, 32)), ("test_resnet", {"drop_rate": 0.1}, 1, (28, 28))],
    "transformers": [
        ("vit", TINY_VIT, 1, (32, 32)),
        ("mobilenet_v1", {"depth_multiplier": 0.25, "min_depth": 4}, 3, (32, 48)),
    ],
}
# A user's own are tried in tests/test_own_code.py.
PREFIXES = [prefix for prefix in MODELS if prefix != "file"]
CASES = [(prefix, *case) for prefix in PREFIXES for case in SMALL[prefix]]


def spec(
    prefix: str, name: str, args: dict[str, object], channels: int, size: tuple[int, int], *, classes: int = 7
) -> ModelSpec:
    asked = image_spec(f"{prefix}:{name}", args=args, num_classes=classes, channels=channels, size=size)
    return models.resolve(asked)


@pytest.mark.parametrize(("prefix", "name", "args", "channels", "size"), CASES)
def test_a_model_is_built_again_from_its_json(
    prefix: str, name: str, args: dict, channels: int, size: tuple[int, int]
) -> None:
    first = spec(prefix, name, args, channels, size)
    model = models.build(first)
    assert model.training
    again = models.build(ModelSpec.model_validate_json(first.model_dump_json()))
    again.load_state_dict(model.state_dict(), strict=True)
    x = torch.randn(3, channels, *size)
    with torch.no_grad():
        logits = model.eval()(x)
        assert logits.shape == (3, 7)
        assert torch.equal(again.eval()(x), logits)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_names_are_known_and_misspellings_are_guessed(prefix: str) -> None:
    known = MODELS[prefix].names()
    assert {case[0] for case in SMALL[prefix]} <= set(known)
    models.check_name(f"{prefix}:{known[0]}")
    with pytest.raises(RecipeError, match="there is no model") as caught:
        models.check_name(f"{prefix}:{known[0]}x")
    assert f"{prefix}:{known[0]}" in caught.value.hint
    with pytest.raises(RecipeError) as caught:
        models.build(image_spec(f"{prefix}:qqqqqqqqqqqq"))
    assert caught.value.hint


@pytest.mark.parametrize("prefix", PREFIXES)
def test_without_published_weights_the_data_decide_the_normalisation(prefix: str) -> None:
    known = models.published(ModelConfig(name=f"{prefix}:{SMALL[prefix][0][0]}"))
    assert not {"mean", "std", "crop"} & set(known.of("image")) and known.num_classes is None


@pytest.mark.parametrize("prefix", PREFIXES)
def test_arguments_that_do_not_exist_are_refused(prefix: str) -> None:
    name, _, channels, size = SMALL[prefix][0]
    with pytest.raises(RecipeError, match="nonsense"):
        models.build(spec(prefix, name, {"nonsense": 1}, channels, size))


@pytest.mark.parametrize(
    "case",
    [
        ("timm", "test_vit", {"checkpoint_path": "/etc/passwd"}, 3, (32, 32)),
        ("timm", "test_vit", {"pretrained": True}, 3, (32, 32)),
        ("torchvision", "resnet18", {"weights": "DEFAULT"}, 3, (32, 32)),
        ("transformers", "vit", {"auto_map": "x"}, 3, (32, 32)),
        ("transformers", "vit", {"attn_implementation": "kernels-community/flash-attn"}, 3, (32, 32)),
        ("transformers", "vit", {"_attn_implementation": "kernels-community/flash-attn"}, 3, (32, 32)),
        ("transformers", "vit", {"config_json": '{"model_type": "vit", "auto_map": {}}'}, 3, (32, 32)),
    ],
)
def test_arguments_that_would_fetch_or_run_something_are_refused(case: tuple) -> None:
    with pytest.raises(RecipeError, match=r"model\.args"):
        models.build(image_spec(f"{case[0]}:{case[1]}", args=case[2], num_classes=2, channels=3, size=case[4]))


@pytest.mark.parametrize(
    "case",
    [
        ("torchvision", "vgg11", {}, 3, (28, 28)),
        ("torchvision", "inception_v3", {}, 3, (28, 28)),
        ("bmctl", "rescnn", {}, 3, (4, 4)),
        ("timm", "test_vit", {}, 3, (30, 31)),
    ],
)
def test_images_too_small_for_a_model_are_refused_when_it_is_built(case: tuple) -> None:
    with pytest.raises(RecipeError):
        models.build(spec(*case))


def test_torchvision_takes_rgb_only() -> None:
    with pytest.raises(RecipeError, match="takes 3 channels, got 1"):
        models.build(spec("torchvision", "resnet18", {}, 1, (28, 28)))


@pytest.mark.parametrize("prefix", ["torchvision", "timm"])
def test_vision_transformers_say_their_size(prefix: str) -> None:
    name = {"torchvision": "vit_b_32", "timm": "vit_tiny_patch16_224"}[prefix]
    assert models.published(ModelConfig(name=f"{prefix}:{name}")).of("image")["size"] == (224, 224)


def test_the_publishers_input_and_classes() -> None:
    for name, size, crop in (("torchvision:resnet50", 224, 224 / 232), ("timm:tf_efficientnet_lite0", 224, 0.875)):
        known = models.published(ModelConfig(name=name, pretrained=True))
        image = known.of("image")
        assert (image["size"], image["channels"], image["crop"]) == ((size, size), 3, crop)
        assert known.num_classes == len(known.class_names or ()) == 1000
        assert (known.class_names or ("",))[0].startswith("tench")


def test_unpublished_weights_are_not_promised() -> None:
    for name in ("bmctl:mlp", "transformers:vit"):
        config = ModelConfig(name=name, pretrained=True)
        with pytest.raises(RecipeError, match=r"model\.pretrained"):
            models.published(config)
            models.build(image_spec(name, num_classes=2, channels=3, size=(224, 224)), pretrained=True)
