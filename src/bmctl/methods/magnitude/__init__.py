"""Magnitude pruning: the smallest weights of all layers together become zero, and stay zero.

Source: Han et al. 2015, https://arxiv.org/abs/1506.02626
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from bmctl.fit import ModuleStepConfig
from bmctl.schema import Many

if TYPE_CHECKING:
    from torch import nn

    from bmctl.methods import Meta, MethodContext

VERB = "prune"
LEVEL = "module"
CALIBRATES = False
QUANTIZES = False


class Config(ModuleStepConfig):
    """Prune the smallest weights of all Conv and Linear layers, ranked together.

    Attributes:
        sparsity: Fraction of the ranked weights that are zero afterwards, earlier pruning included.
        ignore: Names of layers left as they are, such as ``head`` or ``layer1.*``.
        min_weights: Layers with fewer weights than this are left as they are.
    """

    method: Literal["magnitude"] = "magnitude"
    sparsity: Annotated[float, Field(gt=0, lt=1)] = 0.5
    ignore: Many[str] = ()
    min_weights: Annotated[int, Field(ge=0)] = 0


def apply(model: nn.Module, config: Config, context: MethodContext) -> Meta:
    """Zero the smallest weights in place and hold them there.

    Args:
        model: Changed in place; layers get a `weight_mask` buffer.
        config: The step.
        context: Not looked at.

    Returns:
        `layers`: {name: number of weights kept}.

    Raises:
        UnsupportedError: Nothing to prune, or as sparse already.
        RecipeError: A pattern of `ignore` matches no layer.
    """
    from bmctl.methods.magnitude import masking

    return masking.prune(model, config)


def restore(model: nn.Module, config: Config, meta: Meta) -> None:
    """Give the layers their mask buffers, whose bits are loaded with the weights.

    Raises:
        PackageError: The meta does not fit the model.
    """
    from bmctl.methods.magnitude import masking

    masking.restore(model, meta)
