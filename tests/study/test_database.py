"""A study's mirror in a real PostgreSQL: each candidate once, whatever becomes of the server."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

from mergetune.errors import MergetuneError
from mergetune.results.run_dir import Candidate, RunDir
from mergetune.study.watching.database import Database
from mergetune.study.watching.seen import Seen, key_of
from mergetune.study.watching.watchers import Watchers
from postgres import PASSWORD, Postgres, skip_without_postgres
from studies import run, write_study
from synthetic_run import Plan, write_run

psycopg = pytest.importorskip("psycopg")


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    skip_without_postgres()
    with tempfile.TemporaryDirectory(prefix="postgres-") as folder:
        found = Postgres(Path(folder))
        yield found
        found.kill()


@pytest.fixture(autouse=True)
def _password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHER_PASSWORD", PASSWORD)


def mirrored(server: Postgres, folder: Path) -> optuna.Study:
    url = Database(server.url(), RunDir(folder)).secret
    return optuna.load_study(study_name=RunDir(folder).watched_as(), storage=url)


def by_name(study: optuna.Study) -> dict[str, FrozenTrial]:
    trials = study.get_trials()
    names = [trial.user_attrs["candidate"] for trial in trials]
    assert len(names) == len(set(names)), "each candidate is there once"
    return dict(zip(names, trials, strict=True))


def holds_password(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and PASSWORD.encode() in path.read_bytes()]


def test_a_study_is_mirrored_goes_on_and_mixes_with_no_other(
    server: Postgres, tiny_base: Path, tiny_experts: dict[str, Path], tmp_path: Path
) -> None:
    for folder, trials in (("first", 2), ("first", 3), ("second", 1)):
        study = write_study(
            tmp_path / folder, tiny_base, tiny_experts, storage=server.url(), budget={"trials": trials}
        )
        printed = run(study, tmp_path / folder / "run")
        assert "storage" not in printed
        assert PASSWORD not in printed
    assert not holds_password(tmp_path)

    out = RunDir(tmp_path / "first" / "run")
    found = mirrored(server, out.path)
    trials_there = by_name(found)
    on_disk = out.candidates()
    assert list(trials_there) == [each.name for each in on_disk]
    assert {each.number: each.params for each in trials_there.values()} == {
        each.number: each.params for each in on_disk
    }
    assert found.metric_names == list(out.study.suite_config.objectives)
    scores = out.all_scores("search")
    for name, trial in trials_there.items():
        assert trial.values == [scores[name][key].value for key in found.metric_names or ()]
        assert trial.system_attrs["constraints"] == [trial.user_attrs["guard.calm"]]
        assert trial.user_attrs["words.stderr"] == scores[name]["words"].stderr
    ranges = trials_there["trial-0001"].distributions
    assert {(each.low, each.high) for each in ranges.values()} == {(0.0, 2.0)}  # type: ignore[attr-defined]
    assert found.user_attrs["recommended"] in trials_there

    others = by_name(mirrored(server, tmp_path / "second" / "run"))
    assert "trial-0001" in others
    assert "trial-0002" not in others


def test_a_server_that_is_killed_stops_nothing_and_catches_up(
    server: Postgres, tiny_base: Path, tiny_experts: dict[str, Path], tmp_path: Path
) -> None:
    study = write_study(
        tmp_path, tiny_base, tiny_experts, storage=server.url(), budget={"trials": 20, "patience": 99}
    )
    out = tmp_path / "run"
    command = [sys.executable, "-m", "mergetune.cli", "run", str(study), "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 120
    while not (out / "candidates" / "trial-0003.json").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    server.kill()
    try:
        printed, _ = process.communicate(timeout=300)
    finally:
        process.kill()
        server.start()
    assert process.returncode == 0, printed
    assert printed.count("warning: `storage`") == 1
    assert PASSWORD not in printed
    assert "trial-0020" not in by_name(mirrored(server, out))

    printed = run(study, out)
    assert "warning: `storage`" not in printed
    assert list(by_name(mirrored(server, out))) == [each.name for each in RunDir(out).candidates()]


def test_a_server_that_is_away_at_the_start_holds_up_a_new_study_alone(
    server: Postgres, tiny_base: Path, tiny_experts: dict[str, Path], tmp_path: Path
) -> None:
    study = write_study(tmp_path, tiny_base, tiny_experts, storage=server.url(), budget={"trials": 1})
    out = tmp_path / "run"
    server.kill()
    try:
        with pytest.raises(MergetuneError, match=r"`storage` cannot be reached: .*refused.* Mend that"):
            run(study, out)
        assert not RunDir(out).candidates()
        server.start()
        run(study, out)
        server.kill()
        write_study(tmp_path, tiny_base, tiny_experts, storage=server.url(), budget={"trials": 2})
        assert "warning: `storage`: " in run(study, out)
        assert RunDir(out).candidate("trial-0002") is not None
    finally:
        server.kill()
        server.start()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("postgres://me@host/study", "knows, but got `postgres://…`. Did you mean `postgresql`"),
        ("study.db", "must be a URL such as postgresql://user@host/database, but got `study.db`"),
        ("postgresql://me:pa55@host:port/x", "but got `postgresql://me@host:port/x`"),
        ("postgresql+pg8000://me:pa55@host/x", "driver `pg8000`.*Install it: pip install"),
        ("postgresql://me:${NO_SUCH}@host/x", "environment variable `NO_SUCH`, which is not set"),
        ("", "`storage`: must be a URL as text"),
        ({"url": "postgresql://me:pa55@host/x"}, "`storage`: must be a URL as text"),
    ],
)
def test_a_storage_that_cannot_be_right_is_refused_before_anything_else(
    url: object, message: str, tiny_base: Path, tiny_experts: dict[str, Path], tmp_path: Path
) -> None:
    study = write_study(tmp_path, tiny_base, tiny_experts, storage=url)
    with pytest.raises(MergetuneError, match=message) as caught:
        run(study, tmp_path / "run")
    assert "pa55" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_wrong_password_ends_with_exit_code_3(
    server: Postgres, tiny_base: Path, tiny_experts: dict[str, Path], tmp_path: Path
) -> None:
    study = write_study(tmp_path, tiny_base, tiny_experts, storage=server.url("wr0ng!"))
    command = [sys.executable, "-m", "mergetune.cli", "run", str(study), "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert "error: `storage` cannot be reached: " in done.stderr
    assert "wr0ng" not in done.stderr + done.stdout
    assert not [path for path in (tmp_path / "run").rglob("*") if b"wr0ng" in read(path)]


def read(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""


def show_all(server: Postgres, out: RunDir) -> list[str]:
    """Show a database all that a run directory holds; returns what was said."""
    said: list[str] = []
    watchers = Watchers([Database(server.url(), out)], said.append)
    watchers.connect(out.candidates())
    for each in out.candidates():
        watchers.measured(seen(out, each))
    watchers.close()
    return said


def seen(out: RunDir, candidate: Candidate) -> Seen:
    scores = out.scores(candidate.name, "search")
    return Seen(candidate) if scores is None else Seen(candidate, scores, {"general": -0.5})


def test_dropped_and_failed_trials_have_their_reasons(server: Postgres, tmp_path: Path) -> None:
    out = write_run(tmp_path / "run", Plan(n_trials=7))
    dropped = out.candidate("trial-0003")
    assert dropped is not None
    out.write_candidate(dropped.model_copy(update={"state": "dropped", "reason": "off the front"}), None)
    assert show_all(server, out) == []
    found = by_name(mirrored(server, out.path))
    assert found["trial-0003"].state == TrialState.PRUNED
    assert found["trial-0003"].user_attrs["reason"] == "off the front"
    assert found["trial-0006"].state == TrialState.FAIL
    assert "is nan" in found["trial-0006"].user_attrs["reason"]
    assert found["base"].state == TrialState.COMPLETE


def test_what_the_run_directory_no_longer_holds_is_written_anew(server: Postgres, tmp_path: Path) -> None:
    out = write_run(tmp_path / "run", Plan(n_trials=3, failed=()))
    show_all(server, out)
    last = out.candidate("trial-0003")
    assert last is not None
    other = last.recipe.model_copy(update={"seed": 1})
    out.write_candidate(last.model_copy(update={"recipe": other}), None)
    show_all(server, out)
    again = by_name(mirrored(server, out.path))
    assert list(again) == [each.name for each in out.candidates()]
    assert again["trial-0003"].user_attrs["recipe"] == other.digest


def test_a_trial_costs_the_same_however_many_there_are(server: Postgres, tmp_path: Path) -> None:
    out = write_run(tmp_path / "run", Plan(n_trials=1, failed=()))
    one = out.candidate("trial-0001")
    assert one is not None
    database, seconds = Database(server.url(), out), []
    database.connect([key_of(one)])
    like = seen(out, one)
    for number in range(400):
        began = time.perf_counter()
        name = f"trial-{number:04d}"
        database.show(Seen(one.model_copy(update={"name": name}), like.scores, like.excess))
        seconds.append(time.perf_counter() - began)
    assert statistics.median(seconds[-100:]) < 1.5 * statistics.median(seconds[:100])
