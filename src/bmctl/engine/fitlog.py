"""What a training loop tells the world: events, about two a second, and TensorBoard's files. Rank 0 alone speaks."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from bmctl.engine.context import StageContext

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

PERIOD_S = 0.5


class FitLog:
    """The clock of one loop: it counts steps and seconds, without those of validation and saving.

    Attributes:
        num_steps_here: Steps done in this process.
        train_s: Seconds that they took.
    """

    def __init__(
        self, context: StageContext, stage: str, metric: str, batch_size: int, steps_per_epoch: int, num_steps: int
    ) -> None:
        self._context, self._stage, self._metric = context, stage, metric
        self._batch_size, self._steps_per_epoch, self._num_steps = batch_size, steps_per_epoch, num_steps
        self._board: SummaryWriter | None = None
        self._since, self._steps_since, self._epoch_s = time.perf_counter(), 0, 0.0
        self._spoke_at, self._spoke_at_step, self._spoke_at_s = time.perf_counter(), 0, 0.0
        self.num_steps_here, self.train_s = 0, 0.0

    def open(self, *, step: int) -> None:
        """Start TensorBoard's file; what a killed run wrote there after `step` is dropped."""
        if self._context.group.leads:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self._context.run / "tensorboard" / self._stage), purge_step=step + 1)

    def close(self) -> None:
        if self._board is not None:
            self._board.close()

    def emit(self, event: str, **fields: object) -> None:
        if self._context.group.leads:
            self._context.emit({"event": event, "stage": self._stage, **fields})

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
        self._epoch_s += seconds
        self.begin()

    def _speed(self) -> float:
        """Samples per second, of all processes, since this was asked last."""
        self.pause()
        steps, seconds = self.num_steps_here - self._spoke_at_step, self.train_s - self._spoke_at_s
        self._spoke_at, self._spoke_at_step, self._spoke_at_s = time.perf_counter(), self.num_steps_here, self.train_s
        return steps * self._batch_size / seconds if seconds > 0 else 0.0

    def step(self, step: int, *, loss: float, metric: float, lr: float) -> None:
        """Tell where the loop is; loss and metric are means over the epoch so far."""
        speed = self._speed()
        self.emit(
            "step",
            epoch=(step - 1) // self._steps_per_epoch + 1,
            epochs=-(-self._num_steps // self._steps_per_epoch),
            step=step,
            steps=self._num_steps,
            loss=loss,
            metric=metric,
            metric_name=self._metric,
            lr=lr,
            samples_per_s=speed,
            eta_s=(self._num_steps - step) * self.train_s / max(1, self.num_steps_here),
        )
        self._draw(step, {"train/loss": loss, f"train/{self._metric}": metric, "train/lr": lr, "samples_per_s": speed})

    def epoch(self, step: int, *, loss: float, metric: float, val_metric: float, val_loss: float | None) -> None:
        """Tell what an epoch came to; its seconds are those of its steps."""
        self.emit(
            "epoch",
            epoch=-(-step // self._steps_per_epoch),
            epochs=-(-self._num_steps // self._steps_per_epoch),
            step=step,
            loss=loss,
            metric=metric,
            metric_name=self._metric,
            val_metric=val_metric,
            val_loss=val_loss,
            seconds=self._epoch_s,
        )
        self._epoch_s = 0.0
        self._draw(step, {f"val/{self._metric}": val_metric} | ({} if val_loss is None else {"val/loss": val_loss}))

    def _draw(self, step: int, values: dict[str, float]) -> None:
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
