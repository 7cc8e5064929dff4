"""Events of the engine in words, for lines and bars alike; see schema.Emit."""

from __future__ import annotations

from collections.abc import Mapping

from bmctl.core.evaluation import SHARE
from bmctl.report.numbers import count_text, size_text

Event = Mapping[str, object]

STARVING = 0.1
"""Fraction of a step spent waiting for data from which on a bar says so."""


def number(event: Event, key: str) -> float | None:
    """A numeric field, or None where the event has none."""
    value = event.get(key)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def duration_text(seconds: float) -> str:
    """``14 s``, ``2:05`` (minutes), ``1:02:05`` (hours)."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def metric_words(event: Event, key: str, *, prefix: str = "") -> str:
    """``val accuracy 85.2 %``; what is not a share keeps its own scale and unit."""
    value = number(event, key)
    if value is None:
        return ""
    unit = str(event.get("metric_unit", ""))
    text = f"{value * 100:.1f} %" if unit == SHARE else f"{value:.4g} {unit}".rstrip()
    return f"{prefix}{event.get('metric_name', 'metric')} {text}"


def loss_words(event: Event) -> str:
    """``loss 0.412``."""
    loss = number(event, "loss")
    return "" if loss is None else f"loss {loss:.3f}"


def share_done(event: Event) -> float | None:
    """How much of a stage's steps, or of a loop's samples, is done: 0 to 1; None where the event does not say."""
    done, total = ("step", "steps") if event["event"] == "step" else ("done", "total")
    first, last = number(event, done), number(event, total)
    return None if first is None or not last else min(1.0, first / last)


def bar_words(event: Event, *, width: int) -> tuple[str, str]:
    """Left and right of a progress bar, as much as fits a terminal `width` columns wide."""
    percent = f"{100 * (share_done(event) or 0):3.0f} %"
    if event["event"] != "step":
        text = str(event.get("text", event.get("stage", "")))
        return (text if width >= 60 else text[: max(0, width // 2 - 6)]), percent
    speed, eta = number(event, "samples_per_s"), number(event, "eta_s")
    parts_of_step = parts_ms(event)
    waiting = parts_of_step.get("data", 0.0) / max(1e-9, sum(parts_of_step.values()))
    parts = [
        (0, percent),
        (50, loss_words(event)),
        (66, metric_words(event, "metric")),
        (80, f"{speed:,.0f} samples/s" if speed is not None else ""),
        (100, f"waiting for data {100 * waiting:.0f} %" if waiting >= STARVING else ""),
        (36, f"ETA {duration_text(eta)}" if eta is not None else ""),
    ]
    return epoch_words(event) if width >= 36 else "", "  ".join(
        text for least, text in parts if text and width >= least
    )


def epoch_words(event: Event) -> str:
    """``epoch  3/12``."""
    epoch, epochs = number(event, "epoch"), number(event, "epochs")
    if epoch is None:
        return ""
    return f"epoch {epoch:>{len(f'{epochs:.0f}')}.0f}/{epochs:.0f}" if epochs else f"epoch {epoch:.0f}"


def step_words(event: Event) -> str:
    """``step  500/2340``."""
    step, steps = number(event, "step"), number(event, "steps")
    if step is None:
        return ""
    return f"step {step:>{len(f'{steps:.0f}')}.0f}/{steps:.0f}" if steps else f"step {step:.0f}"


def step_line(event: Event) -> str:
    """A step where no bar can be drawn: ``epoch 3 step 120/2244, loss 0.412, ...``."""
    left, right = bar_words(event, width=1000)
    if event["event"] != "step":
        return f"{left} {right.strip()}"
    step, steps = number(event, "step"), number(event, "steps")
    at = f"step {step or 0:.0f}" + (f"/{steps:.0f}" if steps else "")
    return " ".join([left, f"{at},", ", ".join(right.strip().split("  ")[1:])]).strip(" ,")


def evaluation_line(event: Event) -> str:
    """``epoch  3/12  loss 0.412  val accuracy 85.2 %  14 s``; ``step  500/2340  ...`` where they come every so many."""
    seconds = number(event, "seconds")
    took = duration_text(seconds) if seconds is not None else ""
    when = epoch_words(event) or step_words(event)
    parts = (when, loss_words(event), metric_words(event, "val_metric", prefix="val "), took)
    return "  ".join(part for part in parts if part)


def parts_ms(event: Event) -> dict[str, float]:
    """What each part of a step took; empty where the event does not say."""
    parts = event.get("parts")
    return {str(name): number(parts, name) or 0.0 for name in parts} if isinstance(parts, Mapping) else {}


def split_line(event: Event) -> str:
    """``step 16.2 ms: data 1 %, forward 33 %, backward 55 %, communication 6 %, optimizer 5 %``, or nothing."""
    parts = parts_ms(event)
    total = sum(parts.values())
    if total <= 0:
        return ""
    took = f"{total:.1f} ms" if total < 100 else f"{total:,.0f} ms"
    return f"step {took}: " + ", ".join(f"{name} {100 * ms / total:.0f} %" for name, ms in parts.items() if ms > 0)


def start_line(event: Event) -> str:
    """What a stage is about to do."""
    parts = [str(event["text"])] if event.get("text") else []
    steps = "{} steps" if "epochs" in event else "{} samples"
    for key, form in (("model", "{}"), ("epochs", "{} epochs"), ("steps", steps), ("precision", "{}")):
        if event.get(key) is not None:
            parts.append(form.format(event[key]))
    return ", ".join(parts)


def done_line(event: Event) -> str:
    """What a loop came to: ``best val accuracy 85.2 %, 2,340 steps in 2:05, 812 samples/s``."""
    steps, seconds, speed = (number(event, key) for key in ("steps", "seconds", "samples_per_s"))
    unit = "steps" if "val_metric" in event else "samples"
    parts = [str(event.get("text") or ""), metric_words(event, "val_metric", prefix="kept weights: val ")]
    if steps is not None:
        parts.append(f"{steps:,.0f} {unit}" + (f" in {duration_text(seconds)}" if seconds is not None else ""))
    if speed:
        parts.append(f"{speed:,.0f} samples/s")
    if event.get("backend"):
        parts.append(f"on {event['backend']}")
    return ", ".join(part for part in parts if part) or "done"


def skip_line(event: Event) -> str:
    """What need not be done again."""
    return str(event.get("text") or event.get("reason") or "finished before, with the same inputs: kept")


def stage_done_line(event: Event) -> str:
    """What a finished stage left: its metric on validation, parameters, MACs, bytes, latency."""
    metrics = event.get("metrics")
    found: Event = metrics if isinstance(metrics, Mapping) else event
    val = found.get("val")
    parts = []
    if isinstance(val, Mapping):
        named = {"metric_name": val.get("metric", "metric"), "metric_unit": val.get("unit", "")}
        parts.append(metric_words({**named, "value": val.get("value")}, "value", prefix="val "))
    for key, unit in (("num_params", " params"), ("macs", " MACs")):
        if (count := number(found, key)) is not None:
            parts.append(count_text(int(count)) + unit)
    if (size := number(found, "size_bytes")) is not None:
        parts.append(size_text(int(size)))
    if (latency := number(found, "latency_ms")) is not None:
        parts.append(f"latency {latency:.2f} ms")
    return ", ".join(part for part in parts if part) or "done"


REPLACED = str.maketrans(
    {"×": "x", "·": "-", "–": "-", "—": "-", "…": "...", "→": "->", "±": "+/-", "✓": "+", "✗": "x", "▸": ">", "’": "'"}  # noqa: RUF001
)


def to_ascii(text: str) -> str:
    """For terminals that show no more: drawn characters become their likenesses, the rest escapes."""
    return text.translate(REPLACED).encode("ascii", errors="backslashreplace").decode("ascii")


def printable(text: str) -> str:
    """Control characters as escapes: names of files and classes come from anywhere, and must not steer a terminal."""
    return "".join(c if c in "\n\t" or c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
