"""The learning rate over the steps, as a pure function: nothing to save, the same after every resume."""

from __future__ import annotations

import math

from bmctl.fit import Cosine, Linear, OneCycle, Schedule, StepDecay


def learning_rate(schedule: Schedule, *, peak: float, step: int, num_steps: int) -> float:
    """Rate of one step: a linear rise to `peak`, then what the schedule's name says, down to the last step.

    Args:
        peak: The optimizer's `lr`.
        step: From 0.
        num_steps: Of the whole training.

    Source: cosine: Loshchilov, Hutter 2016, https://arxiv.org/abs/1608.03983
    """
    if isinstance(schedule, OneCycle):
        return _one_cycle(schedule, peak=peak, step=step, num_steps=num_steps)
    num_warmup = round(schedule.warmup * num_steps)
    if isinstance(schedule, StepDecay):
        peak *= schedule.factor ** sum(step >= round(at * num_steps) for at in schedule.at)
    if step < num_warmup:
        return peak * (step + 1) / num_warmup
    done = (step - num_warmup) / max(1, num_steps - num_warmup)
    if isinstance(schedule, Cosine):
        return _cosine(peak, schedule.final * peak, done=done)
    if isinstance(schedule, Linear):
        return peak + (schedule.final - 1) * peak * done
    return peak


def _one_cycle(schedule: OneCycle, *, peak: float, step: int, num_steps: int) -> float:
    """As torch's OneCycleLR counts: the peak is at step `rise * num_steps - 1`, which need not be whole."""
    top, last = schedule.rise * num_steps - 1, num_steps - 1
    if step <= top:
        return _cosine(schedule.start * peak, peak, done=step / top if top else 1.0)
    return _cosine(peak, schedule.final * peak, done=(step - top) / (last - top))


def _cosine(first: float, last: float, *, done: float) -> float:
    """Half a cosine from `first` to `last`, of which the fraction `done` lies behind."""
    return last + (first - last) * 0.5 * (1 + math.cos(math.pi * done))
