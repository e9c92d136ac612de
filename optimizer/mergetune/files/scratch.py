"""Temporary folders that go with their process, even where it is killed."""

from __future__ import annotations

import atexit
import contextlib
import shutil
import tempfile
import time
from pathlib import Path

from filelock import FileLock, Timeout

_PREFIX, _LOCK = "mergetune-scratch-", "in-use.lock"
_SECONDS_TO_LOCK = 60.0  # more than lies between a folder and its lock


def scratch_folder() -> Path:
    """Return a new temporary folder that is removed at the end of this process.

    That of a process that was killed is removed when the next one is made on the machine.
    """
    _remove_abandoned(Path(tempfile.gettempdir()))
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
    lock = FileLock(folder / _LOCK)
    lock.acquire()  # the system gives it back with the process
    atexit.register(_remove, folder, lock)
    return folder


def _remove(folder: Path, lock: FileLock) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    lock.release()


def _remove_abandoned(parent: Path) -> None:
    for folder in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(Timeout, OSError):  # in use, of another user, or removed meanwhile
            if time.time() - folder.stat().st_mtime > _SECONDS_TO_LOCK:
                with FileLock(folder / _LOCK, timeout=0):
                    shutil.rmtree(folder, ignore_errors=True)
