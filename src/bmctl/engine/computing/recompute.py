"""Activation checkpointing: what a block computes is thrown away and computed again in the backward pass.

Source: Chen et al. 2016, https://arxiv.org/abs/1604.06174
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from bmctl.engine.effects import copy_buffers, with_buffers
from bmctl.engine.modules.blocks import find_blocks
from bmctl.errors import UnsupportedError


def recompute_blocks(model: nn.Module) -> int:
    """Let every block keep only its input in training; its gradients, buffers and random numbers stay bitwise equal.

    Names and classes stay as they are; outside of training a block runs as ever. `keep_activations` undoes it.

    Args:
        model: As it is built: not yet sharded or compiled.

    Returns:
        Number of blocks.

    Raises:
        UnsupportedError: The model repeats no blocks.
    """
    blocks = find_blocks(model)
    if not blocks:
        raise UnsupportedError(
            f"train.activation_checkpointing: {type(model).__name__} repeats no blocks that could be computed again",
            hint="--set train.activation_checkpointing=false",
        )
    for block in blocks.values():
        if not isinstance(block.forward, _Recomputed):
            block.forward = _Recomputed(block)
    return len(blocks)


def keep_activations(model: nn.Module) -> None:
    """Undo `recompute_blocks`, on the same model or on a copy of it."""
    for module in model.modules():
        if isinstance(module.forward, _Recomputed):
            del module.forward


class _Recomputed:
    """A block's forward, which is found on the instance before that of its class.

    Args:
        block: Whose class computes.
    """

    def __init__(self, block: nn.Module) -> None:
        self._block = block
        self._forward: Callable[..., Any] = block.forward
        self._has_buffers = next(block.buffers(), None) is not None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not (self._block.training and torch.is_grad_enabled()):
            return self._forward(*args, **kwargs)
        # DenseNet's layers are given one list that grows from layer to layer.
        args, kwargs = tree_map(lambda leaf: leaf, (args, kwargs))
        # A compiler takes the second update of a buffer out by itself, and no contexts.
        if not self._has_buffers or torch.compiler.is_compiling():
            return checkpoint(self._forward, *args, use_reentrant=False, **kwargs)
        contexts = partial(_contexts, self._block)
        return checkpoint(self._forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)


def _contexts(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For the first computation of a block and for the second.

    A forward pass may read and change buffers, as batch normalisation counts and averages: so the second one works on
    copies of what the first one found.
    """
    return nullcontext(), with_buffers(copy_buffers(block))
