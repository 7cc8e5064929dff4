"""Low-rank adaptation: fine-tuning of thin layers beside the frozen ones, into which they are merged in the end.

Source: Hu et al. 2021, https://arxiv.org/abs/2106.09685; the layers are those of peft.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, model_validator

from bmctl.fit import ModuleStepConfig
from bmctl.schema import Count, Many, Positive

if TYPE_CHECKING:
    from torch import nn

    from bmctl.methods import Meta, MethodContext

VERB = "lowrank"
LEVEL = "module"
CALIBRATES = False
QUANTIZES = False


class Config(ModuleStepConfig):
    """Adapt Linear layers by training two thin layers beside each, as `recover` says; nothing else is trained.

    Attributes:
        rank: Of the two thin layers.
        alpha: What they give is scaled by alpha / rank; None for twice the rank.
        dropout: Probability by which their inputs are left out.
        include: Names of layers to adapt, such as ``*.query``; all of them when empty, but those whose weights have
            another use, as a table of embeddings has.
        ignore: Names of layers left as they are.
    """

    method: Literal["lora"] = "lora"
    rank: Count = 8
    alpha: Positive | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    include: Many[str] = ()
    ignore: Many[str] = ()

    @model_validator(mode="after")
    def _trains(self) -> Self:
        if self.recover is None:
            raise ValueError("thin layers give nothing until they are trained: add recover: {teacher: none}")
        return self


def apply(model: nn.Module, config: Config, context: MethodContext) -> Meta:
    """Put thin layers beside others in place, and freeze everything else.

    Args:
        model: Changed in place; it computes what it did.
        config: The step.
        context: Not looked at.

    Returns:
        `layers`: names; `merged`: False.

    Raises:
        DependencyError: peft is not installed.
        RecipeError: A pattern matches no layer.
        UnsupportedError: There is no layer to adapt.
    """
    from bmctl.methods.lora import adapters

    return adapters.adapt(model, config)


def finish(model: nn.Module, config: Config, meta: Meta) -> Meta:
    """Merge what was trained into the layers, which are as many and as large as before; `merged` is True then."""
    from bmctl.methods.lora import adapters

    adapters.merge(model, meta["layers"])
    return {**meta, "merged": True}


def restore(model: nn.Module, config: Config, meta: Meta) -> None:
    """Put the thin layers in place, whose weights are loaded afterwards; nothing where they are merged.

    Raises:
        DependencyError: peft is not installed.
        PackageError: The meta does not fit the model.
    """
    from bmctl.methods.lora import adapters

    adapters.restore(model, config, meta)
