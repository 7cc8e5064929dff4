"""How often a training was begun without getting any further: the guard against endless restarts.

RUN/logs/attempts-STAGE.json holds every start since the last progress, written before the start's first step. A start
that ended well, or with an error that was told and will be mended, is taken out again; what remains was killed, died,
or was preempted before it could publish anything new.
"""

from __future__ import annotations

import json
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bmctl import store
from bmctl.errors import BmctlError, InterruptedRunError, PreemptedError, StuckError, WorkerError
from bmctl.job import newest_step

MOST = 3
UNKNOWN = "it was killed, or the machine went away"


@dataclass(frozen=True)
class Attempts:
    """The starts of one stage of one run."""

    run: Path
    stage: str

    @property
    def path(self) -> Path:
        return self.run / "logs" / f"attempts-{self.stage}.json"

    def begin(self, *, afresh: bool = False) -> None:
        """Record a start.

        Args:
            afresh: Checkpoints are there to be thrown away.

        Raises:
            StuckError: Three starts from the same checkpoint got no further.
        """
        if afresh:
            self.forget()
        vain = self._vain()
        if len(vain) >= MOST:
            raise self.stuck(vain)
        self._write([*vain, {"step": newest_step(self.run, self.stage), "time": time.time(), "how": UNKNOWN}])

    def end(self, error: BaseException | None, *, is_elastic: bool = False) -> None:
        """Record how the newest start ended.

        Args:
            error: None if it is done.
            is_elastic: Processes stop and start again whenever machines come and go.
        """
        if error is None:
            self.forget()
        elif isinstance(error, PreemptedError):
            self.say(None if is_elastic else f"preempted: {error.message}")
        elif _is_told(error):
            self.say(None)
        else:
            self.say(f"{type(error).__name__}: {error}".removeprefix("WorkerError: "))

    def say(self, how: str | None) -> None:
        """Tell how the newest start ended; None takes it out of the count."""
        starts = self._read()
        if starts:
            self._write([*starts[:-1], {**starts[-1], "how": how}])

    def killed(self, how: str) -> None:
        """Tell what ended the newest start, which could not say it itself."""
        if (starts := self._read()) and starts[-1]["how"] == UNKNOWN:
            self.say(how)

    def check(self) -> None:
        """After a failure, with no checkpoint that is newer than the last start's.

        Raises:
            StuckError: This was the third such start.
        """
        vain = self._vain()
        if len(vain) >= MOST:
            raise self.stuck(vain)

    def stuck(self, vain: list[dict[str, Any]]) -> StuckError:
        step = vain[-1]["step"]
        where = "before the first checkpoint" if step is None else f"at the checkpoint of step {step}"
        told = "\n".join(f"  {_when(start['time'])}: {start['how']}" for start in vain[-MOST:])
        return StuckError(
            f"{self.stage}: {len(vain)} starts in a row got no further, {where}:\n{told}",
            hint=f"read {self.path.parent}/rank-*.log; once it is mended: rm {self.path}, and run it again",
        )

    def forget(self) -> None:
        self.path.unlink(missing_ok=True)

    def _vain(self) -> list[dict[str, Any]]:
        """Starts since the last progress."""
        newest = newest_step(self.run, self.stage)
        starts = self._read()
        while starts and starts[0]["step"] != newest:
            starts = starts[1:]
        return [start for start in starts if start["step"] == newest and start["how"] is not None]

    def _read(self) -> list[dict[str, Any]]:
        try:
            found = json.loads(self.path.read_bytes())
            return [{"step": start["step"], "time": float(start["time"]), "how": start["how"]} for start in found]
        except (OSError, ValueError, TypeError, KeyError):
            return []

    def _write(self, starts: list[dict[str, Any]]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        store.write_atomic(self.path, json.dumps(starts, indent=1).encode() + b"\n")


def _is_told(error: BaseException) -> bool:
    """Whether a person ended it, or was told what to mend."""
    if isinstance(error, InterruptedRunError):
        return error.exit_code == 130
    if isinstance(error, BmctlError):
        return not isinstance(error, WorkerError)
    return isinstance(error, KeyboardInterrupt) or getattr(error, "signum", None) == signal.SIGINT


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
