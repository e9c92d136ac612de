"""Workers on a real Ray cluster of two nodes: the same scores, and nothing lost whatever dies."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

from mergetune.engines import ray_cluster
from mergetune.engines.engine import EngineConfig
from mergetune.errors import MergetuneError
from mergetune.evaluation.evaluate import Evaluator
from mergetune.evaluation.suite import read_suite
from mergetune.measuring.model_under_test import open_model
from mergetune.measuring.pool import Job, Pool
from mergetune.measuring.reply_store import ReplyStore
from mergetune.report.status import read_status
from mergetune.results.run_dir import RunDir
from studies import run, write_study, write_suite

N_TRIALS = 8
MOST_S = 300  # of a test
SLOW_S = 0.4  # so that there is a middle of a trial


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the workers of the two nodes put what goes with them."""
    return tmp_path_factory.mktemp("scratch")


@pytest.fixture(scope="module")
def cluster(scratch: Path) -> Iterator[Cluster]:
    """Two nodes of one core each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(scratch))
        patch.setenv("RAY_TMPDIR", tempfile.gettempdir())  # where paths of sockets are short enough
        found: Any = Cluster(initialize_head=True, connect=False, head_node_args={"num_cpus": 1})
        found.add_node(num_cpus=1)
    yield found
    found.shutdown()


@pytest.fixture(autouse=True)
def _no_process_is_left() -> Iterator[None]:
    """Nothing is left of a test, and none waits for ever."""

    def give_up(*_: object) -> None:
        raise TimeoutError(f"still at work after {MOST_S} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(MOST_S)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    deadline = time.monotonic() + 20
    while (left := workers()) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left == []
    assert not ray.is_initialized()


def workers(doing: str = "") -> list[int]:
    """Return the processes of the actors; Ray names each by what it is doing."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.cmdline()[:1] and process.cmdline()[0].startswith(f"ray::EngineHost{doing}"):
                found.append(process.pid)
    return found


def replace_host(monkeypatch: pytest.MonkeyPatch, host: type[ray_cluster.EngineHost]) -> None:
    host.__module__ = "__main__"  # so that it is sent whole
    monkeypatch.setattr(ray_cluster, "EngineHost", host)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every worker wait before it replies, those of a node with SLOW times as long."""

    class EngineHost(ray_cluster.EngineHost):
        def reply(self, *arguments: Any) -> list[Any]:
            time.sleep(SLOW_S * float(os.environ.get("SLOW", "1")))
            return super().reply(*arguments)

    replace_host(monkeypatch, EngineHost)


def study_of(
    folder: Path, base: Path, experts: dict[str, Path], n_trials: int = N_TRIALS, **engine: Any
) -> Path:
    options, budget = {"kind": "transformers", **engine}, {"trials": n_trials, "patience": n_trials}
    return write_study(folder, base, experts, engine=options, budget=budget, elimination=0.0)


def results(folder: Path) -> dict[str, Any]:
    found = RunDir(folder)
    return {
        each.name: (each.number, each.recipe.digest, each.params, scores(found, each.name))
        for each in found.candidates()
    }


def scores(found: RunDir, name: str) -> Any:
    return found.scores(name, "search"), found.scores(name, "holdout")


def assert_whole(folder: Path, n_trials: int = N_TRIALS) -> None:
    """Every trial was measured once, and nothing is in the run that should not be there."""
    found = RunDir(folder)
    trials = [each for each in found.candidates() if each.role == "trial"]
    assert sorted(each.name for each in trials) == [f"trial-{i:04}" for i in range(1, n_trials + 1)]
    assert {each.state for each in trials} == {"complete"}
    assert len({each.number for each in found.candidates()}) == len(found.candidates())
    assert not list((folder / "attempts").glob("*"))


def in_mid_trial(folder: Path, what: Callable[[], object]) -> threading.Thread:
    """Do something once two trials are measured and a worker is at the next."""

    def wait() -> None:
        candidates = folder / "candidates"
        while len(list(candidates.glob("trial-*.json"))) < 2 or not workers(".reply"):
            time.sleep(0.02)
        what()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


@contextmanager
def running(study: Path, out: Path) -> Iterator[None]:
    """Run a study in a thread, the block beginning in the middle of a trial; only this one starts nodes."""
    errors: list[BaseException] = []

    def work() -> None:
        try:
            run(study, out)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    in_mid_trial(out, lambda: None).join(120)
    yield
    thread.join(240)
    assert errors == []
    assert not thread.is_alive()


def kill_one() -> None:
    os.kill(workers(".reply")[0], signal.SIGKILL)


@pytest.mark.parametrize("n_workers", [1, 2])
def test_a_study_with_workers_has_the_scores_of_one_without(
    cluster: Cluster,
    scratch: Path,
    tiny_base: Path,
    tiny_experts: dict[str, Path],
    tmp_path: Path,
    n_workers: int,
) -> None:
    """One worker: the same study to the last digit. Two: the same scores of what both measured."""
    run(study_of(tmp_path / "plain", tiny_base, tiny_experts), tmp_path / "plain" / "run")
    engine = {"workers": n_workers, "ray_address": cluster.address}
    study = study_of(tmp_path / "spread", tiny_base, tiny_experts, **engine)
    printed = run(study, tmp_path / "spread" / "run")
    plain, spread = results(tmp_path / "plain" / "run"), results(tmp_path / "spread" / "run")
    if n_workers == 1:
        assert spread == plain
        assert not list(scratch.iterdir())
    by_recipe = {digest: own for _, digest, _, own in plain.values()}
    both = [(own, by_recipe[digest]) for _, digest, _, own in spread.values() if digest in by_recipe]
    assert len(both) >= 7  # the baselines
    assert all(own[0] == other[0] for own, other in both)
    assert "engine: transformers" in printed
    assert_whole(tmp_path / "spread" / "run")

    # where it runs is no part of what a study is: it goes on without workers, and has nothing to do
    run(study_of(tmp_path / "spread", tiny_base, tiny_experts), tmp_path / "spread" / "run")
    assert results(tmp_path / "spread" / "run") == spread


@pytest.mark.usefixtures("slow")
def test_a_worker_that_is_killed_is_replaced_and_its_trial_measured(
    cluster: Cluster, tiny_base: Path, tiny_experts: dict[str, Path], tmp_path: Path
) -> None:
    study = study_of(tmp_path, tiny_base, tiny_experts, workers=2, ray_address=cluster.address)
    killer = in_mid_trial(tmp_path / "run", kill_one)
    printed = run(study, tmp_path / "run")
    killer.join(1)
    assert "is gone" in printed
    assert_whole(tmp_path / "run")
    assert sum(len(each.faults) for each in RunDir(tmp_path / "run").candidates()) == 1


@pytest.mark.usefixtures("slow")
def test_a_node_that_is_killed_takes_no_trial_with_it(
    cluster: Cluster, tiny_base: Path, tiny_experts: dict[str, Path], tmp_path: Path
) -> None:
    doomed = cluster.add_node(num_cpus=1)
    study = study_of(tmp_path, tiny_base, tiny_experts, workers=3, ray_address=cluster.address)
    with running(study, tmp_path / "run"):
        hosts = set(read_status(RunDir(tmp_path / "run")).under_way.values())
        cluster.remove_node(doomed, allow_graceful=False)
    assert_whole(tmp_path / "run")
    assert hosts == {socket.gethostname()}


@pytest.mark.usefixtures("slow")
def test_a_node_that_joins_late_takes_its_share(
    cluster: Cluster, tiny_base: Path, tiny_experts: dict[str, Path], tmp_path: Path
) -> None:
    """Three workers are wanted where two find room; nothing waits for the third."""
    study = study_of(tmp_path, tiny_base, tiny_experts, n_trials=50, workers=3, ray_address=cluster.address)
    most = 0
    with running(study, tmp_path / "run"):
        late = cluster.add_node(num_cpus=1)
        deadline = time.monotonic() + 60
        while most < 3 and time.monotonic() < deadline:
            most = max(most, len(workers(".reply")))
            time.sleep(0.02)
    cluster.remove_node(late)
    assert_whole(tmp_path / "run", n_trials=50)
    assert most == 3


@pytest.mark.usefixtures("slow")
def test_a_worker_that_is_ten_times_slower_holds_up_its_own_trial_alone(
    cluster: Cluster, tiny_base: Path, tiny_experts: dict[str, Path], tmp_path: Path
) -> None:
    lame = cluster.add_node(num_cpus=1, env_vars={"SLOW": "10"})
    study = study_of(tmp_path, tiny_base, tiny_experts, n_trials=40, workers=3, ray_address=cluster.address)
    try:
        run(study, tmp_path / "run")
    finally:
        cluster.remove_node(lame)
    assert_whole(tmp_path / "run", n_trials=40)
    seconds = [each.cost.evaluate_s for each in RunDir(tmp_path / "run").candidates()]
    n_lame = sum(each > 10 * SLOW_S for each in seconds)
    assert 0 < n_lame < len(seconds) / 3


def test_a_full_disk_on_one_node_is_its_fault_alone(
    cluster: Cluster,
    tiny_base: Path,
    tiny_experts: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class EngineHost(ray_cluster.EngineHost):
        def load(self, recipe: str) -> Any:
            if "FULL" in os.environ:
                raise OSError(28, "No space left on device")
            time.sleep(SLOW_S)
            return super().load(recipe)

    replace_host(monkeypatch, EngineHost)
    full = cluster.add_node(num_cpus=1, env_vars={"FULL": "1"})
    study = study_of(tmp_path, tiny_base, tiny_experts, n_trials=30, workers=3, ray_address=cluster.address)
    try:
        printed = run(study, tmp_path / "run")
    finally:
        cluster.remove_node(full)
    assert "No space left on device" in printed
    assert_whole(tmp_path / "run", n_trials=30)


def test_a_driver_that_is_killed_leaves_nothing_running_and_goes_on(
    cluster: Cluster, tiny_base: Path, tiny_experts: dict[str, Path], tmp_path: Path
) -> None:
    study = study_of(tmp_path, tiny_base, tiny_experts, workers=2, ray_address=cluster.address)
    command = [sys.executable, "-m", "mergetune.cli", "run", str(study), "--out", str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as driver:
        in_mid_trial(tmp_path / "run", driver.kill).join(300)
    known = results(tmp_path / "run")
    assert sum(name.startswith("trial") for name in known) >= 2
    deadline = time.monotonic() + 30
    while workers() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert workers() == []
    run(study, tmp_path / "run")
    assert_whole(tmp_path / "run")
    after = results(tmp_path / "run")
    assert {name: after[name][:3] for name in known} == {name: own[:3] for name, own in known.items()}


def test_items_of_one_model_are_spread_over_workers(
    cluster: Cluster, tiny_base: Path, tmp_path: Path
) -> None:
    suite = write_suite(tmp_path, ["x"] * 40, holdout=0)
    evaluator, found = Evaluator(suite), {}
    everything = evaluator.documents("all")
    for n_workers in (None, 2):
        address = cluster.address if n_workers else None
        config = EngineConfig(kind="transformers", workers=n_workers, ray_address=address)
        store = ReplyStore(tmp_path / f"store-{n_workers}")
        with closing(Pool(open_model(str(tiny_base)), config, evaluator, store)) as pool:
            for n in (8, 16, 24, 32):  # as a check that may stop early asks for more and more
                pool.measured(Job("test", {task: own[:n] for task, own in everything.items()}))
            measured = pool.measured(Job("test", everything))
        assert measured.n_asked == 8
        found[n_workers] = measured.measurement.items[["item", "response", "score"]]
    assert found[None].equals(found[2])


def test_a_cluster_that_is_not_there_is_an_error(tiny_base: Path, tmp_path: Path) -> None:
    config = EngineConfig(kind="transformers", workers=2, ray_address="127.0.0.1:1")
    evaluator = Evaluator(write_suite(tmp_path, ["x"] * 4, holdout=0))
    pool = Pool(open_model(str(tiny_base)), config, evaluator, None)
    with (
        closing(pool),
        pytest.raises(MergetuneError, match=r"must be a Ray cluster at `127\.0\.0\.1:1`"),
    ):
        pool.start()


def test_times_of_replies_are_not_taken_beside_others(tiny_base: Path, tmp_path: Path) -> None:
    write_suite(tmp_path, ["x"] * 4, holdout=0)
    file = tmp_path / "suite.yaml"
    file.write_text(file.read_text().replace("scorer: exact", "scorer: latency"))
    config = EngineConfig(kind="transformers", workers=2)
    evaluator = Evaluator(read_suite(file))
    pool = Pool(open_model(str(tiny_base)), config, evaluator, None)
    with closing(pool), pytest.raises(MergetuneError, match="on which nothing else is under way"):
        pool.measured(Job("test", evaluator.documents("all")))


def test_a_study_whose_workers_cannot_start_leaves_the_cluster(
    cluster: Cluster,
    tiny_base: Path,
    tiny_experts: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class EngineHost(ray_cluster.EngineHost):
        def start(self, *_: Any) -> Any:
            raise OSError(28, "No space left on device")

    replace_host(monkeypatch, EngineHost)
    study = study_of(tmp_path, tiny_base, tiny_experts, workers=2, ray_address=cluster.address)
    with pytest.raises(MergetuneError, match="No space left on device"):
        run(study, tmp_path / "run")
    assert not ray.is_initialized()
