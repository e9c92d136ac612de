"""Time in which the process was stopped is no cost."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

PROGRAM = """
import time
from mergetune.machine import clock

clock._TICK, clock._LATE = 0.05, 0.3
began, began_here = clock.seconds(), time.monotonic()
print("begun", flush=True)
while time.monotonic() - began_here < 2.5:
    time.sleep(0.01)
print(clock.seconds() - began, flush=True)
"""


def test_stopped_time_is_not_counted() -> None:
    process = subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGSTOP)
    time.sleep(1.5)
    process.send_signal(signal.SIGCONT)
    counted = float(process.communicate(timeout=20)[0])
    assert 0.5 < counted < 1.5
