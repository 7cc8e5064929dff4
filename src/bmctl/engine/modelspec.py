"""A recipe's model as its data and its task make it: how to build it, and the graphs that it will have."""

from __future__ import annotations

from typing import Any

from torch import nn

from bmctl.inputs import INPUTS, Resolved, specs
from bmctl.models import ModelConfig, ModelSpec, resolve, spec_args
from bmctl.schema import Signature
from bmctl.tasks import TASKS


def model_spec(config: ModelConfig, *, given: Resolved, task: Any, facts: Any) -> ModelSpec:
    """How to build the model, without data or network.

    Args:
        given: How samples become what it takes.
        task: The task's Config.
        facts: Of the task, on these data.

    Raises:
        RecipeError: Unknown name, or arguments that it does not have.
        DependencyError: A repository's configuration cannot be downloaded.
    """
    told = {**INPUTS[given.spec.kind].told(given), **TASKS[task.kind].told(facts)}
    return resolve(ModelSpec(name=config.name, args=spec_args(config), given=specs(given), told=told))


def signatures(model: nn.Module, *, given: Resolved, task: Any, facts: Any) -> dict[str, Signature]:
    """What each graph of a task over a model takes and gives, by name."""
    found: dict[str, Signature] = TASKS[task.kind].signatures(specs(given), facts, model)
    return found
