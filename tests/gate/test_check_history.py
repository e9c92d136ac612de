"""How a deployment suite moved over releases."""

from __future__ import annotations

from pathlib import Path

import pytest
from scipy.stats import binomtest

from checks import N_ITEMS, write_check
from mergetune.errors import MergetuneError
from mergetune.gate.history import read_history, write_history


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
