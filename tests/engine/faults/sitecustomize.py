"""Faults for processes under test: on PYTHONPATH, with BMCTL_TEST_FAULT=KIND[:RANK:STEP[:DOING]], something goes wrong.

It does when that rank says that it is at that step (and doing what begins with DOING), or with BMCTL_TEST_AT=POINT when
it comes to that point of the save protocol; step -1 is before the first. With BMCTL_TEST_ONCE=1 only before anything
was started again. With `gate`, steps past the number in the file BMCTL_TEST_GATE take long.
BMCTL_TEST_SAMPLES=FOLDER has every process write there which samples it took.
"""

import ctypes
import json
import os
import signal
import sys
import time
from pathlib import Path

KIND, _, WHERE = os.environ.get("BMCTL_TEST_FAULT", "").partition(":")
RANK, STEP, DOING = ([*WHERE.split(":"), "", "", ""][:3]) if WHERE else ("0", "0", "")
HERE = KIND and os.environ.get("RANK", "0") == RANK
AGAIN = os.environ.get("BMCTL_TEST_ONCE") and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
AT = os.environ.get("BMCTL_TEST_AT")
GATE = os.environ.get("BMCTL_TEST_GATE", "")
SAMPLES = os.environ.get("BMCTL_TEST_SAMPLES")


def strike() -> None:
    from bmctl.errors import DataError

    if KIND == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if KIND == "segv":
        ctypes.string_at(0)
    if KIND == "abort":
        os.abort()
    if KIND == "exit":
        os._exit(91)
    if KIND == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if KIND == "data":
        raise DataError("sample 7 cannot be read", hint="mend it")
    if KIND == "bug":
        raise ZeroDivisionError("a bug")
    if KIND == "hang":
        time.sleep(1000)
    if KIND == "deaf":  # as in a driver that never returns to Python
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM, signal.SIGTERM])
        time.sleep(1000)
    if KIND == "hold":  # as in a call that keeps the interpreter to itself
        ctypes.PyDLL(None).sleep(1000)
    if KIND.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, KIND))


if KIND == "sampler" and "RANK" in os.environ:
    from bmctl.engine.training import feed

    whole = feed.open_loader
    feed.open_loader = lambda split, **given: whole(split, **{**given, "rank": 0})
elif HERE and AT and not AGAIN:
    from bmctl import disk

    reach, struck = disk.reach, []

    def faulty_reach(point):
        if point == AT and not struck:
            struck.append(point)
            strike()
        reach(point)

    disk.reach = faulty_reach
elif (HERE or KIND == "gate") and not AGAIN:
    from bmctl.processes.heartbeat import Heart

    beat, struck = Heart.beat, []

    def faulty_beat(self, step, doing):
        beat(self, step, doing)
        if KIND == "gate" and doing == "training":
            if step >= int(Path(GATE).read_text()):
                time.sleep(3)
        elif str(step) == STEP and doing.startswith(DOING) and not struck:
            struck.append(step)
            strike()

    Heart.beat = faulty_beat

if SAMPLES and "bmctl" in " ".join(sys.orig_argv):
    from bmctl.engine.loading.split import Split

    take = Split.encoded

    def noted(self, plan, *, first, every):
        chosen = plan.steps(self.order(seed=plan.seed, epoch=plan.epoch))[first::every]
        for indices, batch in zip(chosen, take(self, plan, first=first, every=every), strict=True):
            first_step = plan.start_step + first
            with Path(SAMPLES, f"{os.getpid()}.jsonl").open("a") as file:
                line = {"time": time.time(), "epoch": plan.epoch, "step": first_step, "rank": plan.rank}
                file.write(json.dumps({**line, "world": plan.world, "ids": indices.tolist()}) + "\n")
            first += every
            yield batch

    Split.encoded = noted
