"""Augmentations: what they do, and that they depend on (seed, epoch, index) alone."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms.v2 import functional as tv

from bmctl.core.chance import uniform
from bmctl.inputs.image import augment as module
from bmctl.inputs.image.augment import augment, crop_boxes
from bmctl.inputs.image.pixels import resize
from bmctl.inputs.image.spec import AugmentConfig, CropConfig, Spec

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(1, 256, (40, 9, 7, 3), np.uint8)
EVERY = {"flip": True, "shift": 2, "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "erase": 0.5}


def run(
    pixels: np.ndarray, indices: Any = None, *, seed: int = 0, epoch: int = 0, fill: Any = (0.0,), **fields: Any
) -> np.ndarray:
    indices = np.arange(len(pixels)) if indices is None else np.array(indices)
    return augment(pixels, indices, config=AugmentConfig(**fields), seed=seed, epoch=epoch, fill=fill)


@pytest.mark.parametrize("fields", [{name: value} for name, value in EVERY.items()] + [EVERY], ids=str)
def test_what_happens_to_an_image_depends_on_seed_epoch_and_index_alone(fields: dict[str, Any]) -> None:
    whole = run(PIXELS, **fields)
    assert whole.dtype == np.uint8
    assert whole.shape == PIXELS.shape
    order = RNG.permutation(40)
    assert np.array_equal(run(PIXELS[order], order, **fields), whole[order])
    assert np.array_equal(run(PIXELS[7:8], [7], **fields), whole[7:8])
    for other in ({"seed": 1}, {"epoch": 1}):
        assert (run(PIXELS, **fields, **other) != whole).any(axis=(1, 2, 3)).mean() > 0.3


def test_nothing_happens_unless_it_is_asked_for() -> None:
    assert AugmentConfig() == AugmentConfig(
        crop=None, flip=False, shift=0, brightness=0.0, contrast=0.0, saturation=0.0, erase=0.0
    )
    assert run(PIXELS) is PIXELS


def test_shift_and_flip_give_what_they_always_gave() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 9, 7, 3), np.uint8)
    found = [run(pixels, flip=flip, shift=shift, seed=5, epoch=3) for flip in (False, True) for shift in (0, 2)]
    digests = [hashlib.sha256(np.ascontiguousarray(each).tobytes()).hexdigest()[:16] for each in found]
    assert digests == ["22a1c228a71f18a2", "e0b29be08bc12bb0", "54a1c70d02427b56", "6c93e74db98b2f60"]


def test_one_more_leaves_the_others_as_they_were() -> None:
    moved = run(PIXELS, flip=True, shift=2)
    erased = run(PIXELS, flip=True, shift=2, erase=0.5, fill=(0.0, 0.0, 0.0))
    untouched = (erased == moved).all(axis=(1, 2, 3))
    assert 0.3 < untouched.mean() < 0.7
    assert np.array_equal(erased[erased > 0], moved[erased > 0])


def test_half_are_mirrored_and_shifts_are_even() -> None:
    dot = np.zeros((2000, 11, 11, 1), np.uint8)
    dot[:, 5, 5] = 255
    counts = (run(dot, shift=2) > 0).sum(axis=0)[..., 0]
    assert counts.sum() == 2000
    assert (counts[3:8, 3:8] > 40).all()
    side = np.zeros((2000, 4, 4, 1), np.uint8)
    side[:, :, 0] = 255
    mirrored = run(side, flip=True)[:, 0, -1, 0] > 0
    assert 0.45 < mirrored.mean() < 0.55


def test_uncovered_edges_are_black_before_normalising() -> None:
    white = np.full((300, 6, 6, 1), 255, np.uint8)
    moved = run(white, shift=2)
    assert set(np.unique(moved)) == {0, 255}
    assert moved.reshape(300, -1).min(axis=1).max() == 255  # some are not moved at all


# -- colour -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_same_colours_as_torchvision(name: str, channels: int) -> None:
    pixels = RNG.integers(0, 256, (6, 20, 30, channels), np.uint8)
    changed = run(pixels, **{name: 0.6})
    kind = getattr(module, f"_{name.upper()}")
    factors = 0.4 + 1.2 * uniform(np.arange(6), keys=(2, 0, 0, kind))
    for before, after, factor in zip(pixels, changed, factors, strict=True):
        image = Image.fromarray(before[..., 0] if channels == 1 else before)
        expected = getattr(tv, f"adjust_{name}")(image, factor)
        assert np.array_equal(after, np.asarray(expected).reshape(after.shape))


def test_erased_rectangles_have_the_mean_colour() -> None:
    white = np.full((2000, 20, 30, 3), 255, np.uint8)
    erased = run(white, erase=0.25, fill=(0.2, 0.4, 0.6))
    hit = (erased != 255).any(axis=3)
    assert 0.22 < hit.any(axis=(1, 2)).mean() < 0.28
    assert set(map(tuple, erased[hit])) == {(51, 102, 153)}
    areas = hit.sum(axis=(1, 2))[hit.any(axis=(1, 2))] / 600
    assert 0.01 < areas.min() < 0.04
    assert 0.28 < areas.max() < 0.36
    grey = run(white[..., :1], erase=0.25, fill=(0.2, 0.4, 0.6))
    assert set(np.unique(grey)) == {102, 255}


# -- crops ------------------------------------------------------------------------------------------


def boxes(height: int, width: int, *, count: int = 3000, seed: int = 0, epoch: int = 0, **fields: Any) -> np.ndarray:
    sizes = np.tile([height, width], (count, 1))
    return np.array(crop_boxes(sizes, np.arange(count), config=CropConfig(**fields), seed=seed, epoch=epoch))


def test_crops_have_the_asked_area_and_ratio_and_lie_everywhere() -> None:
    left, top, right, bottom = boxes(300, 400).T
    assert left.min() >= 0
    assert top.min() >= 0
    assert right.max() <= 400
    assert bottom.max() <= 300
    area, ratio = (right - left) * (bottom - top) / 120_000, (right - left) / (bottom - top)
    assert 0.079 < area.min() < 0.1
    assert area.max() > 0.95
    assert 0.74 < ratio.min() < 0.8
    assert 1.25 < ratio.max() < 1.35
    assert 0.45 < ((left + right) / 800).mean() < 0.55
    assert 0.45 < ((top + bottom) / 600).mean() < 0.55
    assert np.unique(left).size > 100
    left, top, right, bottom = boxes(300, 400, scale=(0.2, 0.4)).T
    area = (right - left) * (bottom - top) / 120_000
    assert (round(area.min(), 2), round(area.mean(), 2), round(area.max(), 2)) == (0.2, 0.3, 0.4)


def test_where_no_crop_fits_it_is_the_largest_in_the_middle() -> None:
    assert set(map(tuple, boxes(10, 400, count=9, scale=(1.0, 1.0)))) == {(193, 0, 206, 10)}
    assert set(map(tuple, boxes(400, 10, count=9, scale=(1.0, 1.0)))) == {(0, 193, 10, 206)}
    assert set(map(tuple, boxes(1, 1, count=9))) == {(0, 0, 1, 1)}


def test_a_crop_depends_on_seed_epoch_and_index_alone() -> None:
    whole = boxes(30, 40, count=20)
    alone = crop_boxes(np.array([[30, 40]]), np.array([11]), config=CropConfig(), seed=0, epoch=0)
    assert tuple(whole[11]) == alone[0]
    assert (boxes(30, 40, count=20, epoch=1) != whole).any()
    assert (boxes(30, 40, count=20, seed=1) != whole).any()


def test_a_crop_is_scaled_as_torchvision_does_it() -> None:
    image = RNG.integers(0, 256, (40, 60, 3), np.uint8)
    spec = Spec(size=(24, 24), channels=3, mean=(0.0,) * 3, std=(1.0,) * 3, crop=0.875)
    found = resize([image], spec, boxes=[(10, 5, 45, 39)])
    expected = tv.resized_crop(Image.fromarray(image), 5, 10, 34, 35, [24, 24])
    assert np.array_equal(found[0], np.asarray(expected))
    block = resize(np.stack([image, image]), spec, boxes=[(10, 5, 45, 39)] * 2)
    assert np.array_equal(block, np.concatenate([found, found]))
