"""Faults for processes under test: on PYTHONPATH, with BMCTL_TEST_FAULT=KIND[:RANK:STEP], something goes wrong."""

import os
import signal
import time

KIND, _, WHERE = os.environ.get("BMCTL_TEST_FAULT", "").partition(":")
RANK, STEP = (int(part) for part in WHERE.split(":")) if WHERE else (0, 0)
HERE = KIND and int(os.environ.get("RANK", "0")) == RANK


def strike() -> None:
    from bmctl.errors import DataError

    if KIND == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if KIND == "data":
        raise DataError("sample 7 cannot be read", hint="mend it")
    if KIND == "bug":
        raise ZeroDivisionError("a bug")
    if KIND == "hang":
        time.sleep(1000)


if KIND == "sampler" and "RANK" in os.environ:
    from bmctl.engine import loop

    whole = loop.train_batches
    loop.train_batches = lambda split, **given: whole(split, **{**given, "rank": 0})
elif HERE:
    from bmctl.engine import loop

    step = loop._step

    def faulty_step(setting, position, x_BCHW, y_B):
        if position.step == STEP:
            strike()
        return step(setting, position, x_BCHW, y_B)

    loop._step = faulty_step
