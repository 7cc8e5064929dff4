"""What counts as a block, over networks that name and nest theirs in every way there is."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

from bmctl.engine.modules.blocks import find_blocks
from bmctl.models.own.networks import MLP, ImageLogits, ResCNN


def kinds(blocks: dict[str, nn.Module]) -> dict[str, int]:
    return dict(Counter(type(block).__name__ for block in blocks.values()))


@pytest.mark.parametrize(
    ("name", "expected", "first", "last"),
    [
        ("resnet18", {"BasicBlock": 8}, "layer1.0", "layer4.1"),
        ("vit_b_16", {"EncoderBlock": 12}, "encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_11"),
        ("convnext_tiny", {"CNBlock": 18}, "features.1.0", "features.7.2"),
        ("mobilenet_v3_small", {"InvertedResidual": 11}, "features.1", "features.11"),
        ("efficientnet_b0", {"MBConv": 16}, "features.1.0", "features.7.0"),
        ("densenet121", {"_DenseLayer": 58}, "features.denseblock1.denselayer1", "features.denseblock4.denselayer16"),
    ],
)
def test_torchvision(name, expected, first, last) -> None:
    import torchvision

    with torch.device("meta"):
        found = find_blocks(getattr(torchvision.models, name)())
    assert kinds(found) == expected
    assert (next(iter(found)), list(found)[-1]) == (first, last)


@pytest.mark.parametrize(
    ("name", "expected", "first", "last"),
    [
        ("vit_tiny_patch16_224", {"Block": 12}, "blocks.0", "blocks.11"),
        ("convnext_atto", {"ConvNeXtBlock": 12}, "stages.0.blocks.0", "stages.3.blocks.1"),
        ("resnet18", {"BasicBlock": 8}, "layer1.0", "layer4.1"),
        ("regnetx_002", {"Bottleneck": 13}, "s1.b1", "s4.b7"),
        ("swin_tiny_patch4_window7_224", {"SwinTransformerBlock": 12}, "layers.0.blocks.0", "layers.3.blocks.1"),
        ("nfnet_f0", {"NormFreeBlock": 12}, "stages.0.0", "stages.3.2"),
    ],
)
def test_timm(name, expected, first, last) -> None:
    import timm

    with torch.device("meta"):
        found = find_blocks(timm.create_model(name))
    assert kinds(found) == expected
    assert (next(iter(found)), list(found)[-1]) == (first, last)


@pytest.mark.parametrize(
    ("name", "expected", "first"),
    [
        ("vit", {"ViTLayer": 12}, "model.vit.layers.0"),
        ("resnet", {"ResNetBottleNeckLayer": 16}, "model.resnet.encoder.stages.0.layers.0"),
    ],
)
def test_transformers(name, expected, first) -> None:
    transformers = pytest.importorskip("transformers")

    with torch.device("meta"):
        config = transformers.AutoConfig.for_model(name)
        found = find_blocks(ImageLogits(transformers.AutoModelForImageClassification.from_config(config)))
    assert kinds(found) == expected
    assert next(iter(found)) == first


def test_our_own() -> None:
    assert list(find_blocks(ResCNN(num_classes=10, channels=1, width=4))) == ["blocks.0", "blocks.1", "blocks.2"]
    assert find_blocks(MLP(num_inputs=4, num_classes=2)) == {}


class Expert(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, width), nn.Linear(width, 4)

    def forward(self, x):
        return self.down(self.up(x))


class Mixture(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Expert(width) for _ in range(3))

    def forward(self, x):
        return x + sum(expert(x) for expert in self.experts)


def test_equal_neighbours_are_blocks_whatever_they_hold() -> None:
    assert kinds(find_blocks(nn.Sequential(*(Mixture(8) for _ in range(4))))) == {"Mixture": 4}


def test_ever_wider_holders_are_stages() -> None:
    assert kinds(find_blocks(nn.Sequential(*(Mixture(2**i) for i in range(4))))) == {"Expert": 12}


def test_none_lies_in_another() -> None:
    import timm

    with torch.device("meta"):
        found = find_blocks(timm.create_model("maxvit_rmlp_pico_rw_256"))
    inside = [inner for block in found.values() for inner in block.modules() if inner is not block]
    assert found
    assert not {id(block) for block in found.values()} & {id(module) for module in inside}
