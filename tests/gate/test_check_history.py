"""How a deployment suite moved over releases."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest

from mergetune.errors import MergetuneError
from mergetune.evaluation.suite import ObjectiveConfig, SuiteConfig, TaskConfig
from mergetune.files.atomic_files import write_parquet
from mergetune.gate.history import read_history, write_history
from mergetune.gate.judge import judge
from mergetune.gate.outputs import write_outputs

SUITE = SuiteConfig(
    description="any",
    chat_template=True,
    objectives={"tone": ObjectiveConfig(tasks=(TaskConfig(lm_eval="any"),))},
)
N_ITEMS = 50


def measured(n_right: int, rules: str) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "score_name": "tone",
            "task": "t",
            "item": [str(i) for i in range(N_ITEMS)],
            "score": (np.arange(N_ITEMS) < n_right).astype(float),
            "response": "so",
            "rules": rules,
        }
    )


def write_check(folder: Path, n_right: int, rules: str = "now") -> None:
    """Write what `check --out` writes of a candidate, with the same baseline always."""
    candidate, baseline = measured(n_right, rules), measured(30, rules)
    items = candidate[["score_name", "task", "item"]].assign(prompt="?", target="!")
    labels = f"<b>{folder.name}</b>", "deployed"
    write_outputs(judge(candidate, baseline, items, SUITE, suite_name="deploy", labels=labels), folder)
    write_parquet(folder / "candidate.parquet", candidate)


def test_releases_come_in_the_order_of_their_names_with_changes_paired_by_item(tmp_path: Path) -> None:
    for name, n_right in (("v1.10", 45), ("v1.9", 40), ("v1.2", 10)):
        write_check(tmp_path / name, n_right)
    points = read_history(tmp_path).scores["tone"]
    assert [point.release for point in points] == ["v1.2", "v1.9", "v1.10"]
    assert [point.value for point in points] == [0.2, 0.8, 0.9]
    assert [point.change for point in points] == [None, pytest.approx(0.6), pytest.approx(0.1)]
    assert [point.verdict for point in points] == ["fail", "pass", "pass"]
    for point in points:
        assert point.interval.lower < point.value < point.interval.upper
    last = points[-1].change_interval
    assert last is not None
    assert last.lower < 0.1 < last.upper
    page = write_history(tmp_path).read_text()
    assert "<b>" not in page
    assert page.index("v1.9</th>") < page.index("v1.10</th>")


def test_a_release_without_a_mistake_has_an_interval_all_the_same(tmp_path: Path) -> None:
    write_check(tmp_path / "1", N_ITEMS)
    (point,) = read_history(tmp_path).scores["tone"]
    assert point.interval.lower == pytest.approx(binomtest(N_ITEMS, N_ITEMS).proportion_ci().low)
    assert point.interval.upper == 1


def test_releases_scored_by_other_rules_are_named_and_left_out(tmp_path: Path) -> None:
    write_check(tmp_path / "1", 40, rules="then")
    write_check(tmp_path / "2", 40)
    found = read_history(tmp_path)
    assert found.left_out == ("1",)
    assert [point.release for point in found.scores["tone"]] == ["2"]
    assert "left out: 1." in write_history(tmp_path).read_text()


def test_a_folder_without_checks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MergetuneError, match="one a release, but holds none"):
        read_history(tmp_path)
