"""What a recipe may say of a language model, what a manifest keeps of its data, and the names of its tensors."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from bmctl.schema import Count, NotNegative, Strict

IDS, MASK, AT = "input_ids", "attention_mask", "at"
NUM_BYTES, BZIP2 = "num_bytes", "bzip2_bytes"


class Generate(Strict):
    """How texts are gone on with.

    Attributes:
        max_tokens: New tokens at most.
        temperature: Of the distribution that is drawn from; 0 takes the likeliest token.
        top_k: Only so many of the likeliest tokens.
        top_p: Only the likeliest tokens that together are as likely as this.
        seed: Of the draws; the same prompt is gone on with alike, whatever it is sent with.
    """

    max_tokens: Count = 64
    temperature: NotNegative = 0.0
    top_k: Count | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0


class Config(Strict):
    kind: Literal["lm"] = "lm"
    generate: Generate = Generate()


class Facts(Strict):
    """What the data say that a model of this task has to know.

    Attributes:
        vocab_size: Logits of each place.
        max_tokens: Longest text, prompt and what follows together.
        end_id: The token that ends a text.
    """

    kind: Literal["lm"] = "lm"
    vocab_size: Count
    max_tokens: Count
    end_id: Annotated[int, Field(ge=0)]
