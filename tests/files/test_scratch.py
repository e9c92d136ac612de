"""Temporary folders: they go with their process, and with the next one where it was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

MAKE = "from mergetune.files.scratch import scratch_folder; print(scratch_folder(), flush=True)"


def made(process: subprocess.Popen[str]) -> Path:
    assert process.stdout is not None
    return Path(process.stdout.readline().strip())


def start(code: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def test_a_folder_goes_with_its_process_or_else_with_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with start(f"{MAKE}; input()") as killed, start(f"{MAKE}; input()") as living:
        left, used = made(killed), made(living)
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        with start(MAKE) as early:
            ended = made(early)
        assert not ended.exists()
        assert left.is_dir()  # too young to tell it from one that is being made
        for folder in (left, used):
            os.utime(folder, (time.time() - 120,) * 2)
        with start(MAKE) as late:
            made(late)
        assert not left.exists()
        assert used.is_dir()
        living.communicate("\n")
    assert list(tmp_path.iterdir()) == []
