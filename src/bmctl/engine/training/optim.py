"""Optimizers as the recipe names them, and their state as flat tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from bmctl.engine.training.groups import matrices, parameter_groups
from bmctl.errors import PackageError, RecipeError
from bmctl.fit import SGD, Adafactor, Adam, AdamW, Muon, Optimizer, RMSprop

Read = Callable[[str, torch.Tensor | None], torch.Tensor]
"""Gives the saved tensor of a key; for a DTensor as second argument, a DTensor that is spread in the same way."""

_WHOLE = (torch.optim.Muon, torch.optim.Adafactor)
"""They look at rows and columns of a matrix at once; torch 2.14 cannot step them on DTensors."""
_SMALL = ("row_var", "col_var")
"""State of another shape than its parameter: every process keeps all of it."""


class Optimizers:
    """Optimizers that together hold every trained parameter once, and step as one.

    A GradScaler takes it for an optimizer: all parts step, or, on an overflow in any of them, none.

    Args:
        parts: torch's own, whose groups have a `scale`.
    """

    def __init__(self, parts: list[torch.optim.Optimizer]) -> None:
        self.parts = parts

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Of all parts; a GradScaler reads their gradients."""
        return [group for part in self.parts for group in part.param_groups]

    def unscale(self, scaler: torch.amp.GradScaler) -> None:
        """Divide the gradients by the scaler's factor, before they are clipped; nothing for a disabled scaler."""
        scaler.unscale_(self)  # type: ignore[arg-type]

    def step(self, scaler: torch.amp.GradScaler | None = None) -> None:
        """Change the weights; with a scaler whose gradients are not all finite, leave them as they are."""
        if scaler is not None and scaler.is_enabled():
            scaler.step(self)  # type: ignore[arg-type]
            return
        for part in self.parts:
            _step_gathered(part) if isinstance(part, _WHOLE) and _is_shared(part.param_groups) else part.step()

    def zero_grad(self) -> None:
        """Let go of all gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def set_rate(self, rate: float) -> None:
        """The learning rate of the next step; each group's is `scale` times that."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = rate * group["scale"]

    def tensors(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """The state by ``kind/parameter``, such as ``exp_avg/head.weight``: the very tensors, not copies.

        Args:
            model: Whose parameters the optimizers were built for; it gives the names.
        """
        states = {weight: state for part in self.parts for weight, state in part.state.items()}
        return {
            f"{kind}/{name}": value
            for name, weight in model.named_parameters()
            for kind, value in states.get(weight, {}).items()
        }

    def load(self, model: nn.Module, names: Iterable[str], read: Read) -> None:
        """Put back what `tensors` gave, in place of any state there is.

        Args:
            model: As for `tensors`.
            names: Of everything that was saved.

        Raises:
            PackageError: The state is of another model or another kind of optimizer.
        """
        saved: dict[str, list[str]] = {}
        for key in names:
            kind, _, name = key.partition("/")
            saved.setdefault(name, []).append(kind)
        owner = {weight: part for part in self.parts for group in part.param_groups for weight in group["params"]}
        weights = {name: weight for name, weight in model.named_parameters() if weight in owner}
        for part in self.parts:
            part.state.clear()
        for name, kinds in saved.items():
            weight = weights.get(name)
            expected = {} if weight is None else _state_of(owner[weight], weight)
            strange = sorted(set(kinds) ^ set(expected))
            if weight is None or strange:
                what = f"{(strange or kinds)[0]}/{name}"
                raise PackageError(
                    f"the checkpoint's optimizer state {what} does not fit this model and its optimizer"
                    if weight is None or strange[0] in kinds
                    else f"the checkpoint has no optimizer state {what}",
                    hint="go on with the recipe that it was made by, or begin anew with --overwrite",
                )
            owner[weight].state[weight] = {
                kind: _fitted(f"{kind}/{name}", like, read) for kind, like in expected.items()
            }


def build_optimizer(model: nn.Module, config: Optimizer) -> Optimizers:
    """torch's own optimizers over the trainable parameters, fused where there is such a kernel, else by lists.

    Args:
        model: With its parameters where they will stay: on the device, sharded.

    Raises:
        RecipeError: `layer_decay` for a model without repeated blocks; Muon for one without matrices.
    """
    if isinstance(config, Muon):
        return _started(_muon_parts(model, config), config.lr)
    return _started([_one_part(parameter_groups(model, config), config)], config.lr)


def _muon_parts(model: nn.Module, config: Muon) -> list[torch.optim.Optimizer]:
    names = set(matrices(model))
    if not names:
        raise RecipeError(
            f"optimizer.name: muon is for matrices, and {type(model).__name__} has none but that of its last layer",
            hint="take adamw or sgd: --set train.optimizer.name=adamw",
        )
    rest = {name for name, _ in model.named_parameters()} - names
    groups = parameter_groups(model, config, only=names)
    parts: list[torch.optim.Optimizer] = [
        torch.optim.Muon(groups, lr=config.lr, momentum=config.momentum, adjust_lr_fn="match_rms_adamw")
    ]
    if groups := parameter_groups(model, config, only=rest):
        parts.append(torch.optim.AdamW(groups, lr=config.lr, fused=True))
    return parts


def _one_part(groups: list[Any], config: Optimizer) -> torch.optim.Optimizer:
    if isinstance(config, AdamW):
        return torch.optim.AdamW(groups, lr=config.lr, betas=(config.betas[0], config.betas[1]), fused=True)
    if isinstance(config, Adam):
        return torch.optim.Adam(groups, lr=config.lr, betas=(config.betas[0], config.betas[1]), fused=True)
    if isinstance(config, SGD):
        # torch 2.14 has no fused SGD for DTensors.
        fused = not _is_shared(groups)
        return torch.optim.SGD(
            groups,
            lr=config.lr,
            momentum=config.momentum,
            nesterov=config.nesterov,
            fused=fused,
            foreach=not fused,
        )
    if isinstance(config, RMSprop):
        return torch.optim.RMSprop(groups, lr=config.lr, alpha=config.alpha, momentum=config.momentum, foreach=True)
    assert isinstance(config, Adafactor)
    return torch.optim.Adafactor(groups, lr=config.lr, foreach=True)


def _is_shared(groups: list[Any]) -> bool:
    """Whether each process holds a part of the parameters only."""
    return any(isinstance(weight, DTensor) for group in groups for weight in group["params"])


def _started(parts: list[torch.optim.Optimizer], rate: float) -> Optimizers:
    optimizers = Optimizers(parts)
    optimizers.set_rate(rate)
    return optimizers


# -- parameters of which each process holds a part ----------------------------------------------------


def _step_gathered(part: torch.optim.Optimizer) -> None:
    """What ``part.step()`` would do in one process: parameter by parameter gathered, stepped, and shared out again.

    Args:
        part: Muon or Adafactor. Collective: every process of the group calls it, after the same backward.
    """
    for group in part.param_groups:
        for weight in group["params"]:
            if weight.grad is not None:
                _step_one(part, group, weight)


@torch.no_grad()
def _step_one(part: torch.optim.Optimizer, group: dict[str, object], weight: torch.Tensor) -> None:
    whole = torch.nn.Parameter(_gathered(weight.detach()))
    assert weight.grad is not None
    whole.grad = _gathered(weight.grad)
    alone = type(part)([{**group, "params": [whole]}])  # type: ignore[call-arg]
    if weight in part.state:
        alone.state[whole] = {kind: _gathered(value) for kind, value in part.state[weight].items()}
    alone.step()
    weight.copy_(_shared_out(whole.detach(), weight))
    part.state[weight] = {
        kind: _shared_out(value, weight) if value.shape == weight.shape and kind not in (*_SMALL, "step") else value
        for kind, value in alone.state[whole].items()
    }


def _gathered(tensor: torch.Tensor) -> torch.Tensor:
    """All of a DTensor, in every process; another tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _shared_out(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This process's part: all have computed the same, so nothing is sent."""
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


# -- state --------------------------------------------------------------------------------------------


def _state_of(part: torch.optim.Optimizer, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """What `part` keeps for one parameter, by kind: tensors of the shape, type, place and layout that it gives them."""
    like = weight.detach()
    group = part.param_groups[0]
    # Fused kernels count where the weight lies, the others where the loop runs.
    step = {"step": torch.empty((), dtype=torch.float32, device=weight.device if group.get("fused") else "cpu")}
    if isinstance(part, torch.optim.AdamW | torch.optim.Adam):
        return step | {"exp_avg": like, "exp_avg_sq": like}
    if isinstance(part, torch.optim.RMSprop):
        return step | {"square_avg": like} | ({"momentum_buffer": like} if group["momentum"] else {})
    if isinstance(part, torch.optim.Adafactor):
        if weight.dim() < 2:
            return step | {"variance": like}
        rows, columns = list(weight.shape), list(weight.shape)
        rows[-1] = columns[-2] = 1
        row_var, col_var = (torch.empty(shape, dtype=like.dtype, device=like.device) for shape in (rows, columns))
        return step | {"row_var": row_var, "col_var": col_var}
    return {"momentum_buffer": like} if group["momentum"] or isinstance(part, torch.optim.Muon) else {}


def _fitted(key: str, like: torch.Tensor, read: Read) -> torch.Tensor:
    """The saved tensor of a key in the layout of `like`: kernels walk over memory, and take it to be the weight's."""
    found = read(key, like)
    if found.dtype != like.dtype or (found.shape != like.shape and not found.numel() == like.numel() == 1):
        raise PackageError(
            f"the checkpoint's optimizer state {key} {tuple(found.shape)} does not fit this model",
            hint="go on with the recipe that it was made by, or begin anew with --overwrite",
        )
    return torch.empty_like(like, memory_format=torch.preserve_format).copy_(found.reshape(like.shape))
