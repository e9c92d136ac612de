"""Processes that cannot be left behind: whatever happens to this one, they end with it."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

_SECONDS_TO_DIE = 30  # of a killed process; more only where the kernel holds it


class GuardedProcess:
    """A function in a Python process of its own, connected by a pipe.

    The process leads a session, so that Ctrl-C does not reach it, and `kill` takes all that it
    started with it. It kills itself and them when the other end of the pipe is closed, as it is when
    this process dies.

    Args:
        target: `module:function`; called with the connection and the settings.
        settings: JSON.
        log: the file that its output is added to.
        environment: variables beside those of this process.
    """

    def __init__(
        self, target: str, settings: Mapping[str, Any], log: Path, environment: Mapping[str, str]
    ) -> None:
        self.connection, theirs = Pipe()
        command = [sys.executable, "-m", __name__, target, str(theirs.fileno()), json.dumps(settings)]
        with theirs, log.open("ab") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, **environment},
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """The process's number, and its group's."""
        return self._process.pid

    def ending(self) -> str | None:
        """Return how the process ended, None while it lives."""
        code = self._process.poll()
        if code is None:
            return None
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    def kill(self) -> None:
        """End the process and all that it started, unless that was done."""
        if self.connection.closed:
            return
        self.connection.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait(_SECONDS_TO_DIE)


def last_words(log: Path, count: int = 3) -> str:
    """Return the last lines of a log that tell of an error, and where it is."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    telling = [line for line in lines if "Error" in line or "error:" in line][-count:]
    said = " ".join(["It said:", *telling]) + " " if telling else ""
    return f"{said}Its log: {log}"


def _die_with(pipe: int, seconds: float | None) -> None:
    """Kill this process and all that it started if the other end is closed within this time."""
    poll = select.poll()
    poll.register(pipe, 0)  # reports a hang-up only
    if poll.poll(None if seconds is None else 1000 * seconds):
        os.killpg(0, signal.SIGKILL)


def _main(target: str, descriptor: str, settings: str) -> None:
    pipe = int(descriptor)
    connection = Connection(pipe)
    threading.Thread(target=_die_with, args=[pipe, None], daemon=True).start()
    module, _, function = target.partition(":")
    try:
        getattr(importlib.import_module(module), function)(connection, json.loads(settings))
    finally:  # it may have met the closed end before the thread was told of it
        _die_with(pipe, 0)


if __name__ == "__main__":
    _main(*sys.argv[1:])
