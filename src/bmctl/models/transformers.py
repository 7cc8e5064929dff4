"""``transformers:NAME``: classifiers of images and of texts, whichever the data give, and causal language models.

NAME is an architecture such as `vit` or `bert`, whose configuration `args` may change; or a repository on the hub such
as `google/vit-base-patch16-224`, or a folder with config.json, model.safetensors and, for texts, tokenizer.json. Their
configuration is stored in the package.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Literal

from bmctl.core.published import Published, PublishedImage, PublishedText
from bmctl.errors import RecipeError
from bmctl.models import repositories
from bmctl.models.downloads import from_hub
from bmctl.models.spec import (
    Drops,
    ModelConfig,
    ModelSpec,
    bare_name,
    check_fits,
    construct,
    image_of,
    is_causal,
    takes_text,
    told_of,
    unknown_argument,
    words,
)

if TYPE_CHECKING:
    from torch import nn

CONFIG = "config_json"
"""The argument that holds a repository's configuration, so that the package can be built again without it."""
TOKENIZER = "tokenizer.json"

Kind = Literal["image", "text", "causal"]
_WORDS = {"image": "classifier of images", "text": "classifier of texts", "causal": "causal language model"}
# What would run code of others, read files, or is told by the data.
_OURS = {
    "num_labels", "id2label", "label2id", "num_channels", "image_size", "vocab_size", "pad_token_id", "auto_map",
    "quantization_config",
}  # fmt: skip
_OF_DATA = {"num_channels", "image_size", "vocab_size", "pad_token_id"}
_RUNTIME = {
    "architectures", "attn_implementation", "dtype", "experts_implementation", "model_type", "name_or_path",
    "torch_dtype", "transformers_version",
}  # fmt: skip
_DROPOUT = (
    "hidden_dropout_prob", "dropout_rate", "ffn_dropout", "resid_pdrop", "drop_mlp_rate", "classifier_dropout_prob",
    "dropout",
)  # fmt: skip
_STOCHASTIC_DEPTH = ("drop_path_rate", "drop_connect_rate")
_FILTERS = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # PIL's numbers, as preprocessor_config.json has them
_ENDLESS = 1_000_000
"""Tokenizers without a longest text say so by a huge number."""


def names() -> list[str]:
    """The architectures; repositories are known to the hub alone."""
    # timm has a source of its own, with its own rules for what may be fetched.
    return sorted({*_known("image"), *_known("text"), *_known("causal")} - {"timm_wrapper"})


def is_elsewhere(bare: str) -> bool:
    """Whether a name may be that of a repository or a folder, which no list has."""
    return "/" in bare or repositories.is_folder(bare)


def resolve(spec: ModelSpec) -> ModelSpec:
    """The spec with a repository's configuration inside.

    Raises:
        DependencyError: It cannot be downloaded.
    """
    if CONFIG in spec.args or (name := bare_name(spec.name)) in names():
        return spec
    raw = _repository_config(name)
    stored = {key: value for key, value in raw.items() if _is_plain(key)} | {"model_type": raw["model_type"]}
    return spec.model_copy(update={"args": {**spec.args, CONFIG: json.dumps(stored, sort_keys=True)}})


def published(config: ModelConfig) -> Published:
    """Of images channels, size and, with published weights, what their image processor does; of texts the tokenizer."""
    name = bare_name(config.name)
    if name in names():
        if config.pretrained:
            raise RecipeError(
                f"model.pretrained: {config.name} is an architecture, not published weights",
                hint="name a repository, such as transformers:google/vit-base-patch16-224",
            )
        if name in _known("image"):
            return Published(input=PublishedImage(size=_pair(getattr(_config(name, {}), "image_size", None))))
        return Published(input=PublishedText())
    raw = _repository_config(name)
    of_images = raw["model_type"] in _known("image")
    told = _image(name, raw, pretrained=config.pretrained) if of_images else _text(name, raw)
    if not config.pretrained:
        return Published(input=told)
    classes = [str(each) for each in raw.get("architectures") or ()]
    if classes and not any(each.endswith("Classification") for each in classes):  # a body alone, such as a BertModel
        return Published(input=told, has_weights=True)
    labels = raw.get("id2label") or {}
    return Published(
        input=told,
        has_weights=True,
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
    """A module from images, or from token ids and their mask, to logits of the classes or of the next token.

    Raises:
        RecipeError: An argument, a size, a number of channels or a tokenizer that the model does not take.
        DependencyError: transformers is not installed, or the weights cannot be downloaded.
    """
    repositories.require()
    check_fits(spec, reserved=_OURS)
    spec = resolve(spec)
    stored = json.loads(str(spec.args[CONFIG])) if CONFIG in spec.args else {}
    changes = {key: value for key, value in spec.args.items() if key != CONFIG}
    strange = sorted(key for key in {**stored, **changes} if not _is_plain(key) and key != "model_type")
    if strange:
        raise RecipeError(f"model.args: {strange[0]} may not be set", hint=f"remove {strange[0]} from model.args")
    architecture = str(stored["model_type"]) if stored else bare_name(spec.name)
    kind: Kind = "image" if not takes_text(spec) else "causal" if is_causal(spec) else "text"
    if architecture not in _known(kind):
        others: dict[Kind, Kind] = {"image": "text", "text": "image"}
        is_of_others = kind in others and architecture in _known(others[kind])
        takes = f"takes {others[kind]}s" if is_of_others else f"is no {_WORDS[kind]} of transformers"
        raise RecipeError(
            f"model.name: {spec.name} {takes}; the data give {words(spec.given)}",
            hint=f"take one of the types {', '.join(sorted(_known(kind))[:8])}, ...",
        )
    known = _arguments(architecture)
    for key in sorted(set(changes) - known):
        raise unknown_argument(spec.name, key, known={each for each in known if each not in _OURS})

    def make() -> nn.Module:
        values = {key: value for key, value in {**stored, **changes}.items() if key != "model_type"}
        labels = {} if kind == "causal" else {"num_labels": told_of(spec, "num_classes")}
        config = _config(architecture, {**values, **labels})
        told = _tell_image if kind == "image" else _tell_text
        told(config, spec, is_stored=CONFIG in spec.args, pretrained=pretrained)
        return _make(spec, config, kind=kind, pretrained=pretrained)

    return _plain(construct(make, spec=spec), spec, kind=kind)


def _plain(model: nn.Module, spec: ModelSpec, *, kind: Kind) -> nn.Module:
    """Called by position, giving tensors.

    Raises:
        RecipeError: A language model that keeps something else than keys and values, or counts places itself.
    """
    from bmctl.models.own.networks import ImageLogits, TextLogits

    if kind != "causal":
        return {"image": ImageLogits, "text": TextLogits}[kind](model)
    from bmctl.models.own import causal

    try:
        return causal.wrapped(model, max_tokens=told_of(spec, "max_tokens"))
    except causal.OtherKindError as error:
        raise RecipeError(
            f"model.name: {spec.name} {error}", hint="take another architecture, such as transformers:llama"
        ) from error


def _make(spec: ModelSpec, config: Any, *, kind: Kind, pretrained: bool) -> nn.Module:
    """The model; eager attention is what every architecture has and every exporter knows."""
    import transformers

    of_kind = {
        "image": transformers.AutoModelForImageClassification,
        "text": transformers.AutoModelForSequenceClassification,
        "causal": transformers.AutoModelForCausalLM,
    }[kind]
    with repositories.quiet():
        if not pretrained:
            return of_kind.from_config(config, attn_implementation="eager")
        name = bare_name(spec.name)
        with from_hub(spec.name):
            model, found = of_kind.from_pretrained(
                name,
                config=config,
                attn_implementation="eager",
                ignore_mismatched_sizes=True,
                trust_remote_code=False,
                use_safetensors=True,
                local_files_only=repositories.is_folder(name),
                dtype="float32",
                output_loading_info=True,
            )
    body = f"{model.base_model_prefix}." if kind != "causal" else ""  # of a language model the head is needed as well
    missing = sorted(key for key in found["missing_keys"] if key.startswith(body) and "pooler" not in key)
    others = sorted(str(key[0]) for key in found["mismatched_keys"] if str(key[0]).startswith(body))
    if missing or others:
        raise RecipeError(
            f"model.pretrained: the published weights of {spec.name} do not fit ({(missing + others)[0]})",
            hint="leave model.args as published, or set model.pretrained to false",
        )
    return model


def _tell_image(config: Any, spec: ModelSpec, *, is_stored: bool, pretrained: bool) -> None:
    channels, size = image_of(spec)
    if hasattr(config, "num_channels"):
        config.num_channels = channels
    if not pretrained and hasattr(config, "image_size"):
        config.image_size = size[0] if size[0] == size[1] else size


def _tell_text(config: Any, spec: ModelSpec, *, is_stored: bool, pretrained: bool) -> None:
    vocab_size, max_tokens = told_of(spec, "vocab_size"), told_of(spec, "max_tokens")
    if not is_stored:
        config.vocab_size = vocab_size
    if not is_stored or config.pad_token_id is None:
        config.pad_token_id = told_of(spec, "pad_id")
    if vocab_size > config.vocab_size:
        raise RecipeError(
            f"data.input.tokenizer: it has {vocab_size} tokens, {spec.name} knows {config.vocab_size}",
            hint="leave data.input.tokenizer out: the model brings its own",
        )
    longest = getattr(config, "max_position_embeddings", None)
    if isinstance(longest, int) and max_tokens > longest:
        raise RecipeError(
            f"data.input.max_tokens: {max_tokens}, but {spec.name} takes at most {longest}",
            hint=f"--set data.input.max_tokens={longest}",
        )


def _image(name: str, raw: dict[str, Any], *, pretrained: bool) -> PublishedImage:
    size, channels = _pair(raw.get("image_size")), raw.get("num_channels", 3)
    if not pretrained:
        return PublishedImage(size=size, channels=channels)
    processor = repositories.fetch_json(name, "preprocessor_config.json")
    target = processor.get("crop_size") if processor.get("do_center_crop") else processor.get("size")
    size = _pair(target) or size
    resized = _pair(processor.get("size"))
    return PublishedImage(
        size=size,
        channels=channels,
        mean=processor.get("image_mean") or (0.5,) * channels,
        std=processor.get("image_std") or (0.5,) * channels,
        interpolation=_FILTERS.get(processor.get("resample", 2), "bilinear"),  # type: ignore[arg-type]
        crop=min(1.0, size[0] / resized[0]) if size and resized and processor.get("do_center_crop") else None,
    )


def _text(name: str, raw: dict[str, Any]) -> PublishedText:
    path = repositories.fetch_file(name, TOKENIZER)
    settings = repositories.fetch_json(name, "tokenizer_config.json", default={})
    limits = (raw.get("max_position_embeddings"), settings.get("model_max_length"))
    longest = min((each for each in limits if isinstance(each, int) and 0 < each < _ENDLESS), default=None)
    return PublishedText(
        max_tokens=longest,
        vocab_size=raw.get("vocab_size"),
        pad_id=_id(raw.get("pad_token_id")),
        begin_id=_id(raw.get("bos_token_id")),
        end_id=_id(raw.get("eos_token_id")),
        files={TOKENIZER: str(path)} if path else {},
    )


def _id(value: Any) -> int | None:
    """A token; the first of several, as models have that end in many ways."""
    first = value[0] if isinstance(value, list) and value else value
    return first if type(first) is int and first >= 0 else None


def _known(kind: Kind) -> frozenset[str]:
    """The architectures that classify images, or texts, or go on with texts."""
    repositories.require()
    from transformers.models.auto import modeling_auto

    found = {
        "image": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
        "text": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    }
    return frozenset(found[kind])


def _config(architecture: str, values: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    with repositories.quiet():
        return AutoConfig.for_model(architecture, **values)


def _arguments(architecture: str) -> frozenset[str]:
    """What the architecture's own configuration has, beyond what that of every model has."""
    import dataclasses

    from transformers import CONFIG_MAPPING, PreTrainedConfig

    own = CONFIG_MAPPING[architecture]
    of_all = {each.name for each in dataclasses.fields(PreTrainedConfig)}
    return frozenset({each.name for each in dataclasses.fields(own)} - of_all | set(own.attribute_map))


def _is_plain(key: str) -> bool:
    """Whether a key of a configuration describes the architecture, and nothing that runs, fetches or names classes."""
    return not key.startswith("_") and key not in _RUNTIME | (_OURS - _OF_DATA)


def _repository_config(name: str) -> dict[str, Any]:
    found = repositories.fetch_json(name, repositories.CONFIG)
    if found.get("model_type") not in names():
        raise RecipeError(
            f"model.name: transformers:{name} is of the type {found.get('model_type')!r}, "
            "which is neither a classifier of images or texts nor a language model of transformers",
            hint=f"take one of the types {', '.join(names()[:8])}, ...",
        )
    return found


def _pair(size: Any) -> tuple[int, int] | None:
    """(height, width) of the ways in which transformers writes a size."""
    if isinstance(size, dict):
        side = size.get("shortest_edge")
        return (side, side) if side else (size["height"], size["width"]) if "height" in size else None
    if isinstance(size, (list, tuple)):
        return (size[0], size[1])
    return (size, size) if size else None
