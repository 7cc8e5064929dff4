"""Structured pruning: whole channels go, in every layer that depends on them, and the model gets smaller.

Source: Li et al. 2017, https://arxiv.org/abs/1608.08710; Fang et al. 2023, https://arxiv.org/abs/2301.12900
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from bmctl.fit import ModuleStepConfig
from bmctl.schema import Count, Many

if TYPE_CHECKING:
    from torch import nn

    from bmctl.methods import Meta, MethodContext

VERB = "prune"
LEVEL = "module"
CALIBRATES = False
QUANTIZES = False


class Config(ModuleStepConfig):
    """Prune channels over dependency groups; the classes stay.

    Attributes:
        ratio: Fraction of channels removed; half of them is about a quarter of the weights.
        scope: `group` takes the fraction of every group, `global` ranks the channels of all groups together.
        max_ratio: With `global`, no group loses more than this fraction.
        round_to: What is left of each group is a multiple of this.
        norm: Norm of a channel's weights, over all layers of its group, that says how important it is.
        ignore: Names of layers whose output channels stay, with all that depend on them.
    """

    method: Literal["structured"] = "structured"
    ratio: Annotated[float, Field(gt=0, lt=1)] = 0.5
    scope: Literal["group", "global"] = "group"
    max_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.9
    round_to: Count = 1
    norm: Literal["l1", "l2"] = "l2"
    ignore: Many[str] = ()


def apply(model: nn.Module, config: Config, context: MethodContext) -> Meta:
    """Remove channels in place.

    Args:
        model: Changed in place, and of no use after an error.
        config: The step.
        context: `example` is what the model is traced and checked with.

    Returns:
        `shapes`: {tensor: new shape}; `attributes`: {module: {attribute: value}}; `groups`: {name: [before, after]}.

    Raises:
        UnsupportedError: The model cannot be traced, nothing is left to prune, or nothing would be left of a layer.
        RecipeError: A pattern of `ignore` matches no layer.
    """
    from bmctl.methods.structured import pruning

    return pruning.prune(model, config, context)


def restore(model: nn.Module, config: Config, meta: Meta) -> None:
    """Set the recorded attributes and put empty tensors of the recorded shapes in place.

    Raises:
        PackageError: The meta does not fit the model.
    """
    from bmctl.methods.structured import pruning

    pruning.restore(model, meta)
