"""The user's own command at the end of a study."""

from __future__ import annotations

import json
import shlex
import subprocess
from dataclasses import asdict
from pathlib import Path

from mergetune.report.status import read_status
from mergetune.results.run_dir import RunDir

_SECONDS = 600.0


def call(command: str, report: Path, run: RunDir) -> str:
    """Call the command of `on_finish`; returns what went wrong, if anything did.

    It gets the report's path as its last argument, and on its standard input, as JSON, what `mergetune status
    RUN --json` prints.

    Args:
        command: split into words as a shell would, but no shell runs it.
        report: the report.
        run: the run directory.
    """
    words = [*shlex.split(command), str(report.resolve())]
    try:
        done = subprocess.run(
            words,
            input=json.dumps(asdict(read_status(run))),
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    said = (done.stderr or done.stdout).strip().splitlines()
    return (
        "" if done.returncode == 0 else f"exit code {done.returncode}: {said[-1] if said else 'no message'}"
    )
