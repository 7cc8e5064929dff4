"""Preparing images, held against torchvision's and timm's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from bmctl.inputs.image import Spec, pixels
from bmctl.models import ModelConfig, published

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (40, 30, 3), np.uint8)
GREY = RNG.integers(0, 256, (28, 28), np.uint8)


def spec(
    size: tuple[int, int], *, channels: int = 3, crop: float | None = None, interpolation: str = "bilinear"
) -> Spec:
    mean, std = ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)) if channels == 3 else ((0.28,), (0.35,))
    return Spec(size=size, channels=channels, mean=mean, std=std, crop=crop, interpolation=interpolation)


def torchvision_eval(image: np.ndarray, to: Spec) -> torch.Tensor:
    """The evaluation transform as torchvision's users write it."""
    mode = {
        "bilinear": v2.InterpolationMode.BILINEAR,
        "bicubic": v2.InterpolationMode.BICUBIC,
        "nearest": v2.InterpolationMode.NEAREST,
    }[to.interpolation]
    height, width = to.size
    geometry = (
        [v2.Resize((height, width), mode)]
        if to.crop is None
        else [v2.Resize(round(height / to.crop), mode), v2.CenterCrop(height)]
    )
    steps = [v2.Grayscale()] if to.channels == 1 and image.ndim == 3 else []
    steps += [*geometry, v2.PILToTensor()]
    made = v2.Compose(steps)(Image.fromarray(image)).expand(to.channels, -1, -1)
    return v2.Normalize(list(to.mean), list(to.std))(made.float().div(255))


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("crop", [None, 0.875, 224 / 232, 1.0])
@pytest.mark.parametrize("shape", [(40, 30, 3), (31, 57, 3), (28, 28), (24, 24, 3)])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_same_pixels_as_torchvision(
    interpolation: str, crop: float | None, shape: tuple[int, ...], channels: int
) -> None:
    image = RNG.integers(0, 256, shape, np.uint8)
    to = spec((24, 24), channels=channels, crop=crop, interpolation=interpolation)
    found = pixels.prepare([image], to)
    assert found.dtype == np.float32
    assert found.shape == (1, channels, 24, 24)
    np.testing.assert_array_equal(found[0], torchvision_eval(image, to).numpy())


@pytest.mark.parametrize(
    "name", ["resnet18.a1_in1k", "tf_efficientnet_lite0.in1k", "vit_tiny_patch16_224.augreg_in21k_ft_in1k"]
)
def test_the_same_pixels_as_timm(name: str) -> None:
    """timm truncates: 224 / 0.95 is 235.8, and it resizes to 235."""
    import timm
    from timm.data import create_transform, resolve_data_config

    known = published(ModelConfig(name=f"timm:{name}", pretrained=True)).of("image")
    to = Spec.model_validate(known)
    image = RNG.integers(0, 256, (300, 400, 3), np.uint8)
    theirs = create_transform(**resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict()))
    np.testing.assert_allclose(pixels.prepare([image], to)[0], theirs(Image.fromarray(image)).numpy(), atol=1e-6)


def test_arrays_and_lists_are_prepared_alike() -> None:
    block = RNG.integers(0, 256, (5, 28, 28), np.uint8)
    for to in (spec((28, 28), channels=1), spec((28, 28)), spec((20, 30)), spec((28, 28), channels=1, crop=0.9)):
        np.testing.assert_array_equal(pixels.prepare(block, to), pixels.prepare(list(block), to))
    colour = RNG.integers(0, 256, (5, 28, 28, 3), np.uint8)
    for to in (spec((28, 28)), spec((28, 28), channels=1)):
        np.testing.assert_array_equal(pixels.prepare(colour, to), pixels.prepare(list(colour), to))


def test_grey_among_colour_and_none_at_all() -> None:
    to = spec((16, 16))
    found = pixels.prepare([COLOUR, GREY], to)
    np.testing.assert_array_equal(found[1], pixels.prepare([GREY], to)[0])
    np.testing.assert_array_equal(found[0], pixels.prepare([COLOUR], to)[0])
    assert pixels.prepare([], to).shape == (0, 3, 16, 16)
    assert pixels.prepare(np.empty((0, 28, 28), np.uint8), to).shape == (0, 3, 16, 16)


def test_grey_is_rounded_as_pillow_does() -> None:
    every = RNG.integers(0, 256, (64, 64, 3), np.uint8)
    assert np.array_equal(pixels.to_grey(every)[..., 0], np.asarray(Image.fromarray(every).convert("L")))
