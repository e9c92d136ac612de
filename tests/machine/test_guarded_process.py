"""Processes that cannot be left behind, whatever ends them or their parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import is_alive, wait_until_gone
from mergetune.machine.guarded_process import GuardedProcess, last_words

ANSWER, SHARE = "guarded_targets:answer", "guarded_targets:share"
ENVIRONMENT = {"PYTHONPATH": str(Path(__file__).parents[1])}


def test_it_answers_and_takes_its_children_with_it_when_killed(tmp_path: Path) -> None:
    process = GuardedProcess(ANSWER, {"a": 1}, tmp_path / "log", ENVIRONMENT)
    child, settings = process.connection.recv()
    assert settings == {"a": 1}
    process.connection.send("hello")
    assert process.connection.recv() == "hello"
    assert process.ending() is None
    assert os.getpgid(child) == process.pid != os.getpgid(0)
    process.kill()
    wait_until_gone(process.pid, child)
    assert process.ending() == "killed by SIGKILL"
    process.kill()  # twice does no harm
    assert "hello from the child" in last_words(tmp_path / "log")


def test_nothing_is_left_when_kill_returns(tmp_path: Path) -> None:
    process = GuardedProcess(SHARE, {}, tmp_path / "log", ENVIRONMENT)
    name, child = process.connection.recv()
    memory = Path("/dev/shm", name)
    assert memory.stat().st_size == 2**26
    process.kill()
    assert not is_alive(process.pid)
    assert not is_alive(child)
    assert not memory.exists()


def test_the_memory_shared_goes_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    program = (
        "import time\nfrom pathlib import Path\n"
        "from mergetune.machine.guarded_process import GuardedProcess\n"
        f"target, log = {SHARE!r}, Path({str(tmp_path / 'log')!r})\n"
        f"process = GuardedProcess(target, {{}}, log, {ENVIRONMENT!r})\n"
        "print(process.pid, *process.connection.recv(), flush=True)\n"
        "time.sleep(300)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid, name, child = parent.stdout.readline().split()
    parent.kill()
    parent.wait()
    wait_until_gone(int(pid), int(child))
    assert not Path("/dev/shm", name).exists()


def test_files_of_the_users_folder_do_not_shadow_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("optimizer.py", "json.py", "vllm.py"):
        (tmp_path / name).write_text("raise RuntimeError('shadowed')")
    monkeypatch.chdir(tmp_path)
    process = GuardedProcess(ANSWER, {"a": 1}, tmp_path / "log", ENVIRONMENT)
    assert process.connection.recv()[1] == {"a": 1}
    process.kill()


def test_children_are_ended_even_if_the_process_died_before(tmp_path: Path) -> None:
    process = GuardedProcess(ANSWER, {}, tmp_path / "log", ENVIRONMENT)
    child, _ = process.connection.recv()
    os.kill(process.pid, signal.SIGKILL)
    process.kill()
    wait_until_gone(process.pid, child)


def test_it_dies_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    # Several, as the process may meet the closed pipe before its watching thread does.
    program = (
        "import sys, time\nfrom pathlib import Path\n"
        "from mergetune.machine.guarded_process import GuardedProcess\n"
        f"process = GuardedProcess({ANSWER!r}, {{}}, Path({str(tmp_path / 'log')!r}), {ENVIRONMENT!r})\n"
        "print(process.pid, process.connection.recv()[0], flush=True)\n"
        "time.sleep(300)\n"
    )
    command = [sys.executable, "-c", program]
    parents = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(8)]
    pids: list[int] = []
    for parent in parents:
        assert parent.stdout is not None
        pids += [int(word) for word in parent.stdout.readline().split()]
    assert len(pids) == 2 * len(parents)
    for parent in parents:
        parent.kill()
        parent.wait()
    wait_until_gone(*pids)
