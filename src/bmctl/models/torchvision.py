"""``torchvision:NAME``: the classifiers of torchvision.models, for RGB images."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from bmctl.core.published import Published, PublishedImage
from bmctl.errors import RecipeError
from bmctl.models.downloads import fetch_weights
from bmctl.models.spec import Drops, ModelConfig, ModelSpec, bare_name, check_fits, construct, image_of, told_of

if TYPE_CHECKING:
    import torch
    from torch import nn

_OURS = {"weights", "weights_backbone", "num_classes", "progress", "image_size", "input_size", "aux_logits"}
_FIXED_SIZE = 224


def names() -> list[str]:
    """Every name that may follow ``torchvision:``."""
    import torchvision

    return torchvision.models.list_models(module=torchvision.models)


def published(config: ModelConfig) -> Published:
    """RGB; a fixed size for vision transformers; all that belongs to published weights if they are asked for."""
    name = bare_name(config.name)
    if not config.pretrained:
        size = (_FIXED_SIZE, _FIXED_SIZE) if _size_argument(name, size=()) else None
        return Published(input=PublishedImage(channels=3, size=size))
    weights = weights_of(name)
    transform = weights.transforms()
    (crop,), (resize,) = transform.crop_size, transform.resize_size
    image = PublishedImage(
        size=(crop, crop),
        channels=3,
        mean=tuple(transform.mean),
        std=tuple(transform.std),
        interpolation=transform.interpolation.value,
        crop=crop / resize,
    )
    return Published(
        input=image,
        has_weights=True,
        num_classes=len(weights.meta["categories"]),
        class_names=tuple(weights.meta["categories"]),
    )


def drop_arguments(config: ModelConfig) -> Drops:
    """What the model's class takes and its builder does not set itself."""
    import inspect
    import sys

    from torchvision.models import get_model_builder

    name = bare_name(config.name)
    builder = get_model_builder(name)
    made = inspect.unwrap(builder).__annotations__["return"]
    module = vars(sys.modules[builder.__module__])
    taken = inspect.signature(module[made] if isinstance(made, str) else made).parameters
    fixed = name.startswith(("swin_", "maxvit_"))
    return Drops(
        dropout=next((each for each in ("dropout", "drop_rate", "mlp_dropout") if each in taken), None),
        stochastic_depth="stochastic_depth_prob" if "stochastic_depth_prob" in taken and not fixed else None,
    )


def build(spec: ModelSpec, *, pretrained: bool = False) -> nn.Module:
    """A module from float32 [N, 3, H, W] to logits [N, num_classes].

    Raises:
        RecipeError: Grey images, an unknown argument, or published weights that do not fit the arguments.
        DependencyError: Weights that cannot be downloaded.
    """
    import torchvision

    name = bare_name(spec.name)
    channels, size = image_of(spec)
    if channels != 3:
        raise RecipeError(f"{spec.name} takes 3 channels, got {channels}", hint="--set data.input.channels=3")
    check_fits(spec, reserved=_OURS)
    fixed: dict[str, Any] = _size_argument(name, size=size)
    if name in ("googlenet", "inception_v3"):  # their auxiliary heads are for training from scratch only
        fixed |= {"aux_logits": False, "init_weights": True}
    num_classes = told_of(spec, "num_classes")
    model: nn.Module = construct(
        lambda: torchvision.models.get_model(name, weights=None, num_classes=num_classes, **fixed, **spec.args),
        spec=spec,
    )
    if pretrained:
        weights = weights_of(name)
        prefix = weights.url.rpartition("-")[2].partition(".")[0]
        load_published(model, fetch_weights(weights.url, sha256_prefix=prefix), spec=spec)
    return model


@lru_cache
def weights_of(name: str) -> Any:
    """torchvision's default weights of a model: its `url`, `transforms` and `meta`."""
    from torchvision.models import get_model_weights

    return get_model_weights(name).DEFAULT


def load_published(model: nn.Module, state: dict[str, torch.Tensor], *, spec: ModelSpec) -> None:
    """Load everything but a head of another number of classes and the auxiliary heads.

    Raises:
        RecipeError: Anything else differs in shape or name.
    """
    mine = model.state_dict()
    head = list(mine)[-2:]  # in every model of torchvision the classifier comes last
    state = {name: tensor for name, tensor in state.items() if name in mine or not name.lower().startswith("aux")}
    for name in head:
        if name in state and state[name].shape != mine[name].shape and len(state[name]) != spec.told["num_classes"]:
            del state[name]
    try:
        result = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        first = str(error).splitlines()[1:2]
        raise RecipeError(
            f"model.pretrained: the published weights of {spec.name} do not fit ({' '.join(first).strip()})",
            hint="leave model.args and data.input.size as published, or set model.pretrained to false",
        ) from error
    missing = sorted(set(result.missing_keys) - set(head)) + sorted(result.unexpected_keys)
    if missing:
        raise RecipeError(
            f"model.pretrained: the published weights of {spec.name} do not fit ({missing[0]})",
            hint="leave model.args as published, or set model.pretrained to false",
        )


def _size_argument(name: str, *, size: tuple[int, ...]) -> dict[str, Any]:
    """The constructor's argument that fixes the image size, for the models that have one."""
    if name.startswith("vit_"):
        return {"image_size": size[0] if size else None}
    return {"input_size": size} if name == "maxvit_t" else {}
