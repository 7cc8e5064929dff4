"""torch.compile for training steps: tried before the first one, and done without where it fails."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch._dynamo
from torch import nn
from torch.distributed.fsdp import FSDPModule

from bmctl.engine.batch import Batch
from bmctl.engine.computing.precision import Precision
from bmctl.engine.computing.trial import trial

# What compilers and their backends raise, on the way or when their code runs first.
_FAILURES = (
    RuntimeError, AssertionError, AttributeError, ImportError, LookupError, NotImplementedError, OSError, TypeError,
    ValueError,
)  # fmt: skip


def compiled(
    forward: nn.Module,
    *,
    example: Batch,
    takes: Sequence[str],
    gives: Sequence[str],
    precision: Precision,
    note: Callable[[str], None],
) -> Callable[..., Any]:
    """`forward` as compiled code; as it is where compiling that or running it fails, which `note` is told in one line.

    It is tried once, forward and backward, for the shape of `example`. The first other batch size compiles code for
    any, so that there are two compilations at most. Outside of training the module computes as ever. Weights,
    gradients, buffers and generators are as before.

    Args:
        forward: The model as a step calls it: plain, or under DistributedDataParallel, which exchanges nothing in the
            trial, so that a rank on which it fails keeps nobody waiting. Under FSDP it stays as it is.
        example: A batch as a step takes it, on the device.
        takes: Names of what the model takes of it, in order: it is called by position.
        gives: Names of what it gives.
        precision: What steps compute in.
        note: Takes a line for the user.
    """
    made = _Compiled(forward, note)
    if isinstance(forward, FSDPModule):
        made.give_up("its parts are gathered by hooks, which are not compiled")
        return made
    is_ddp = isinstance(forward, nn.parallel.DistributedDataParallel)
    try:
        with forward.no_sync() if is_ddp else nullcontext():  # type: ignore[operator]
            trial(forward, example, forward=made.fast, takes=takes, gives=gives, loss=_total, precision=precision)
    except _FAILURES as error:
        made.give_up(error)
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

    def __call__(self, *inputs: torch.Tensor) -> Any:
        if self.fast is None or not self.eager.training or not torch.is_grad_enabled():
            return self.eager(*inputs)
        try:
            return self.fast(*inputs)
        except torch._dynamo.exc.TorchDynamoException as error:
            self.give_up(error)
            return self.eager(*inputs)

    def give_up(self, why: BaseException | str) -> None:
        """Compute as ever from now on, and say why."""
        self.fast = None
        self._note(f"compile: the model runs as it is: {_in_a_line(why)}")


def _total(outputs: Batch, batch: Batch) -> torch.Tensor:
    """A loss that asks for a gradient of every output."""
    sums = [each.float().sum() for each in outputs.values() if each.requires_grad]
    return sum(sums[1:], start=sums[0])


def _in_a_line(why: BaseException | str) -> str:
    """The first line that says something; of an error with its kind."""
    if isinstance(why, str):
        return why
    # What a backend raised says more than that a backend raised something.
    inner = getattr(why, "inner_exception", None) or why.__cause__ or why
    lines = [line.strip() for line in str(inner).splitlines() if line.strip()]
    text = lines[0] if lines else ""
    return f"{type(inner).__name__}: {text}" if text else type(inner).__name__
