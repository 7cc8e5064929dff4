"""torch.compile for training steps: tried before the first one, and done without where it fails."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch._dynamo
from torch import nn
from torch.distributed.fsdp import FSDPModule

from bmctl.engine.computing.precision import Precision
from bmctl.engine.modules.buffers import copy_buffers, with_buffers
from bmctl.engine.randomness import random_state, set_random_state

# What compilers and their backends raise, on the way or when their code runs first.
_FAILURES = (
    RuntimeError, AssertionError, AttributeError, ImportError, LookupError, NotImplementedError, OSError, TypeError,
    ValueError,
)  # fmt: skip


def compiled(
    forward: nn.Module, *, example: torch.Tensor, precision: Precision, note: Callable[[str], None]
) -> Callable[[torch.Tensor], torch.Tensor]:
    """`forward` as compiled code; as it is where compiling that or running it fails, which `note` is told in one line.

    It is tried once, forward and backward, for the shape of `example`. The first other batch size compiles code for
    any, so that there are two compilations at most. Outside of training the module computes as ever. Weights,
    gradients, buffers and generators are as before.

    Args:
        forward: The model as a step calls it: plain, or under DistributedDataParallel, which exchanges nothing in the
            trial, so that a rank on which it fails keeps nobody waiting. Under FSDP it stays as it is.
        example: What a step takes, on the device.
        precision: What steps compute in.
        note: Takes a line for the user.
    """
    made = _Compiled(forward, note)
    if isinstance(forward, FSDPModule):
        made.give_up("its parts are gathered by hooks, which are not compiled")
        return made
    kept = random_state(example.device)
    try:
        with precision.applied(), with_buffers(copy_buffers(forward)):
            _try(made, example, precision)
    except _FAILURES as error:
        made.give_up(error)
    finally:
        set_random_state(kept, example.device)
    return made


class _Compiled:
    """Calls compiled code until that fails for once.

    Args:
        eager: What is compiled, and what is called after a failure.
        note: Is told of the failure.
    """

    def __init__(self, eager: nn.Module, note: Callable[[str], None]) -> None:
        self.eager, self._note = eager, note
        self.fast: Callable[..., Any] | None = torch.compile(eager)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.fast is None or not self.eager.training or not torch.is_grad_enabled():
            return self.eager(x)
        try:
            return self.fast(x)
        except torch._dynamo.exc.TorchDynamoException as error:
            self.give_up(error)
            return self.eager(x)

    def give_up(self, why: BaseException | str) -> None:
        """Compute as ever from now on, and say why."""
        self.fast = None
        self._note(f"compile: the model runs as it is: {_in_a_line(why)}")


def _try(made: _Compiled, example: torch.Tensor, precision: Precision) -> None:
    """One forward and backward pass that leaves no gradients."""
    assert made.fast is not None
    weights = [each for each in made.eager.parameters() if each.requires_grad]
    is_ddp = isinstance(made.eager, nn.parallel.DistributedDataParallel)
    with made.eager.no_sync() if is_ddp else nullcontext(), torch.enable_grad():  # type: ignore[operator]
        with precision.autocast(example.device):
            outputs = made.fast(example)
        torch.autograd.grad(outputs.float().sum(), weights, allow_unused=True)


def _in_a_line(why: BaseException | str) -> str:
    """The first line that says something; of an error with its kind."""
    if isinstance(why, str):
        return why
    # What a backend raised says more than that a backend raised something.
    inner = getattr(why, "inner_exception", None) or why.__cause__ or why
    lines = [line.strip() for line in str(inner).splitlines() if line.strip()]
    text = lines[0] if lines else ""
    return f"{type(inner).__name__}: {text}" if text else type(inner).__name__
