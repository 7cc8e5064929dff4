"""What a training loop tells the world: events, about two a second, and TensorBoard's files. Rank 0 alone speaks."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from bmctl.core.evaluation import Metric
from bmctl.engine.context import StageContext
from bmctl.engine.training.board import Board
from bmctl.errors import ResourceError

PERIOD_S = 0.5


class FitLog:
    """The clock of one loop: it counts steps and seconds, without those of validation and saving.

    Args:
        context: Its first rank speaks.
        stage: Whose events these are, and the folder of TensorBoard's file.
        metric: The task's main one; lines and TensorBoard name it.
        scored: What the task scores training batches by.
        batch_size: Samples per optimizer step, over all processes.
        steps_per_epoch: Whole global batches in the training data.
        num_steps: At which the training ends.
        eval_every_steps: As in the recipe; None evaluates once an epoch, and lines then speak of epochs.

    Attributes:
        num_steps_here: Steps done in this process.
        train_s: Seconds that they took.
        error: Why it fell silent, as on a full disk; the loop ends by it once a checkpoint is published.
    """

    def __init__(
        self,
        context: StageContext,
        stage: str,
        metric: Metric,
        scored: Metric,
        batch_size: int,
        steps_per_epoch: int,
        num_steps: int,
        eval_every_steps: int | None = None,
    ) -> None:
        self._context, self._stage, self._metric, self._scored = context, stage, metric.name, scored.name
        self._named = {"metric_name": metric.name, "metric_unit": metric.unit}
        self._named_score = {"metric_name": scored.name, "metric_unit": scored.unit}
        self._batch_size, self._steps_per_epoch, self._num_steps = batch_size, steps_per_epoch, num_steps
        self._by_epoch = eval_every_steps is None
        self._board: Board | None = None
        self._since, self._steps_since, self._since_evaluation_s = time.perf_counter(), 0, 0.0
        self._spoke_at, self._spoke_at_step, self._spoke_at_s = time.perf_counter(), 0, 0.0
        self.num_steps_here, self.train_s = 0, 0.0
        self.error: ResourceError | None = None

    def open(self, *, step: int) -> None:
        """Start the clock, and TensorBoard's file; what a killed run wrote there after `step` is dropped."""
        if self._context.group.leads:
            with self._heard():
                self._board = Board(self._context.run / "tensorboard" / self._stage, purge_step=step + 1)
        self.begin()

    def emit(self, event: str, **fields: object) -> None:
        if self._context.group.leads and self.error is None:
            with self._heard():
                self._context.emit({"event": event, "stage": self._stage, **fields})

    @contextmanager
    def _heard(self) -> Iterator[None]:
        try:
            yield
        except ResourceError as error:
            self.error = error

    def note(self, text: str) -> None:
        self.emit("note", text=text)

    def begin(self) -> None:
        """Steps start, or go on after a pause."""
        self._since, self._steps_since = time.perf_counter(), 0

    def tick(self) -> bool:
        """One more step is done; True when it is time to speak."""
        self._steps_since += 1
        return time.perf_counter() - self._spoke_at >= PERIOD_S

    def pause(self) -> None:
        """Stop the clock until `begin`."""
        seconds = time.perf_counter() - self._since
        self.num_steps_here += self._steps_since
        self.train_s += seconds
        self._since_evaluation_s += seconds
        self.begin()

    def _speed(self) -> float:
        """Samples per second, of all processes, since this was asked last."""
        self.pause()
        steps, seconds = self.num_steps_here - self._spoke_at_step, self.train_s - self._spoke_at_s
        self._spoke_at, self._spoke_at_step, self._spoke_at_s = time.perf_counter(), self.num_steps_here, self.train_s
        return steps * self._batch_size / seconds if seconds > 0 else 0.0

    def step(
        self,
        step: int,
        *,
        loss: float,
        metric: float,
        lr: float,
        parts: Mapping[str, float] | None = None,
        time_left_s: float | None = None,
    ) -> None:
        """Tell where the loop is.

        Args:
            step: Optimizer steps done.
            loss: Mean since the last evaluation, or over the epoch so far; so is `metric`.
            lr: Of the last step.
            parts: Mean milliseconds of each part of a step, by stopwatch.PARTS.
            time_left_s: Of the recipe's time budget; None where there is none.
        """
        speed = self._speed()
        eta_s = (self._num_steps - step) * self.train_s / max(1, self.num_steps_here)
        self.emit(
            "step",
            epoch=(step - 1) // self._steps_per_epoch + 1,
            epochs=-(-self._num_steps // self._steps_per_epoch),
            step=step,
            steps=self._num_steps,
            loss=loss,
            metric=metric,
            **self._named_score,
            lr=lr,
            samples_per_s=speed,
            eta_s=eta_s if time_left_s is None else max(0.0, min(eta_s, time_left_s)),
            **({"parts": dict(parts)} if parts else {}),
        )
        times = {f"time/{part}_ms": value for part, value in parts.items()} if parts else {}
        if parts:
            times["time/step_ms"] = sum(parts.values())
        values = {"train/loss": loss, f"train/{self._scored}": metric, "train/lr": lr, "samples_per_s": speed}
        self._draw(step, values | times)

    def evaluation(
        self,
        step: int,
        *,
        loss: float,
        metric: float,
        val_metric: float,
        val_loss: float | None,
        is_best: bool = False,
    ) -> None:
        """Tell what an evaluation found; its seconds are those of the steps since the last one.

        Args:
            step: Optimizer steps done.
            loss: Mean over the steps since the last evaluation; so is `metric`, what the task scores batches by.
            val_metric: On the validation data; so is `val_loss`, where the task has one.
            is_best: No evaluation before was as good.
        """
        counted = {
            "epoch": -(-step // self._steps_per_epoch),
            "epochs": -(-self._num_steps // self._steps_per_epoch),
        }
        self.emit(
            "evaluation",
            **(counted if self._by_epoch else {}),
            step=step,
            steps=self._num_steps,
            loss=loss,
            metric=metric,
            **self._named,
            val_metric=val_metric,
            val_loss=val_loss,
            is_best=is_best,
            seconds=self._since_evaluation_s,
        )
        self._since_evaluation_s = 0.0
        self._draw(step, {f"val/{self._metric}": val_metric} | ({} if val_loss is None else {"val/loss": val_loss}))

    def done(
        self, step: int, *, best_step: int, val_metric: float | None, parts: Mapping[str, float] | None = None
    ) -> None:
        """Tell what the training came to.

        Args:
            step: Optimizer steps done, over all attempts.
            best_step: After which the best evaluation was.
            val_metric: Of the weights that are kept.
            parts: Mean milliseconds of each part of a step, over all steps of this process: `Stopwatch.overall`.
        """
        self.emit(
            "done",
            steps=step,
            best_step=best_step,
            val_metric=val_metric,
            **self._named,
            seconds=self.train_s,
            samples_per_s=self.num_steps_here * self._batch_size / max(1e-9, self.train_s),
            **({"parts": dict(parts)} if parts and any(parts.values()) else {}),
        )

    def _draw(self, step: int, values: Mapping[str, float]) -> None:
        if self._board is not None and self.error is None:
            with self._heard():
                self._board.draw(step, values)
