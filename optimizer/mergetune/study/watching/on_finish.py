"""The user's own command at the end of a study."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Collection
from dataclasses import asdict

from mergetune.report.status import read_status
from mergetune.results.run_dir import RunDir
from mergetune.study.watching.seen import Ended, Seen

_SECONDS = 600.0


class OnFinish:
    """The command of `on_finish`, which is called at the end alone.

    It gets the report's path as its last argument, and on its standard input, as JSON, what `mergetune status
    RUN --json` prints.

    Args:
        command: split into words as a shell would, but no shell runs it.
        run: the run directory.
    """

    secret = ""

    def __init__(self, command: str, run: RunDir) -> None:
        self.name = f"on_finish: {command}"
        self._words, self._run = shlex.split(command), run

    def connect(self, keys: Collection[str]) -> Collection[str]:
        """There is nothing to open, and candidates are not told."""
        return keys

    def show(self, seen: Seen) -> None:
        """A candidate alone is no matter of the command."""

    def finish(self, ended: Ended) -> None:
        """Call the command; raises `OSError` or `subprocess.SubprocessError` where that fails."""
        done = subprocess.run(
            [*self._words, str(ended.report.resolve())],
            input=json.dumps(asdict(read_status(self._run))),
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
        if done.returncode != 0:
            said = (done.stderr or done.stdout).strip().splitlines()
            raise OSError(f"exit code {done.returncode}: {said[-1] if said else 'no message'}")

    def close(self) -> None:
        """Nothing is held open."""
