"""What a recipe will do, stage by stage, in words: for ``--dry-run``, without torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from bmctl.fit import Fit
from bmctl.methods import METHODS
from bmctl.recipe.sections import GatesConfig, Recipe
from bmctl.schema import BATCH, Strict


def describe(recipe: Recipe) -> list[tuple[str, str]]:
    """Stage and what it does, in order; stages that the recipe has not are left out."""
    lines = []
    if recipe.train and recipe.model and recipe.data:
        lines.append(("train", f"{words(recipe.model)} on {words(recipe.data.source)}; {fit_text(recipe.train)}"))
    elif recipe.model:
        lines.append(("model", words(recipe.model)))
    if recipe.compress:
        lines.append(("compress", ", then ".join(step_text(step, recipe) for step in recipe.compress)))
    if recipe.export.backends:
        lines.append(("export", export_text(recipe)))
    if gates := ", ".join(gate_texts(recipe.gates)):
        lines.append(("gates", gates))
    if recipe.infer:
        lines.append(("infer", f"{recipe.infer.data} with {recipe.infer.backend}, {recipe.infer.batch_size} at a time"))
    return lines


def words(section: Strict, *, defaults: bool = False) -> str:
    """``idx (root data, val 0.1)``: what a section is, then what it says, beyond the defaults or with them."""
    given = section.model_dump(exclude_defaults=not defaults)
    fields = type(section).model_fields
    key = next(key for key in ("kind", "method", "name") if key in fields)
    said = getattr(section, key)
    rest = ", ".join(
        f"{name} {plain(value)}" for name, value in given.items() if name != key and value not in (None, (), [])
    )
    return f"{said} ({rest})" if rest else str(said)


def plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {plain(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(plain(item) for item in value) + "]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def fit_text(fit: Fit) -> str:
    """Epochs, batch and optimizer of one training loop."""
    length = f"{fit.epochs} epoch{'s' if fit.epochs > 1 else ''}"
    if fit.max_steps:
        length += f", at most {fit.max_steps} steps"
    return f"{length} of batches of {fit.batch_size}, {fit.optimizer.name} lr {fit.optimizer.lr}, {fit.schedule.name}"


def step_text(step: Any, recipe: Recipe) -> str:
    """A compression step with its knobs, its recovery and its calibration data."""
    recover = getattr(step, "recover", None)
    text = words(step.model_copy(update={"recover": None}) if recover else step, defaults=True)
    if recover:
        teacher = ", taught by the original" if recover.teacher == "original" else ""
        text += f" and recover: {fit_text(recover.fit)}{teacher}"
    method = METHODS[step.method]
    if method.CALIBRATES and recipe.data:
        most, limit = method.num_samples(step), recipe.data.calib.limit
        text += f" calibrated on {most if limit is None else min(most, limit)} samples of {recipe.data.calib.split}"
    return text


def export_text(recipe: Recipe) -> str:
    export = recipe.export
    measure = export.measure
    text = ", ".join(words(backend) for backend in export.backends)
    for axis, span in export.axes.items():
        text += f"; {'batches' if axis == BATCH else axis} of {span.min} to {span.max}, best at {span.opt}"
    text += f"; measured at {measure.batch_size} in {measure.rounds} rounds"
    return text + (", beside the uncompressed model" if export.baseline and recipe.compress else "")


def gate_texts(gates: GatesConfig) -> Iterator[str]:
    if gates.max_drop is not None:
        yield f"metric worse by at most {gates.max_drop}"
    for name, limits in gates.metrics.items():
        for key, words in (("min", "at least"), ("max", "at most"), ("max_drop", "worse by at most")):
            if (limit := getattr(limits, key)) is not None:
                yield f"{name} {words} {limit}"
    if gates.min_speedup is not None:
        yield f"at least {gates.min_speedup} times as fast"
    if gates.max_size_bytes is not None:
        yield f"at most {gates.max_size_bytes} bytes"
    if gates.max_latency_ms is not None:
        yield f"at most {gates.max_latency_ms} ms a batch"
    if gates.allow_unrun and any(value not in (None, {}) for key, value in gates if key != "allow_unrun"):
        yield "what cannot run here passes"
