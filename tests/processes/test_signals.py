"""Signals become a flag; a second one, or an overdue stop, ends the block."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from bmctl.errors import InterruptedRunError, WorkerError
from bmctl.processes.signals import Stop, catch_signals


def kill(signum: int) -> None:
    os.kill(os.getpid(), signum)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_the_first_signal_is_only_a_flag(signum: signal.Signals) -> None:
    before = signal.getsignal(signum)
    with catch_signals() as stop:
        assert stop.requested is None
        kill(signum)
        assert stop.requested == signum
    assert signal.getsignal(signum) is before
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


@pytest.mark.parametrize(("second", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_second_signal_ends_the_block(second: signal.Signals, code: int) -> None:
    with pytest.raises(InterruptedRunError, match="second signal") as caught, catch_signals():
        kill(signal.SIGUSR1)
        try:
            kill(second)
            time.sleep(5)
        except Exception:  # noqa: BLE001  (what a library may do)
            pytest.fail("swallowed")
        pytest.fail("went on")
    assert caught.value.exit_code == code


def test_an_overdue_stop_ends_the_block() -> None:
    with pytest.raises(InterruptedRunError, match="grace_s") as caught, catch_signals() as stop:
        stop.grace_s = 0.05
        kill(signal.SIGTERM)
        time.sleep(5)
        pytest.fail("went on")
    assert caught.value.exit_code == 143


def test_another_thread_may_end_the_block_with_an_error_of_its_own() -> None:
    """As the watchdog does where the group hangs."""
    error = WorkerError("rank 1 hangs in step 7", hint="look at its stack")
    with pytest.raises(WorkerError) as caught, catch_signals() as stop:
        threading.Timer(0.05, stop.abort, [error]).start()
        try:
            time.sleep(5)
        except Exception:  # noqa: BLE001  (what a library may do)
            pytest.fail("swallowed")
        pytest.fail("went on")
    assert caught.value is error
    stop.abort(error)  # afterwards it harms nobody


def test_a_thread_gets_a_flag_without_handlers() -> None:
    before, found = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        with catch_signals() as stop:
            found.append((stop, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    stop, handler = found[0]
    assert isinstance(stop, Stop)
    assert stop.requested is None
    assert handler is before
