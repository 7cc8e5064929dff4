"""``timm:NAME``: the classifiers of timm; a tag after a dot names one of several sets of published weights."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from bmctl.core.published import Published, PublishedImage
from bmctl.errors import RecipeError
from bmctl.models.downloads import from_hub
from bmctl.models.spec import (
    Drops,
    ModelConfig,
    ModelSpec,
    bare_name,
    check_fits,
    construct,
    image_of,
    no_drop,
    told_of,
)

if TYPE_CHECKING:
    from torch import nn

# What would fetch or read files, or is told by the data.
_OURS = {
    "num_classes", "in_chans", "img_size", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path",
    "cache_dir", "features_only", "scriptable", "exportable", "no_jit", "pretrained_strict",
}  # fmt: skip


_DROPS = Drops(dropout="drop_rate", stochastic_depth="drop_path_rate")


@lru_cache
def names() -> list[str]:
    """Every name that may follow ``timm:``, with and without a tag."""
    import timm

    return sorted({*timm.list_models(), *timm.list_models(pretrained=True)})


def published(config: ModelConfig) -> Published:
    """The size where the architecture fixes it; all that belongs to published weights if they are asked for."""
    record = _record(bare_name(config.name))
    channels, height, width = record.input_size
    if not config.pretrained:
        return Published(input=PublishedImage(size=(height, width) if record.fixed_input_size else None))
    _check_published(config.name, record)
    # timm truncates where Preprocess rounds: this fraction leads to the same pixel. (Three of 1,800 sets of weights pad
    # instead, crop_pct 1.15: they get no margin.)
    shorter = max(height, math.floor(height / record.crop_pct))
    squash = record.crop_mode == "squash" and record.crop_pct == 1.0
    image = PublishedImage(
        size=(height, width),
        channels=channels,
        mean=record.mean,
        std=record.std,
        interpolation=record.interpolation if record.interpolation in ("bilinear", "nearest") else "bicubic",
        crop=None if squash else height / shorter,
    )
    return Published(
        input=image,
        has_weights=True,
        num_classes=record.num_classes,
        class_names=_class_names(record),
    )


def drop_arguments(config: ModelConfig) -> Drops:
    """timm's names for all its models; `build` says which do not take them."""
    return _DROPS


def build(spec: ModelSpec, *, pretrained: bool = False) -> nn.Module:
    """A module from float32 [N, channels, H, W] to logits [N, num_classes].

    Raises:
        RecipeError: An argument or a size that the model does not take, or no published weights.
        DependencyError: Weights that cannot be downloaded.
    """
    import timm

    name = bare_name(spec.name)
    check_fits(spec, reserved=_OURS)
    record = _record(name)
    num_classes, (channels, pixels) = told_of(spec, "num_classes"), image_of(spec)
    size: dict[str, Any] = {}
    if record.fixed_input_size and pixels != tuple(record.input_size[1:]):
        size = {"img_size": pixels}
    if pretrained:
        _check_published(spec.name, record)

    def make() -> nn.Module:
        with from_hub(spec.name):
            try:
                return timm.create_model(
                    name,
                    pretrained=pretrained,
                    num_classes=num_classes,
                    in_chans=channels,
                    **size,
                    **spec.args,
                )
            except TypeError as error:
                for field, argument in _DROPS.model_dump().items():
                    if argument in spec.args and f"'{argument}'" in str(error):
                        raise no_drop(spec.name, field) from error
                raise

    return construct(make, spec=spec)


def _record(name: str) -> Any:
    """timm's record of a model: size, normalisation, where the weights are."""
    import timm

    return timm.get_pretrained_cfg(name)


def _check_published(name: str, record: Any) -> None:
    if not record.has_weights:
        raise RecipeError(
            f"model.pretrained: there are no published weights of {name}", hint="set model.pretrained to false"
        )


def _class_names(record: Any) -> tuple[str, ...] | None:
    """ImageNet's, where the number of classes and the weights' tag say so."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    if record.label_names:
        return tuple(record.label_names)
    subset = infer_imagenet_subset(record.to_dict())
    if subset is None:
        return None
    info = ImageNetInfo(subset)
    return tuple(info.index_to_description(index) for index in range(info.num_classes()))
