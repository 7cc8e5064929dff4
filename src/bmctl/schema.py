"""What every section of a recipe and every manifest is made of: strict, frozen, torch-free models."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from bmctl.errors import RecipeError

T = TypeVar("T")
Many = Annotated[tuple[T, ...], Field(strict=False)]
"""A list in YAML or JSON, a tuple in memory."""

Positive = Annotated[float, Field(gt=0)]
Ratio = Annotated[float, Field(ge=0, le=1)]
NotNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]


class Strict(BaseModel):
    """Frozen; unknown keys, coercions such as ``"5"`` to 5, nan and inf are refused at every depth."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        validate_default=True,
        protected_namespaces=(),
    )


VARIABLE = re.compile(r"\$\{ENV:([A-Za-z_][A-Za-z0-9_]*)\}")


def resolve_env(text: str) -> str:
    """Replace each ``${ENV:NAME}``, where the value is used; what is saved and shown keeps the name.

    Raises:
        RecipeError: Variables that are not set, all of them.
    """
    unset = sorted({name for name in VARIABLE.findall(text) if name not in os.environ})
    if unset:
        raise RecipeError(f"environment variables not set: {', '.join(unset)}", hint=f"export {unset[0]}=...")
    return VARIABLE.sub(lambda found: os.environ[found.group(1)], text)


BATCH = "batch"
"""The free axis along which samples lie: rows of it may be cut and joined."""


class TensorSpec(Strict):
    """One input or output of a graph.

    Attributes:
        name: The graph's name for it.
        dtype: A NumPy dtype name, such as ``float32``.
        shape: A size where it is fixed; where it is free the axis' name, such as ``batch`` or ``tokens``. Axes of one
            name are of one size in one call.
        role: ``scores`` are compared by their largest too; ``state``, as a KV cache, is handed on unseen.
        meaning: What the numbers are, such as ``normalised image, channels first``.
    """

    name: str
    dtype: str
    shape: Many[int | str]
    role: Literal["value", "scores", "state"] = "value"
    meaning: str = ""


class Signature(Strict):
    """What a graph takes and gives, in its own order."""

    inputs: Many[TensorSpec]
    outputs: Many[TensorSpec]

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the free axes of its inputs, each once, in the order in which they come."""
        return tuple(dict.fromkeys(size for spec in self.inputs for size in spec.shape if isinstance(size, str)))


class Span(Strict):
    """Smallest, most common and largest size of a free axis that an engine is built for."""

    min: Annotated[int, Field(ge=0, le=2**31 - 1)] = 1
    opt: Annotated[int, Field(ge=0, le=2**31 - 1)] = 8
    max: Count = 64


class StepConfig(Strict):
    """What every compression step has; each method's Config adds `method` and its own knobs.

    Attributes:
        name: Of the step's package and checkpoints; the method's name without one.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_\-]{0,39}$")] | None = None


Emit = Callable[[Mapping[str, object]], None]
"""Where the engine sends its events: plain dicts with an ``event`` key, one line of metrics.jsonl each."""
