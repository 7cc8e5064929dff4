"""PyTorch itself: a package's module as it is, in fp32, without gradients; what every artifact is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from bmctl.core.runner import Bounds, Closing, check_feed
from bmctl.schema import Signature, Strict

if TYPE_CHECKING:
    import numpy as np
    from torch import nn


class Config(Strict):
    """Attributes:
    device: `auto` takes the GPU where there is one.
    """

    name: Literal["eager"] = "eager"
    device: Literal["auto", "cpu", "cuda"] = "auto"


def open_module(model: nn.Module, *, signature: Signature, device: Any = None) -> EagerRunner:
    """A module as a runner; it is moved to `device` and put in eval mode.

    Args:
        model: Takes the signature's inputs by position, and gives its outputs in their order or by their names.
        device: A torch device, or its name; None leaves the module where it is.
    """
    return EagerRunner(model, signature, device)


def choose_device(config: Config) -> str:
    """``cuda`` or ``cpu``."""
    import torch

    if config.device != "auto":
        return config.device
    return "cuda" if torch.cuda.is_available() else "cpu"


class EagerRunner(Closing):
    """A module in eval mode; see core.runner.Runner."""

    def __init__(self, model: nn.Module, signature: Signature, device: Any) -> None:
        from bmctl.core.calling import device_of

        self._model: nn.Module | None = model.to(device) if device is not None else model
        self._device = device_of(model)
        self.signature = signature
        self.bounds: dict[str, Bounds] = {}

    def run(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One batch; floats come back as float32 or wider, whatever the module computes in."""
        import torch

        from bmctl.core.calling import call

        if self._model is None:
            raise ValueError("the runner is closed")
        checked = check_feed(feed, inputs=self.signature.inputs, bounds=self.bounds)
        # Whoever shares the module may have trained it meanwhile.
        self._model.eval()
        with torch.inference_mode():
            fields = [torch.from_numpy(_writable(array)).to(self._device) for array in checked.values()]
            outputs = call(self._model, fields, gives=[spec.name for spec in self.signature.outputs])
            return {name: _widened(tensor).cpu().numpy() for name, tensor in outputs.items()}

    def close(self) -> None:
        self._model = None


def _writable(array: np.ndarray) -> np.ndarray:
    """torch warns of arrays that may not be written to, as those of mapped files."""
    return array if array.flags.writeable else array.copy()


def _widened(tensor: Any) -> Any:
    return tensor.float() if tensor.is_floating_point() and tensor.element_size() < 4 else tensor
