"""What a recipe may say of texts, and what a manifest keeps of it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from bmctl.errors import RecipeError
from bmctl.schema import Count, Strict

COLUMN = "text"
IDS, MASK = "input_ids", "attention_mask"
TOKENIZER = "tokenizer.json"


class TokenizerConfig(Strict):
    """A tokenizer that is trained on the training texts.

    Attributes:
        kind: How words are cut up: `wordpiece` as BERT does, or `bpe` as GPT-2 does, on bytes. None is `wordpiece`, and
            `bpe` for tasks that write texts, which need every byte back.
        vocab_size: Number of tokens at most; fewer where the texts do not hold so many.
        lowercase: Capitals are read as small letters; None is yes, and no for tasks that write texts.
    """

    kind: Literal["wordpiece", "bpe"] | None = None
    vocab_size: Annotated[int, Field(ge=300, le=1_000_000)] = 8192
    lowercase: bool | None = None

    def for_writing(self) -> TokenizerConfig:
        """The same, decided for a task that writes texts.

        Raises:
            RecipeError: It loses capitals or spaces.
        """
        if self.kind == "wordpiece" or self.lowercase:
            key, lost = ("kind", "spaces") if self.kind == "wordpiece" else ("lowercase", "capitals")
            raise RecipeError(
                f"data.input.tokenizer.{key}: {getattr(self, key)} loses {lost}, and the task writes texts as they are",
                hint=f"remove {key}: the task decides it",
            )
        return self.model_copy(update={"kind": "bpe", "lowercase": False})


class Config(Strict):
    """Each None is filled in from the model's publisher, else from the training data; see Spec.

    Attributes:
        tokenizer: None takes the model's own; a model that brings none gets one that is trained.
    """

    kind: Literal["text"] = "text"
    max_tokens: Annotated[int, Field(ge=4, le=65536)] | None = None
    tokenizer: TokenizerConfig | None = None


class Spec(Strict):
    """From a text to the model's input, exactly as in training.

    Attributes:
        max_tokens: Longer texts are cut off; where texts are written they are refused.
        vocab_size: Number of token ids.
        pad_id: The token that fills shorter texts up, where the mask is 0.
        begin_id: Where texts are written, the token that each begins with.
        end_id: Where texts are written, the token that ends them.
    """

    kind: Literal["text"] = "text"
    max_tokens: Count
    vocab_size: Count
    pad_id: Annotated[int, Field(ge=0)]
    begin_id: Annotated[int, Field(ge=0)] | None = None
    end_id: Annotated[int, Field(ge=0)] | None = None
