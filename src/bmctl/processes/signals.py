"""Signals become a flag that loops look at; a second one, or an overdue stop, ends the stage at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from bmctl.errors import BmctlError, InterruptedRunError, PreemptedError

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Stop:
    """Whether this process was asked to stop.

    Attributes:
        requested: Number of the first signal received, or None.
        grace_s: Seconds after the first signal by which the block must have ended.
        kept: What is published of the work at hand, in words; empty where all of it would be lost.
        error: What `abort` ends the block with.
        can_interrupt: Whether signals are caught, so that the main thread can be interrupted.
    """

    def __init__(self, *, grace_s: float = 30.0) -> None:
        self.requested: int | None = None
        self.grace_s = grace_s
        self.kept = ""
        self.error: BmctlError | None = None
        self.can_interrupt = False

    def request(self, signum: int) -> None:
        """Ask for a stop at the next border; only the first call counts."""
        if self.requested is None:
            self.requested = signum

    def check(self, doing: str) -> None:
        """A border: end there if a signal asked for that.

        Raises:
            InterruptedRunError: A signal came: SIGINT, or any where nothing is kept.
            PreemptedError: Another one, and what is `kept` will be gone on from.
        """
        if self.requested is None:
            return
        kept = f"; {self.kept} is kept" if self.kept else ""
        error = interrupted(self.requested, f"stopped during {doing}{kept}")
        error.hint = f"run the same command {'with --resume to go on' if kept else 'again'}"
        if kept and error.exit_code != 130:
            raise PreemptedError(error.message, hint=error.hint)
        raise error

    def abort(self, error: BmctlError) -> None:
        """From another thread: end the block with this error, as soon as the main thread runs Python again."""
        self.error = error
        if self.can_interrupt:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGALRM)


class _AbortedError(BaseException):
    """Raised out of a handler, like _Abandoned."""


class _Abandoned(BaseException):
    """Raised out of a handler; not an Exception, so that no library's `except Exception` can swallow it."""

    def __init__(self, signum: int, why: str) -> None:
        super().__init__(why)
        self.signum, self.why = signum, why


def interrupted(signum: int, why: str) -> InterruptedRunError:
    """The error for a run that `signum` ended with nothing published: 130 after SIGINT, else 143."""
    name = signal.Signals(signum).name
    return InterruptedRunError(f"{name}: {why}", exit_code=130 if signum == signal.SIGINT else 143)


@contextmanager
def catch_signals(*, grace_s: float = 30.0) -> Iterator[Stop]:
    """Turn SIGTERM, SIGUSR1 and SIGINT into a flag while the block runs.

    Args:
        grace_s: Seconds after the first signal by which the block must have ended; `Stop.grace_s` may change it.

    Yields:
        The flag. Outside of the main thread Python allows no handlers, and the flag can only be set by its user.

    Raises:
        InterruptedRunError: At a second signal, or when `grace_s` have passed.
        BmctlError: What `Stop.abort` was given.
    """
    stop = Stop(grace_s=grace_s)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def on_signal(signum: int, _frame: FrameType | None) -> None:
        if stop.requested is not None:
            raise _Abandoned(signum, "stopped at the second signal; work since the last checkpoint is lost")
        stop.request(signum)
        signal.setitimer(signal.ITIMER_REAL, stop.grace_s)

    def on_alarm(_signum: int, _frame: FrameType | None) -> None:
        if stop.error is not None:
            raise _AbortedError(stop.error.message)
        assert stop.requested is not None
        raise _Abandoned(stop.requested, f"no checkpoint could be published within {stop.grace_s:g} s (train.grace_s)")

    before = {number: signal.signal(number, on_signal) for number in STOP_SIGNALS}
    before[signal.SIGALRM] = signal.signal(signal.SIGALRM, on_alarm)
    stop.can_interrupt = True
    try:
        yield stop
    except _Abandoned as gone:
        raise interrupted(gone.signum, gone.why) from None
    except _AbortedError:
        assert stop.error is not None
        raise stop.error from None
    finally:
        stop.can_interrupt = False
        if stop.requested is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
