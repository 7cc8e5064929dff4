"""Low rank: a Linear or Conv2d becomes two smaller layers, by truncated singular value decomposition.

Source: Eckart and Young 1936; for convolutions Denton et al. 2014, https://arxiv.org/abs/1404.0736, and Zhang et al.
2015, https://arxiv.org/abs/1505.06798.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, model_validator

from bmctl.fit import ModuleStepConfig
from bmctl.schema import Count, Many

if TYPE_CHECKING:
    from torch import nn

    from bmctl.methods import Meta, MethodContext

VERB = "lowrank"
LEVEL = "module"
CALIBRATES = False
QUANTIZES = False


class Config(ModuleStepConfig):
    """Factorise Linear and Conv2d layers, to exactly one of `rank`, `ratio` and `energy`.

    Attributes:
        rank: The same rank for every layer.
        ratio: Fraction of each layer's weights that the two factors have at most.
        energy: Fraction of each layer's squared singular values that is kept at least.
        include: Names of layers to factorise, such as ``layer4.*``; all of them when empty.
        ignore: Names of layers left as they are.
        min_weights: Layers with fewer weights than this are left as they are: two small layers are slower than one.
    """

    method: Literal["svd"] = "svd"
    rank: Count | None = None
    ratio: Annotated[float, Field(gt=0, lt=1)] | None = None
    energy: Annotated[float, Field(gt=0, lt=1)] | None = None
    include: Many[str] = ()
    ignore: Many[str] = ()
    min_weights: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _one_criterion(self) -> Self:
        given = [key for key in ("rank", "ratio", "energy") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of rank, ratio and energy, got {', '.join(given) or 'none'}")
        return self


def apply(model: nn.Module, config: Config, context: MethodContext) -> Meta:
    """Replace layers in place.

    Args:
        model: Changed in place.
        config: The step.
        context: `example` shows which layers the forward pass calls.

    Returns:
        `layers`: {name: rank}; `kept`: {name: why it was left}; `notes`.

    Raises:
        UnsupportedError: No layer gets smaller, or the model does not run with its factors.
        RecipeError: A pattern matches no layer.
    """
    from bmctl.methods.svd import factorise

    return factorise.factorise(model, config, context)


def restore(model: nn.Module, config: Config, meta: Meta) -> None:
    """Put empty factors of the recorded ranks in place; their weights are loaded afterwards.

    Raises:
        PackageError: The meta does not fit the model.
    """
    from bmctl.methods.svd import factorise

    factorise.restore(model, meta)
