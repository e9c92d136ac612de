"""A run directory as others read it."""

from __future__ import annotations

from pathlib import Path

import pytest
from scipy.stats import binomtest

from mergetune.evaluation.evaluate import Measurement
from mergetune.results.run import Run
from synthetic_run import Plan, write_run


def test_a_skill_without_a_mistake_has_an_interval_all_the_same(tmp_path: Path) -> None:
    run = write_run(tmp_path, Plan(n_trials=1, n_items=26, holdout=False))
    frame = run.measurement("expert-tools", "search")
    assert frame is not None
    run.write_measurement("expert-tools", "search", Measurement(frame.assign(score=1.0), 1.0))
    found = Run(tmp_path).scores("expert-tools", level=0.9)["tool_calls"].interval
    assert found.lower == pytest.approx(binomtest(26, 26).proportion_ci(0.9).low)
    assert found.upper == 1
