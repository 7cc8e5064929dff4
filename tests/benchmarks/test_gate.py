"""The clocks at a contender's gate."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BACKGROUND_S = 0.2
# A loop that a thread computes for whenever nobody is let through the gate.
LOOP = f"""
import threading, time
from tests.benchmarks.gate import Gate

def compute():
    while time.thread_time() < {BACKGROUND_S}:
        pass

class Busy(Gate):
    def _next(self):
        thread = threading.Thread(target=compute)
        thread.start()
        thread.join()
        return super()._next()

gate = Busy()
while True:
    gate.step()
"""


def test_what_goes_on_at_the_closed_gate_is_counted_in_all() -> None:
    turns = '{"steps": 1}\n' * 2
    loop = [sys.executable, "-c", LOOP]
    done = subprocess.run(loop, input=turns, stdout=subprocess.PIPE, text=True, cwd=ROOT, check=True)
    *_, turn = map(json.loads, done.stdout.splitlines())
    assert turn["cpu_seconds"] < BACKGROUND_S
    assert turn["cpu_seconds_in_all"] - turn["cpu_seconds"] >= 0.9 * BACKGROUND_S
