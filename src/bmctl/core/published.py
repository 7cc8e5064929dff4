"""What a model's publisher says: of its input, each kind for itself, and of the classes of published weights."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from bmctl.schema import Count, Many, Strict


class PublishedImage(Strict):
    """Of images; None leaves it to the data.

    Attributes:
        size: (height, width) in pixels.
        mean: Per channel, of pixels in [0, 1]; only for published weights.
        std: Per channel, of pixels in [0, 1]; only for published weights.
        crop: Fraction of the shorter side kept by the centre crop.
    """

    kind: Literal["image"] = "image"
    size: Many[Count] | None = None
    channels: Literal[1, 3] | None = None
    mean: Many[float] | None = None
    std: Many[float] | None = None
    interpolation: Literal["nearest", "bilinear", "bicubic"] | None = None
    crop: float | None = None


class PublishedText(Strict):
    """Of texts; None leaves it to the data.

    Attributes:
        max_tokens: Most tokens of one text that the model takes.
        vocab_size: Number of token ids that published weights know.
        pad_id: The token that fills shorter texts up.
        begin_id: The token that a text begins with.
        end_id: The token that says that a text is over.
        files: Where the files of its tokenizer lie on this machine, by name: ``tokenizer.json``.
    """

    kind: Literal["text"] = "text"
    max_tokens: Count | None = None
    vocab_size: Count | None = None
    pad_id: Annotated[int, Field(ge=0)] | None = None
    begin_id: Annotated[int, Field(ge=0)] | None = None
    end_id: Annotated[int, Field(ge=0)] | None = None
    files: dict[str, str] = Field(default_factory=dict)


class Published(Strict):
    """Attributes:
    input: None where the model takes inputs of every kind and size.
    has_weights: Weights are published under this name, whether or not they bring a classifier.
    num_classes: What the published weights tell apart; None where they bring no classifier.
    class_names: In the order of the logits.
    """

    input: Annotated[PublishedImage | PublishedText, Field(discriminator="kind")] | None = None
    has_weights: bool = False
    num_classes: Count | None = None
    class_names: Many[str] | None = None

    def of(self, kind: str) -> dict[str, Any]:
        """What is said of inputs of one kind, such as ``image``: nothing, where the model is for something else."""
        if self.input is None or self.input.kind != kind:
            return {}
        return self.input.model_dump(exclude_none=True, exclude={"kind"})
