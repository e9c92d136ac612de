"""Several runs on one page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mergetune.errors import MergetuneError
from mergetune.report.compare import compare, write_comparison
from mergetune.results.run_dir import RunDir
from synthetic_run import Plan, write_run


@pytest.fixture
def runs(tmp_path: Path) -> list[RunDir]:
    return [
        write_run(tmp_path / name, Plan(n_trials=n, n_items=40)) for name, n in (("may", 3), ("june", 12))
    ]


def change_record(run: RunDir, **known: object) -> RunDir:
    record = json.loads((run.path / "record.json").read_text())
    (run.path / "record.json").write_text(json.dumps(record | known))
    return RunDir(run.path)


def test_runs_are_compared_item_by_item_on_what_all_share(runs: list[RunDir], tmp_path: Path) -> None:
    runs[1] = change_record(runs[1], seed=7)
    found = compare(runs)
    first, second = found.runs
    assert found.split == "holdout"
    assert found.n_items == 3 * 40
    assert (first.settings, second.settings) == ({"seed": "0"}, {"seed": "7"})
    for metric in found.metrics:
        own = [run.scores[metric.name].value for run in found.runs]
        assert second.changes[metric.name].value == pytest.approx(own[1] - own[0])
        assert first.changes[metric.name].value == 0
    page = write_comparison(runs, tmp_path / "page.html").read_text()
    assert "2 runs compared: may, june" in page
    assert all(run.recommended in page for run in found.runs)


def test_runs_by_different_rules_are_not_compared(runs: list[RunDir]) -> None:
    digests = {**runs[1].study.digests, "suite": "6" * 64}
    runs[1] = change_record(runs[1], digests=digests)
    with pytest.raises(MergetuneError, match="must be scored by the same rules"):
        compare(runs)


def test_a_run_that_recommends_nothing_is_refused(runs: list[RunDir]) -> None:
    (runs[1].path / "candidates" / "base.json").unlink()
    with pytest.raises(MergetuneError, match="recommends nothing yet"):
        compare(runs)
