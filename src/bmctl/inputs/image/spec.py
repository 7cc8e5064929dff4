"""What may be asked of pictures, and what was settled: the sections of a recipe and of a manifest."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from bmctl.schema import Count, Many, Positive, Ratio, Strict

COLUMN = "picture"
FIELD = "input"


class CropConfig(Strict):
    """A random part of the image, scaled to the input size.

    Attributes:
        scale: Its share of the area: least and most.
        ratio: Its width over its height: least and most.
    """

    scale: Many[Annotated[float, Field(gt=0, le=1)]] = Field(default=(0.08, 1.0), min_length=2, max_length=2)
    ratio: Many[Annotated[float, Field(gt=0, le=100)]] = Field(default=(3 / 4, 4 / 3), min_length=2, max_length=2)

    @field_validator("scale", "ratio")
    @classmethod
    def least_first(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if values[0] > values[1]:
            raise ValueError(f"must be [least, most], got {list(values)}")
        return values


class AugmentConfig(Strict):
    """Training only; what happens to a sample depends on the seed, the epoch and which sample it is.

    Attributes:
        crop: Cut out a random part; without, images are brought to size as for evaluation.
        flip: Mirror half of the images.
        shift: Up to so many pixels up, down, left and right.
        brightness: Times a factor of up to this much below or above 1; likewise contrast and saturation.
        erase: Share of the images of which a rectangle is painted over with the mean colour.
    """

    crop: CropConfig | None = None
    flip: bool = False
    shift: Annotated[int, Field(ge=0, le=64)] = 0
    brightness: Ratio = 0.0
    contrast: Ratio = 0.0
    saturation: Ratio = 0.0
    erase: Ratio = 0.0


class Config(Strict):
    """Each None is filled in from the model's publisher, else from the training data; see Spec."""

    kind: Literal["image"] = "image"
    size: Count | Many[Count] | None = None
    channels: Literal[1, 3] | None = None
    mean: Many[float] | None = None
    std: Many[Positive] | None = None
    interpolation: Literal["nearest", "bilinear", "bicubic"] | None = None
    crop: Ratio | None = None
    augment: AugmentConfig = AugmentConfig()


class Spec(Strict):
    """From a decoded image to the model's input, exactly as in training.

    Attributes:
        size: (height, width) in pixels.
        channels: 1 (grey) or 3 (RGB).
        mean: Per channel, of pixels in [0, 1].
        std: Per channel, of pixels in [0, 1].
        interpolation: Pillow's resampling filter.
        crop: Fraction of the shorter side kept by the centre crop; None squeezes to `size` without cropping.
    """

    kind: Literal["image"] = "image"
    size: Many[Count] = Field(min_length=2, max_length=2)
    channels: Literal[1, 3]
    mean: Many[float]
    std: Many[Positive]
    interpolation: Literal["nearest", "bilinear", "bicubic"] = "bilinear"
    crop: Ratio | None = None
