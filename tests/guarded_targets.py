"""What the tests of guarded processes run in them: a module that is imported in a moment."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory
from typing import Any


def answer(connection: Connection, settings: dict[str, Any]) -> None:
    """Start a child that lives for minutes, tell its number, and echo what comes."""
    child = subprocess.Popen(["sleep", "300"])
    print("Error: hello from the child")
    sys.stdout.flush()
    connection.send((child.pid, settings))
    while True:
        connection.send(connection.recv())


def share(connection: Connection, _settings: dict[str, Any]) -> None:
    """Hold 64 MiB of shared memory together with a child, and tell its name and the child's number."""
    memory = SharedMemory(create=True, size=2**26)
    child = os.fork()
    if child == 0:
        time.sleep(300)
    connection.send((memory.name, child))
    time.sleep(300)
