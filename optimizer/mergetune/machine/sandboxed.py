"""What runs inside the sandbox: a script of the standard library alone, which watches over the code.

It reads what is asked from a line of its input. It forks: the child runs code and tests and then writes a
secret to a pipe, so that code which merely ends does not pass; the parent holds the child to its limits.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import resource
import select
import signal
import sys
import time
import types
from collections.abc import Sequence
from typing import Any, NoReturn

PASSED, FAILED = 0, 10  # exit codes; Python's own are 1 and 2
_BROKEN = b"no limits: "

_POLL_MS = 50
_MIB = 2**20
# of Linux: <sys/mount.h>, <sys/prctl.h>, <linux/capability.h>, mount_setattr(2)
_MS_BIND, _MS_REC, _MNT_DETACH = 0x1000, 0x4000, 2
_SYS_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE = 442, -100, 0x8000
_MOUNT_ATTR_RDONLY, _MOUNT_ATTR_NOSUID = 1, 2
_PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 36, 38
_CAPABILITY_VERSION_3 = 0x20080522
_HOME = "/sandbox"
_DEVICES = ("null", "zero", "random", "urandom")
# The system counts a user's processes. Root's code has a user of its own; any other shares it with all else
# that the user runs, and is held to its limit by what `_watch` sees.
_MOST_OF_A_USER = 4096
_SECONDS_TO_END = 5


def main() -> NoReturn:
    """Run what the input asks for, and exit by how it ended."""
    asked = json.loads(sys.stdin.buffer.readline())
    if asked["is_isolated"]:
        _enter_a_root_of_its_own(os.getcwd(), asked["folders"])
    else:
        _call("prctl", _PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    os.environ["HOME"] = os.environ["TMPDIR"] = os.getcwd()
    secret = os.urandom(16)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        _run(asked, writing, secret)
    os.close(writing)
    said = _watch(child, reading, asked)
    if not asked["is_isolated"]:  # else the kernel ends all processes with the first, which is this one
        _end(child, asked["user"])
    if said.startswith(_BROKEN):
        sys.exit(said.decode())
    os._exit(PASSED if said == secret else FAILED)


def _run(asked: dict[str, Any], pipe: int, secret: bytes) -> NoReturn:
    """Run code and tests in one module, and write the secret if both come to their ends."""
    try:
        _limit(asked)
    except OSError as error:
        os.write(pipe, _BROKEN + str(error).encode())
        os._exit(0)
    try:
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in range(3):
            os.dup2(null, descriptor)
        sys.argv = ["reply.py"]
        module = sys.modules["reply"] = types.ModuleType("reply")  # dataclasses look their module up
        for name in ("code", "tests"):
            program = compile(asked[name], f"{name}.py", "exec", dont_inherit=True)
            exec(program, module.__dict__)
        os.write(pipe, secret)
    finally:
        os._exit(0)


def _limit(asked: dict[str, Any]) -> None:
    """Set the limits of this process, and give up every privilege for good."""
    os.setsid()
    user, seconds = asked["user"], math.ceil(asked["seconds"])
    for limit, value in (
        (resource.RLIMIT_AS, asked["memory_mb"] * _MIB),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, asked["file_mb"] * _MIB),
        (resource.RLIMIT_NPROC, _MOST_OF_A_USER if user is None else asked["processes"]),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))
    _call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if user is not None:
        # a plain process stays root for files, without its privileges: Python may lie in root's home
        _become(user, 0 if not asked["is_isolated"] else user)
    header, none = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0), (ctypes.c_uint32 * 6)()
    _call("capset", header, none)


def _become(user: int, for_files: int) -> None:
    """Change from root to a user; `for_files` is whose files it may read and write."""
    os.setgroups([])
    os.setresgid(user, for_files, for_files)
    os.setresuid(user, for_files, for_files)


def _watch(child: int, pipe: int, asked: dict[str, Any]) -> bytes:
    """Return what comes through the pipe until the child ends, breaks a limit, or the input is closed."""
    poll = select.poll()
    poll.register(0, 0)  # reports a hang-up only
    poll.register(pipe, select.POLLIN)
    deadline = time.monotonic() + asked["seconds"]
    while time.monotonic() < deadline and _is_within(asked):
        has_ended = _has_ended(child)
        ready = dict(poll.poll(0 if has_ended else _POLL_MS))
        if pipe in ready:
            return os.read(pipe, 64)
        if has_ended or 0 in ready:
            break
    return b""


def _is_within(asked: dict[str, Any]) -> bool:
    """Say whether all processes together are within the limits."""
    found = _descendants()
    pages = 0
    for pid in found:
        with contextlib.suppress(OSError), open(f"/proc/{pid}/statm", encoding="ascii") as file:
            pages += int(file.read().split()[1])
    used_mb = pages * resource.getpagesize() / _MIB
    return bool(len(found) <= asked["processes"] and used_mb <= asked["memory_mb"])


def _descendants() -> list[int]:
    """Return the processes that this one started, and those that they did."""
    children: dict[int, list[int]] = {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with (
            contextlib.suppress(OSError),
            open(f"/proc/{entry}/stat", encoding="utf-8", errors="replace") as file,
        ):
            parent = int(file.read().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(entry))
    found, todo = [], [os.getpid()]
    while todo:
        own = children.get(todo.pop(), [])
        found += own
        todo += own
    return found


def _has_ended(child: int) -> bool:
    """Say whether the child has ended; others that have, and were left to this process, are let go."""
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return True
        if pid in (0, child):
            return pid == child


def _end(group: int, user: int | None) -> None:
    """Kill a group of processes, and those that have left it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
    if user is not None and os.fork() == 0:
        _become(user, user)
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)  # all that this user may kill, but for this process
        os._exit(0)
    deadline = time.monotonic() + _SECONDS_TO_END
    while (found := _descendants()) and time.monotonic() < deadline:
        for pid in found if user is None else ():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        _has_ended(group)


def _enter_a_root_of_its_own(root: str, folders: Sequence[str]) -> None:
    """Leave the machine's file system for one with some of its folders, read-only, and an empty one."""
    _mount("tmpfs", root, "tmpfs", data="size=1m,mode=755")
    for folder in folders:
        _show(folder, root)
    os.makedirs(f"{root}/dev")
    for device in _DEVICES:
        with open(f"{root}/dev/{device}", "wb"):
            _mount(f"/dev/{device}", f"{root}/dev/{device}", flags=_MS_BIND)
    for name in ("/proc", _HOME):
        os.makedirs(root + name)
    for name in ("/dev/shm", "/tmp"):
        if not os.path.lexists(root + name):  # as `/tmp` where Python is installed there
            os.symlink(_HOME, root + name)
    _mount("proc", f"{root}/proc", "proc")
    _make_read_only(root)
    _mount("tmpfs", root + _HOME, "tmpfs", data="size=64m,mode=1777")
    os.chdir(root)
    _call("pivot_root", b".", b".")  # the old root then lies over the new one, as in pivot_root(2)
    _call("umount2", b".", _MNT_DETACH)
    os.chdir(_HOME)


def _show(folder: str, root: str) -> None:
    """Show a folder of the machine, or a link to one, at its place below the new root."""
    place = root + folder
    if os.path.lexists(place) or not os.path.exists(folder):
        return
    os.makedirs(os.path.dirname(place), exist_ok=True)
    if os.path.islink(folder):
        os.symlink(os.readlink(folder), place)
    else:
        os.mkdir(place)
        _mount(folder, place, flags=_MS_BIND | _MS_REC)


def _mount(source: str, target: str, kind: str | None = None, flags: int = 0, data: str = "") -> None:
    _call("mount", source.encode(), target.encode(), kind.encode() if kind else None, flags, data.encode())


def _make_read_only(folder: str) -> None:
    """Make all that is mounted in a folder read-only."""
    wanted = (ctypes.c_uint64 * 4)(_MOUNT_ATTR_RDONLY | _MOUNT_ATTR_NOSUID, 0, 0, 0)
    size = ctypes.sizeof(wanted)
    _call("syscall", _SYS_MOUNT_SETATTR, _AT_FDCWD, folder.encode(), _AT_RECURSIVE, wanted, size)


def _call(name: str, *arguments: Any) -> None:
    """Call a function of the C library that returns 0.

    Raises:
        OSError: it failed.
    """
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


if __name__ == "__main__":
    main()
