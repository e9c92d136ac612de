"""Processes that cannot be left behind: whatever happens to this one, they end with it."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

_TELLING = re.compile(r"Error|Exception|error:|insufficient|out of memory|No space left")
_SECONDS_TO_DIE = 30  # of killed processes; more only where the kernel holds them
_SHARED_MEMORY = "/dev/shm/"  # where Linux shows it as files


class GuardedProcess:
    """A function in a Python process of its own, connected by a pipe.

    The process leads a session, so that Ctrl-C does not reach it, and `kill` takes all that it
    started with it, and the memory that they share. It kills itself and them when the other end of the pipe
    is closed, as it is when this process dies. Files of the folder that it is started in are not imported.

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
        command = [sys.executable, "-P", "-m", __name__, target, str(theirs.fileno()), json.dumps(settings)]
        with theirs, log.open("ab") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, "PYTHONSAFEPATH": "1", **environment},
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
        if code == -signal.SIGBUS:
            return "killed by SIGBUS: a file that it reads was cut off meanwhile, or /dev/shm is full"
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    def kill(self) -> None:
        """End the process and all that it started, unless that was done; returns when they are gone."""
        if self.connection.closed:
            return
        self.connection.close()
        _end_group(self.pid)
        deadline = time.monotonic() + _SECONDS_TO_DIE
        while (self._process.poll() is None or any(_members(self.pid))) and time.monotonic() < deadline:
            time.sleep(0.01)


def last_words(log: Path, count: int = 3) -> str:
    """Return the last lines of a log that tell of an error, and where it is."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    telling = list(dict.fromkeys(line.strip() for line in lines if _TELLING.search(line)))[-count:]
    said = " ".join(["It said:", *telling]) + " " if telling else ""
    return f"{said}Its log: {log}"


def _die_with(pipe: int, seconds: float | None) -> None:
    """Kill this process and all that it started if the other end is closed within this time."""
    poll = select.poll()
    poll.register(pipe, 0)  # reports a hang-up only
    if poll.poll(None if seconds is None else 1000 * seconds):
        _end_group(os.getpgid(0))


def _end_group(group: int) -> None:
    """Kill the processes of a group, and remove the memory that they share."""
    for process in _members(group):
        for path in _shared_memory(process.pid):
            path.unlink(missing_ok=True)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def _members(group: int) -> Iterator[psutil.Process]:
    """Yield the living processes of a group; one that has ended and was not waited for holds nothing."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                yield process


def _shared_memory(pid: int) -> set[Path]:
    """Return the files of shared memory that a process has mapped, where the system shows it."""
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="replace").splitlines()
        return {Path(line[line.index(_SHARED_MEMORY) :]) for line in lines if _SHARED_MEMORY in line}
    return set()


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
