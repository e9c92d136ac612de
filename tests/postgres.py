"""A PostgreSQL server of a test's own: Debian's package `postgresql`, in a temporary folder."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

PASSWORD = "s3cret/@%:"  # that has to be quoted in a URL
_NAME = "nobody"  # whom the server runs as where the tests run as root, which it refuses


def programs() -> Path | None:
    """Return the folder of PostgreSQL's programs, the newest, None where there is none."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: float(path.parts[-3]))
    on_path = shutil.which("initdb")
    return found[-1].parent if found else Path(on_path).parent if on_path else None


def skip_without_postgres() -> None:
    """Skip a test where the package is missing; on the machines of CI it never is."""
    if programs() is None:
        assert "CI" not in os.environ, "CI has to install Debian's package `postgresql`: see the Makefile"
        pytest.skip("needs Debian's package `postgresql`: apt-get install postgresql")


class Postgres:
    """A server on a free port of this machine, whose user `watcher` has a password.

    Args:
        folder: where it keeps everything, which any user can reach.
    """

    def __init__(self, folder: Path) -> None:
        found = programs()
        assert found is not None
        self._programs, self._data = found, folder / "data"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        secret = folder / "password"
        secret.write_text(PASSWORD)
        if os.geteuid() == 0:
            user = pwd.getpwnam(_NAME)
            for path in (folder, secret):
                os.chown(path, user.pw_uid, user.pw_gid)
        self._call(
            *("initdb", "--pgdata", str(self._data), "--username", "watcher", "--pwfile", str(secret)),
            *("--auth", "scram-sha-256", "--no-sync"),
        )
        self.start()

    def url(self, password: str = "${WATCHER_PASSWORD}", database: str = "postgres") -> str:
        """Return its URL."""
        return f"postgresql://watcher:{password}@127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        """Start it, and wait until it answers."""
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories= -c fsync=off"
        log = str(self._data.parent / "log")
        self._call("pg_ctl", "start", "--wait", "--pgdata", str(self._data), "--log", log, "-o", options)

    def kill(self) -> None:
        """End it as `kill -9` does, with all that it was doing."""
        if not (self._data / "postmaster.pid").exists():
            return
        number = int((self._data / "postmaster.pid").read_text().split()[0])
        children = Path(f"/proc/{number}/task/{number}/children").read_text().split()
        for each in (number, *map(int, children)):
            os.kill(each, signal.SIGKILL)
        (self._data / "postmaster.pid").unlink()

    def _call(self, program: str, *arguments: str) -> None:
        command: Sequence[str] = [str(self._programs / program), *arguments]
        user = _NAME if os.geteuid() == 0 else None
        group, folder = "nogroup" if user else None, self._data.parent
        done = subprocess.run(command, user=user, group=group, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
