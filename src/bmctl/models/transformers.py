"""``transformers:NAME``: image classifiers of transformers.

NAME is an architecture such as `vit` or `resnet`, whose configuration `args` may change; or a repository on the hub
such as `google/vit-base-patch16-224`, or a folder with one, whose configuration is stored in the package.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bmctl.errors import DependencyError, PackageError, RecipeError
from bmctl.models.downloads import from_hub
from bmctl.models.spec import Drops, InputDefaults, ModelConfig, ModelSpec, bare_name, check_fits, construct

if TYPE_CHECKING:
    from torch import nn

CONFIG = "config_json"
"""The argument that holds a repository's configuration, so that the package can be built again without it."""

# What would run code of others, read files, or is told by the data.
_OURS = {"num_labels", "id2label", "label2id", "num_channels", "image_size", "auto_map", "quantization_config"}
_RUNTIME = {
    "architectures", "attn_implementation", "dtype", "experts_implementation", "model_type", "name_or_path",
    "torch_dtype", "transformers_version",
}  # fmt: skip
_DROPOUT = (
    "hidden_dropout_prob", "dropout_rate", "ffn_dropout", "resid_pdrop", "drop_mlp_rate", "classifier_dropout_prob",
)  # fmt: skip
_STOCHASTIC_DEPTH = ("drop_path_rate", "drop_connect_rate")
_FILTERS = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # PIL's numbers, as preprocessor_config.json has them


def names() -> list[str]:
    """The architectures; repositories are known to the hub alone."""
    _require()
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as known

    # timm has a source of its own, with its own rules for what may be fetched.
    return sorted(set(known) - {"timm_wrapper"})


def resolve(spec: ModelSpec) -> ModelSpec:
    """The spec with a repository's configuration inside.

    Raises:
        DependencyError: It cannot be downloaded.
    """
    name = bare_name(spec.name)
    if CONFIG in spec.args or name in names():
        return spec
    raw = _repository_config(name)
    stored = {key: value for key, value in raw.items() if _is_plain(key)} | {"model_type": raw["model_type"]}
    return spec.model_copy(update={"args": {**spec.args, CONFIG: json.dumps(stored, sort_keys=True)}})


def input_defaults(config: ModelConfig) -> InputDefaults:
    """Channels and size from the configuration; with published weights also what their image processor does."""
    name = bare_name(config.name)
    if name in names():
        if config.pretrained:
            raise RecipeError(
                f"model.pretrained: {config.name} is an architecture, not published weights",
                hint="name a repository, such as transformers:google/vit-base-patch16-224",
            )
        return InputDefaults(size=_pair(getattr(_config(name, {}), "image_size", None)))
    raw = _repository_config(name)
    size, channels = _pair(raw.get("image_size")), raw.get("num_channels", 3)
    if not config.pretrained:
        return InputDefaults(size=size, channels=channels)
    labels = raw.get("id2label") or {}
    processor = _fetch_json(name, "preprocessor_config.json")
    target = processor.get("crop_size") if processor.get("do_center_crop") else processor.get("size")
    size = _pair(target) or size
    resized = _pair(processor.get("size"))
    return InputDefaults(
        size=size,
        channels=channels,
        mean=processor.get("image_mean") or (0.5,) * channels,
        std=processor.get("image_std") or (0.5,) * channels,
        interpolation=_FILTERS.get(processor.get("resample", 2), "bilinear"),  # type: ignore[arg-type]
        crop=min(1.0, size[0] / resized[0]) if size and resized and processor.get("do_center_crop") else None,
        num_classes=len(labels) or 2,
        class_names=tuple(labels[key] for key in sorted(labels, key=int)) or None,
    )


def drop_arguments(config: ModelConfig) -> Drops:
    """The first of the names that the architecture's configuration has, for one probability over the whole model."""
    name = bare_name(config.name)
    plain = _config(name if name in names() else str(_repository_config(name)["model_type"]), {})

    def first(candidates: tuple[str, ...]) -> str | None:
        return next((each for each in candidates if isinstance(getattr(plain, each, None), int | float)), None)

    return Drops(dropout=first(_DROPOUT), stochastic_depth=first(_STOCHASTIC_DEPTH))


def build(spec: ModelSpec, *, pretrained: bool = False) -> nn.Module:
    """A module from float32 [N, channels, H, W] to logits [N, num_classes].

    Raises:
        RecipeError: An argument, a size or a number of channels that the model does not take.
        DependencyError: transformers is not installed, or the weights cannot be downloaded.
    """
    _require()
    from transformers import AutoModelForImageClassification

    from bmctl.models.own.networks import Logits

    check_fits(spec, reserved=_OURS)
    name = bare_name(spec.name)
    spec = resolve(spec)
    stored = json.loads(str(spec.args[CONFIG])) if CONFIG in spec.args else {}
    changes = {key: value for key, value in spec.args.items() if key != CONFIG}
    strange = sorted(key for key in {**stored, **changes} if not _is_plain(key) and key != "model_type")
    if strange:
        raise RecipeError(f"model.args: {strange[0]} may not be set", hint=f"remove {strange[0]} from model.args")

    def make() -> nn.Module:
        values = {**stored, **changes, "num_labels": spec.num_classes}
        architecture = values.pop("model_type", name)
        if architecture not in names():
            raise ValueError(f"{architecture!r} is no image classifier of transformers")
        config = _config(architecture, values)
        if hasattr(config, "num_channels"):
            config.num_channels = spec.channels
        if not pretrained and hasattr(config, "image_size"):
            config.image_size = spec.size[0] if spec.size[0] == spec.size[1] else tuple(spec.size)
        with _quiet():
            if not pretrained:
                return AutoModelForImageClassification.from_config(config, attn_implementation="eager")
            with from_hub(spec.name):
                return AutoModelForImageClassification.from_pretrained(
                    name,
                    config=config,
                    attn_implementation="eager",
                    ignore_mismatched_sizes=True,
                    trust_remote_code=False,
                    dtype="float32",
                )

    return Logits(construct(make, spec=spec))


def _config(architecture: str, values: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(architecture, **values)


def _is_plain(key: str) -> bool:
    """Whether a key of a configuration describes the architecture, and nothing that runs, fetches or names classes."""
    return not key.startswith("_") and key not in _RUNTIME | (_OURS - {"num_channels", "image_size"})


def _repository_config(name: str) -> dict[str, Any]:
    found = _fetch_json(name, "config.json")
    if found.get("model_type") not in names():
        raise RecipeError(
            f"model.name: transformers:{name} is of the type {found.get('model_type')!r}, "
            "which is no image classifier of transformers",
            hint=f"take one of the types {', '.join(names()[:8])}, ...",
        )
    return found


def _fetch_json(name: str, file: str) -> dict[str, Any]:
    """A small file of a repository on the hub, or of a folder."""
    _require()
    from huggingface_hub import hf_hub_download

    path = Path(name) / file
    if not Path(name).is_dir():
        with from_hub(f"transformers:{name}"):
            path = Path(hf_hub_download(name, file))
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PackageError(f"{path}: cannot be read ({error})", hint="fetch the model again") from error
    if not isinstance(found, dict):
        raise PackageError(f"{path}: expected an object", hint="fetch the model again")
    return found


def _pair(size: Any) -> tuple[int, int] | None:
    """(height, width) of the ways in which transformers writes a size."""
    if isinstance(size, dict):
        side = size.get("shortest_edge")
        return (side, side) if side else (size["height"], size["width"]) if "height" in size else None
    if isinstance(size, (list, tuple)):
        return (size[0], size[1])
    return (size, size) if size else None


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers reports on stderr what bmctl says itself: a new head, a bar while loading."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _require() -> None:
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise DependencyError(
            "models named transformers:... need transformers, which is not installed",
            hint="pip install 'bmctl[transformers]'",
        ) from error
