"""The sandbox: what ends, what is out of reach, and that nothing is left."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from mergetune.machine import sandbox
from mergetune.machine.sandbox import Limits, is_isolated, passes
from mergetune.machine.sandboxed import _PR_SET_CHILD_SUBREAPER

Run = Callable[..., bool]

LIMITS = Limits(seconds=30, memory_mb=512)  # enough where the machine is busy
isolated = pytest.mark.skipif(not is_isolated(), reason="this user may make no namespaces here")


@pytest.fixture(scope="module", autouse=True)
def _orphans_are_found() -> Iterator[None]:
    """Let processes whose parent has ended become children of this one, where `sandboxed` sees them."""
    for is_parent_of_orphans in (1, 0):
        assert ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, is_parent_of_orphans, 0, 0, 0) == 0
        if is_parent_of_orphans:
            yield


def sandboxed() -> list[psutil.Process]:
    """Return the living processes of sandboxes that this process, or one that it started, has made."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            is_inside = any("sandboxed.py" in word for word in process.cmdline())
            found += [process] if is_inside and process.status() != psutil.STATUS_ZOMBIE else []
    return found


def runs(code: str, tests: str = "", limits: Limits = LIMITS) -> bool:
    """Run code, and see that all has ended when that returns."""
    has_passed = passes(code, tests, limits)
    assert not sandboxed()
    return has_passed


def plainly(code: str, tests: str = "", limits: Limits = LIMITS) -> bool:
    """Run code as on a machine without namespaces."""
    has_passed = sandbox._run(code, tests, limits, False)
    assert not sandboxed()
    return has_passed


@pytest.mark.parametrize("run", [runs, plainly])
def test_tests_run_after_the_code_in_one_module(run: Run) -> None:
    assert run("x = 1", "assert x == 1")
    assert not run("x = 1", "assert x == 2")
    assert not run("x =", "")
    assert not run("x = '''", "'''")  # which must not swallow the tests
    assert run("if __name__ == '__main__':\n    input()", "")


@pytest.mark.parametrize("run", [runs, plainly])
@pytest.mark.parametrize(
    "code",
    [
        "import os; os._exit(0)",
        "import sys; sys.exit(0)",
        "raise SystemExit",
        "import os; os.kill(os.getpid(), 9)",
        "import ctypes; ctypes.string_at(0)",
    ],
)
def test_code_that_ends_before_its_tests_does_not_pass(run: Run, code: str) -> None:
    assert not run(code, "assert True")


@pytest.mark.parametrize("run", [runs, plainly])
@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "import time; time.sleep(60)",
        "import signal\nfor each in range(1, 32):\n    try: signal.signal(each, signal.SIG_IGN)\n"
        "    except OSError: pass\nwhile True: pass",
    ],
)
def test_what_does_not_end_is_ended(run: Run, code: str) -> None:
    begin = time.monotonic()
    assert not run(code, limits=Limits(seconds=0.5))
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize("run", [runs, plainly])
@pytest.mark.parametrize(
    "code",
    [
        "x = bytearray(2**30)",
        "x = []\nwhile True: x.append(bytearray(2**24))",
        # each within the limit, all together not
        "import os, time\nfor _ in range(6):\n    if os.fork() == 0:\n        x = bytearray(b'x') * 2**27\n"
        "        time.sleep(60)\ntime.sleep(60)",
    ],
)
def test_memory_is_limited(run: Run, code: str) -> None:
    begin = time.monotonic()
    assert not run(code, limits=Limits(seconds=20, memory_mb=512))
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize("run", [runs, plainly])
@pytest.mark.parametrize("leaves_its_group", ["", "os.setsid()"])
def test_processes_are_limited_and_end(run: Run, leaves_its_group: str) -> None:
    """More than are allowed, but no true fork bomb: where the limit fails, the machine must live on."""
    child = f"if os.fork() == 0:\n        {leaves_its_group or 'pass'}\n        time.sleep(60)"
    assert not run(f"import os, time\nfor _ in range(64):\n    {child}\ntime.sleep(60)")


@isolated
@pytest.mark.skipif(os.geteuid() != 0, reason="the system counts each process of root's code alone")
def test_a_fork_bomb_ends() -> None:
    begin = time.monotonic()
    bomb = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    assert not runs(bomb, limits=Limits(seconds=2))
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize("run", [runs, plainly])
def test_files_are_limited_in_size(run: Run) -> None:
    write = "with open('x', 'wb') as file: file.write(bytes(2**{}))"
    assert run(write.format(20))
    assert not run(write.format(25))


@pytest.mark.parametrize("run", [runs, plainly])
def test_code_begins_in_an_empty_folder_that_is_removed(run: Run, tmp_path: Path) -> None:
    code = (
        "import os\nassert os.listdir() == [] and os.getcwd() == os.environ['HOME']\nopen('x', 'w').close()"
    )
    before = set(Path("/tmp").glob("mergetune-*"))
    assert run(code)
    assert set(Path("/tmp").glob("mergetune-*")) <= before


@pytest.mark.parametrize("run", [runs, plainly])
def test_the_environment_is_not_passed_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "secret")
    assert run("import os", "assert 'MY_API_KEY' not in os.environ and len(os.environ) < 10")


@isolated
def test_no_network_is_reachable() -> None:
    connecting = "import socket; socket.create_connection(('127.0.0.1', {}), 1)"
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        socket.create_connection(("127.0.0.1", port), 1).close()  # from here it is
        assert not runs(connecting.format(port))
        assert plainly(connecting.format(port))  # as the docs say


@isolated
def test_files_outside_are_neither_seen_nor_written(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    assert runs(f"import os; assert not os.path.exists({str(tmp_path / 'secret')!r})")
    for folder in ("/", "/usr", "/etc", "/dev", sys.prefix, str(tmp_path)):
        place = Path(folder) / "mergetune-was-here"
        assert not runs(f"open({str(place)!r}, 'w').write('x')")
        assert not place.exists()


@isolated
def test_the_walls_cannot_be_taken_down() -> None:
    remount = "import ctypes; c = ctypes.CDLL(None); "
    assert runs(remount + "assert c.mount(None, b'/usr', None, 0x1020, None) == -1")  # read and write again
    assert runs(remount + "assert c.umount2(b'/proc', 2) == -1")
    inner = "import os, subprocess\nassert subprocess.run(['unshare', '-Ur', 'touch', '/usr/x']).returncode"
    assert runs(inner)
    assert runs("import os; assert len([each for each in os.listdir('/proc') if each.isdigit()]) == 2")


@pytest.mark.parametrize("run", [runs, plainly])
def test_ordinary_programs_run(run: Run) -> None:
    assert run("import numpy as np", "assert np.ones((8, 8)).sum() == 64", limits=Limits())
    assert run(
        "from __future__ import annotations\nimport dataclasses\n@dataclasses.dataclass\nclass A: x: int",
        "assert A(1).x == 1",
    )
    assert run("import subprocess", "assert subprocess.check_output(['echo', 'hi']) == b'hi\\n'")
    assert run(
        "import multiprocessing\ncontext = multiprocessing.get_context('fork')",
        "with context.Pool(2) as pool: assert pool.map(abs, [-1, 2]) == [1, 2]",
    )


@pytest.mark.parametrize("run", [runs, plainly])
def test_what_depends_on_the_order_of_texts_is_the_same_every_time(run: Run) -> None:
    code = "assert list({'a', 'b', 'c', 'd', 'e', 'f'}) == %r"
    order = subprocess.run(
        [sys.executable, "-c", "print(list({'a', 'b', 'c', 'd', 'e', 'f'}))"],
        env={"PYTHONHASHSEED": "0"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert run(code.replace("%r", order))


@pytest.mark.parametrize("is_isolated", [pytest.param(True, marks=isolated), False])
def test_nothing_is_left_of_a_process_that_is_killed(is_isolated: bool) -> None:
    code = "import os, time\nif os.fork() == 0: os.setsid()\ntime.sleep(60)"
    program = (
        "from mergetune.machine import sandbox\n"
        f"sandbox._run({code!r}, '', sandbox.Limits(seconds=60), {is_isolated})"
    )
    parent = subprocess.Popen([sys.executable, "-c", program])
    deadline = time.monotonic() + 30
    while len(sandboxed()) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(sandboxed()) >= 3  # what watches, the code, and what it started
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    while sandboxed() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not sandboxed()
