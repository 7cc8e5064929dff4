"""Models as a recipe's data would have them built, and what packages say of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bmctl.inputs import image
from bmctl.models import ModelSpec
from bmctl.package import Manifest
from bmctl.schema import BATCH, Signature, TensorSpec
from bmctl.tasks import classify

TEXT = (
    TensorSpec(name="input_ids", dtype="int64", shape=(BATCH, "tokens")),
    TensorSpec(name="attention_mask", dtype="int64", shape=(BATCH, "tokens")),
)


def image_spec(
    name: str,
    *,
    args: Mapping[str, object] | None = None,
    num_classes: int = 10,
    channels: int = 1,
    size: tuple[int, int] = (28, 28),
) -> ModelSpec:
    """A model of images."""
    given = image.specs(image.Spec(size=size, channels=channels, mean=(0.5,) * channels, std=(0.5,) * channels))
    fields = {"name": name, "args": dict(args or {}), "given": given, "told": {"num_classes": num_classes}}
    return ModelSpec.model_validate(fields)


def text_spec(
    name: str,
    *,
    args: Mapping[str, object] | None = None,
    num_classes: int = 7,
    vocab_size: int = 50,
    max_tokens: int = 16,
    pad_id: int = 0,
) -> ModelSpec:
    """A model of texts."""
    told = {"num_classes": num_classes, "vocab_size": vocab_size, "max_tokens": max_tokens, "pad_id": pad_id}
    return ModelSpec.model_validate({"name": name, "args": dict(args or {}), "given": TEXT, "told": told})


def causal_spec(
    name: str, *, args: Mapping[str, object] | None = None, vocab_size: int = 50, max_tokens: int = 16
) -> ModelSpec:
    """A language model."""
    told = {"head": "causal", "vocab_size": vocab_size, "max_tokens": max_tokens, "pad_id": 0}
    return ModelSpec.model_validate({"name": name, "args": dict(args or {}), "given": TEXT, "told": told})


def classifier(spec: ModelSpec, *, class_names: Sequence[str] | None = None) -> dict[str, Any]:
    """What the manifest of a classifier says of it; classes are called by their numbers where nothing else is said."""
    names = tuple(class_names) if class_names else tuple(str(i) for i in range(spec.told["num_classes"]))
    facts = classify.Facts(class_names=names)
    return {
        "model": spec,
        "parts": classify.signatures(spec.given, facts),
        "task": classify.Config().model_dump(mode="json"),
        "facts": facts.model_dump(mode="json"),
    }


def signature_of(spec: ModelSpec) -> Signature:
    """Of a classifier's one graph."""
    found: Signature = classifier(spec)["parts"]["model"]
    return found


def manifest_of(spec: ModelSpec, **fields: Any) -> Manifest:
    """Of a classifier's package."""
    return Manifest.model_validate({"stage": "train", "key": "k", **classifier(spec), **fields})
