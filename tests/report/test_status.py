"""Where a study stands, read from its run directory while it is written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock
from typer.testing import CliRunner

from mergetune.cli import app
from mergetune.errors import MergetuneError
from mergetune.report import gather
from mergetune.report.status import read_status
from mergetune.results.run_dir import RunDir
from synthetic_run import Plan, write_run


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return write_run(tmp_path / "run", Plan(n_trials=12, failed=(6,)))


def test_what_is_measured_is_counted(run: RunDir) -> None:
    found, data = read_status(run), gather(run)
    n_failed = len(data.failed)
    assert (found.n_trials, found.n_failed, found.n_dropped) == (12, n_failed, 0)
    assert n_failed == 1
    assert found.n_measured == len(data.entries)
    assert found.hypervolume == pytest.approx(data.hypervolume[-1])
    assert found.best in {each.name for each in data.entries}
    assert found.left_s is not None


def test_a_run_that_a_process_holds_is_at_work(run: RunDir) -> None:
    assert not read_status(run).is_at_work
    run.begin_attempt("search.trial-0013")
    run.begin_attempt("search.trial-0014", host="gpu-2")
    run.begin_attempt("holdout.base")
    with FileLock(run.path / "lock"):
        found = read_status(run)
    assert found.is_at_work
    assert found.under_way == {"trial-0013": "", "trial-0014": "gpu-2"}
    assert dict(found.rows())["under way"] == "trial-0013, trial-0014 on gpu-2"
    assert dict(read_status(run).rows())["broken off"] == "trial-0013, trial-0014 on gpu-2"


def test_an_ended_search_says_why(run: RunDir) -> None:
    run.write_json("search.json", {"ended": "all trials were done"})
    rows = dict(read_status(run).rows())
    assert rows["state"].endswith("the search ended when all trials were done")
    assert "left" not in rows["time"]


def test_before_the_base_is_measured_there_is_little_to_say(run: RunDir) -> None:
    for file in (run.path / "candidates").glob("*"):
        file.unlink()
    found = read_status(run)
    assert (found.n_measured, found.front, found.hypervolume, found.best, found.left_s) == (
        0,
        (),
        None,
        "",
        None,
    )
    assert [name for name, _ in found.rows()] == ["state", "trials", "measured", "time"]


def test_many_on_the_front_are_not_all_named(run: RunDir) -> None:
    found = replace(read_status(run), front=tuple(f"trial-{i:04}" for i in range(20)))
    assert dict(found.rows())["front"].startswith("20: trial-0000, ")
    assert dict(found.rows())["front"].endswith(", trial-0005, …")


def test_the_command_prints_a_table_or_json_and_watches_until_nothing_is_at_work(run: RunDir) -> None:
    for options in ([], ["--watch"]):
        shown = CliRunner().invoke(app, ["status", str(run.path), *options])
        assert shown.exit_code == 0
        assert "12 of " in shown.output
    data = json.loads(CliRunner().invoke(app, ["status", str(run.path), "--json"]).output)
    assert data["n_trials"] == 12
    with pytest.raises(MergetuneError, match="is no run directory"):
        read_status(RunDir(run.path / "report"))
