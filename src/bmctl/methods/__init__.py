"""One file = one compression method. A new method is a file here and a line in METHODS.

With much torch code it is a folder: what recipes need of it in `__init__`, and the code in a file with torch on top.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pydantic import Field

from bmctl.core.plugins import Room, plugins
from bmctl.fit import ModuleStepConfig
from bmctl.schema import StepConfig

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

Example = Mapping[str, "torch.Tensor"]
"""Samples by the names of what the model takes, in its order."""
Meta = dict[str, Any]
"""Small JSON: all that `restore` needs to rebuild the structure."""


@dataclass(frozen=True)
class MethodContext:
    """What a method may look at.

    Attributes:
        example: Two real samples as the model takes them, in its order: it is called with the values, by position.
        calibration: Yields recorded calls of the graph at hand on calibration samples: arrays by its inputs' names;
            nothing without data.
        calibration_record: What the calibration data is, as the manifest records it.
        check: To be called in every long loop: raises where the user asks to stop.
    """

    example: Example
    calibration: Callable[[], Iterator[Mapping[str, np.ndarray]]]
    calibration_record: Mapping[str, Any]
    check: Callable[[], None] = lambda: None


class Method(Protocol):
    """What every method says of itself.

    Attributes:
        VERB: The command that applies it: prune, quantize or lowrank.
        LEVEL: ``module`` or ``graph``.
        CALIBRATES: It looks at calibration samples, so many as its `num_samples(config)` says, and needs data.
        QUANTIZES: It leaves integers, which no further step rounds again.
    """

    VERB: str
    LEVEL: str
    CALIBRATES: bool
    QUANTIZES: bool
    Config: type[StepConfig]


class ModuleMethod(Method, Protocol):
    """LEVEL = "module": changes weights or structure of an nn.Module in place.

    One whose structure is there for the recovery alone has ``finish(model, config, meta) -> meta`` as well: it is
    called after the recovery, and what it returns is what `restore` is given of the finished package.
    """

    def apply(self, model: nn.Module, config: StepConfig, context: MethodContext) -> Meta: ...
    def restore(self, model: nn.Module, config: StepConfig, meta: Meta) -> None:
        """Give a freshly built model the structure that `apply` left; weights are loaded afterwards."""
        ...


class GraphMethod(Method, Protocol):
    """LEVEL = "graph": reads an ONNX file, writes another."""

    def apply(self, onnx_path: Path, config: StepConfig, context: MethodContext, *, out: Path) -> Meta:
        """Write the file `out`; the meta's `precision` is what the graph computes in then."""
        ...


METHODS: Mapping[str, ModuleType] = plugins(
    Room(__name__, needs=Method, key="method", outside=tuple(ModuleStepConfig.model_fields)),
    "structured",
    "magnitude",
    "svd",
    "lora",
    "ptq",
    "cast",
)
"""By name; the first of a verb is what its command takes where nothing else is said."""


class OwnStep(ModuleStepConfig):
    """A file in the place of a method; see core.owncode."""

    method: Literal["file"] = "file"
    path: str
    args: dict[str, Any] = Field(default_factory=dict)


def of_verb(verb: str) -> list[str]:
    """Names of the methods that the command `verb` applies, its default first."""
    return [name for name, method in METHODS.items() if method.VERB == verb]
