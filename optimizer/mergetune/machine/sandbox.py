"""A sandbox for Python code that a model wrote: a process of its own, shut off as far as the machine allows.

Where this user may make namespaces, the code has no network and sees no process but its own, and of the file
system the system's folders and Python's, read-only, and an empty folder in memory. Elsewhere it is a plain
process with limits alone. `sandboxed.py` is what runs inside.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from mergetune.errors import MergetuneError
from mergetune.machine.sandboxed import FAILED, PASSED

_INSIDE = Path(__file__).with_name("sandboxed.py")
_NAMESPACES = ("--net", "--ipc", "--mount", "--pid", "--fork", "--kill-child")
_AS_ROOT_OF_ITS_OWN = ("--user", "--map-root-user")
# What Python and its packages read, beside the folders that they are installed in.
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc", "/nix")
_SECONDS_TO_START = 60
_FIRST_USER = 2**30  # root's code runs as a user of its own, whose number no account has


@dataclass(frozen=True)
class Limits:
    """What code may use: by the clock, in each process and in all of them together, and in each file."""

    seconds: float = 10.0
    memory_mb: int = 1024
    processes: int = 32
    file_mb: int = 16


def passes(code: str, tests: str, limits: Limits) -> bool:
    """Say whether code runs, and then its tests in the same module, to the end without an exception.

    Returns when all that was started has ended; if this process is killed, so is all of that.

    Raises:
        MergetuneError: the sandbox itself cannot be started.
    """
    return _run(code, tests, limits, is_isolated())


@functools.cache
def is_isolated() -> bool:
    """Say whether namespaces shut code off on this machine, which is tried once."""
    if shutil.which("unshare") is not None:
        with contextlib.suppress(MergetuneError):
            return _run("import decimal", "", Limits(), is_isolated=True)  # Python's library is readable
    return False


def _run(code: str, tests: str, limits: Limits, is_isolated: bool) -> bool:
    is_root = os.geteuid() == 0
    asked = {
        "code": code,
        "tests": tests,
        "is_isolated": is_isolated,
        "folders": [*_SYSTEM, sys.prefix, sys.base_prefix],
        "user": _FIRST_USER + secrets.randbelow(_FIRST_USER) if is_root else None,
        **asdict(limits),
    }
    command = [sys.executable, "-s", "-P", str(_INSIDE)]
    if is_isolated:
        command = ["unshare", *(() if is_root else _AS_ROOT_OF_ITS_OWN), *_NAMESPACES, "--", *command]
    with tempfile.TemporaryDirectory(prefix="mergetune-", ignore_cleanup_errors=True) as folder:
        process = subprocess.Popen(
            command,
            cwd=folder,
            # no keys; sets of texts have the same order every time, and so have scores (-I would ignore that)
            env={"PATH": os.defpath, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            return _ended_well(process, asked, limits)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def _ended_well(process: subprocess.Popen[bytes], asked: dict[str, object], limits: Limits) -> bool:
    """Return what a process found; its input stays open meanwhile, for it ends where that is closed."""
    assert process.stdin is not None
    assert process.stderr is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(json.dumps(asked).encode() + b"\n")
        process.stdin.flush()
    try:
        code = process.wait(limits.seconds + _SECONDS_TO_START)
    except subprocess.TimeoutExpired as error:
        raise MergetuneError(
            "The sandbox for code has not ended in time: the machine is overloaded."
        ) from error
    if code > 0 and code != FAILED:
        said = process.stderr.read().decode(errors="replace").strip().rpartition("\n")[2]
        raise MergetuneError(f"The sandbox for code cannot be started (exit code {code}): {said}")
    return code == PASSED
