"""Scores that a judge gave no verdict for: every figure against the same by hand, on a frame with gaps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from mergetune.errors import MergetuneError
from mergetune.evaluation.evaluate import Measurement
from mergetune.evaluation.suite import ObjectiveConfig, SuiteConfig, TaskConfig
from mergetune.gate.judge import Check, judge
from mergetune.report import gather
from mergetune.report.metric import Metric
from mergetune.report.verdict import difference
from mergetune.results.run import Run
from mergetune.results.selection import choose
from mergetune.stats import resampling
from mergetune.stats.gains import GainScale
from mergetune.stats.paired import paired_stderrs
from mergetune.stats.resampling import Floats, bootstrap_scores, join_items, percentile_interval
from report_pages import unpacked
from synthetic_run import Plan, write_run

TASKS = {"t": 40, "u": 25}
SUITE = SuiteConfig(
    description="any",
    chat_template=True,
    objectives={"tone": ObjectiveConfig(tasks=(TaskConfig(lm_eval="any"),), margin=0.1)},
)
NAMES = ("base", "expert-a", "m")


def measured(seed: int, gaps: tuple[int, ...] = (), is_binary: bool = False) -> pd.DataFrame:
    """Measure a model that is like all others on most items; `gaps` are rows without a verdict."""
    common, own = np.random.default_rng(0), np.random.default_rng(seed)
    rows = [(task, f"{task}{i}") for task, count in TASKS.items() for i in range(count)]
    scores = np.clip(common.normal(0.5, 0.3, len(rows)) + own.normal(0, 0.1, len(rows)), 0, 1)
    scores = (scores > 0.5).astype(np.float64) if is_binary else scores
    scores[list(gaps)] = math.nan
    found = pd.DataFrame(rows, columns=["task", "item"]).assign(score_name="tone", score=scores)
    unjudged = found["score"].isna().astype(int)
    return found.assign(response="r", aggregation="mean", parts=None, unjudged=unjudged)


FRAMES = {"base": measured(1, (2, 50)), "expert-a": measured(2, (7,)), "m": measured(3, (7, 9, 64))}


def by_task(values: pd.Series[float] | Floats, tasks: pd.Series[str]) -> list[list[float]]:
    """Return the values of each task that there are."""
    return [
        [v for v, own in zip(values, tasks, strict=True) if own == task and v == v] for task in sorted(TASKS)
    ]


def mean_by_hand(values: pd.Series[float] | Floats, tasks: pd.Series[str]) -> tuple[float, float]:
    """Return the mean over tasks of the means of the values that there are, and its standard error."""
    groups = by_task(values, tasks)
    error = sum(np.var(own, ddof=1) / len(own) for own in groups) ** 0.5 / len(groups)
    return float(np.mean([np.mean(own) for own in groups])), float(error)


@pytest.mark.parametrize("name", NAMES)
def test_means_and_intervals_are_those_of_the_items_with_a_verdict(name: str) -> None:
    frame = FRAMES[name]
    mean, error = mean_by_hand(frame["score"], frame["task"])
    found = Measurement(frame, 0.0).scores()["tone"]
    assert (found.value, found.stderr) == pytest.approx((mean, error))
    assert found.n_items == frame["score"].notna().sum()
    items = join_items(FRAMES)["tone"]
    assert items.is_mean
    column = items.names.index(name)
    assert resampling.score_means(items.scores, items.tasks)[column] == pytest.approx(mean)
    resampled = bootstrap_scores(items.scores, items.tasks, n_resamples=20_000)[:, column]
    interval, z = percentile_interval(resampled), stats.norm.ppf(0.975)
    assert [interval.lower, interval.upper] == pytest.approx([mean - z * error, mean + z * error], abs=0.003)


def test_candidates_covary_by_the_items_that_both_have() -> None:
    items = join_items(FRAMES)["tone"]
    found = resampling.score_covariance(items.scores, items.tasks)
    for i, first in enumerate(NAMES):
        for j, second in enumerate(NAMES):
            expected = 0.0
            for task, count in TASKS.items():
                rows = FRAMES["base"]["task"] == task
                a, b = (FRAMES[name].loc[rows, "score"].to_numpy() for name in (first, second))
                both = (a - np.nanmean(a)) * (b - np.nanmean(b))
                n_a, n_b = np.isfinite(a).sum(), np.isfinite(b).sum()
                expected += np.nansum(both) / (n_a * n_b) * count / (count - 1) / len(TASKS) ** 2
            assert found[i, j] == pytest.approx(expected)


def test_differences_are_those_of_the_pairs_that_both_have() -> None:
    tasks, base = FRAMES["m"]["task"], FRAMES["base"]["score"]
    mean, error = mean_by_hand(FRAMES["m"]["score"] - base, tasks)
    found = difference(FRAMES["m"], FRAMES["base"], Metric("tone", "objective", 1, True), {})
    assert (found.value, found.stderr, found.n_items) == pytest.approx((mean, error, 65 - 5))
    items = join_items(FRAMES)["tone"]
    errors = paired_stderrs(items.scores, items.scores[:, 0], items.tasks)
    assert errors[0] == 0
    for column, name in enumerate(NAMES[1:], start=1):
        assert errors[column] == pytest.approx(mean_by_hand(FRAMES[name]["score"] - base, tasks)[1], rel=2e-3)


def checked(frames: Mapping[str, pd.DataFrame], **options: object) -> Check:
    items = frames["base"][["score_name", "task", "item"]].assign(split="search", prompt="Why?", target="So.")
    labels = ("m", "base")
    return judge(
        frames["m"],
        frames["base"],
        items,
        SUITE,
        suite_name="s",
        labels=labels,
        **options,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("is_binary", [False, True])
def test_the_gate_judges_the_pairs_that_both_have(is_binary: bool) -> None:
    frames = {
        "base": measured(1, (2, 50), is_binary),
        "m": measured(3, (7, 9, 64), is_binary),
        "repeat": measured(4, (2, 30), is_binary),
    }
    gaps = {2, 50, 7, 9, 64}
    whole = {name: frame.drop(index=list(gaps)) for name, frame in frames.items()}
    found, expected = checked(frames), checked(whole)
    assert found.rows == expected.rows, "as if the items without a verdict had never been asked"
    assert found.flips == expected.flips
    row = found.rows[0]
    mean, _ = mean_by_hand(frames["m"]["score"] - frames["base"]["score"], frames["m"]["task"])
    assert row.difference == pytest.approx(mean)
    assert row.method == ("tango" if is_binary else "bootstrap")
    assert row.n_items == 65 - len(gaps)
    assert [text.split(", such as")[0] for text in found.warnings] == [
        "`t`: the judge gave no verdict on 3 replies (80 items were scored)",
        "`u`: the judge gave no verdict on 2 replies (50 items were scored)",
    ]
    noise = checked(frames, repeat=frames["repeat"]).noise
    gaps = {2, 30, 50}
    again = checked(
        {name: frames[name].drop(index=list(gaps)) for name in ("m", "base")},
        repeat=frames["repeat"].drop(index=list(gaps)),
    ).noise
    assert noise == again


def test_a_task_without_a_pair_is_an_error_and_not_left_out() -> None:
    frames = {"base": measured(1, tuple(range(40, 52))), "m": measured(3, tuple(range(52, 65)))}
    with pytest.raises(MergetuneError, match="a verdict for both models, but `u` has none"):
        checked(frames)


def test_few_items_that_differ_are_counted_among_the_pairs_that_both_have() -> None:
    base = measured(1, (2,), is_binary=True)
    frames = {"base": base, "expert-a": base.assign(score=base["score"].where(base.index != 5)), "m": base}
    scale = GainScale.of(join_items(frames)["tone"], "base", ["expert-a"])
    assert scale.spread == 1.0
    assert scale.stderrs["m"] == scale.stderrs["expert-a"] == pytest.approx(1 / 65), "none of them differs"


def test_a_task_without_any_value_is_refused() -> None:
    scores = np.array([[math.nan, 1.0], [math.nan, 0.0], [1.0, 1.0]])
    with pytest.raises(ValueError, match="finite"):
        bootstrap_scores(scores, ["a", "a", "b"])


def with_gaps(path: Path) -> None:
    """Take a verdict on one item of each measurement away, another one of each candidate.

    Of another score of the held-out items all lack the same.
    """
    for number, file in enumerate(sorted(path.glob("candidates/*.parquet"))):
        frame = pd.read_parquet(file)
        own = np.flatnonzero(frame["score_name"] == "tool_calls")
        frame.loc[own[number % len(own)], "score"] = math.nan
        if file.stem.endswith("holdout"):
            frame.loc[frame["score_name"].eq("persona").idxmax(), "score"] = math.nan
        frame.to_parquet(file)
    noise = pd.read_parquet(path / "noise.parquet")
    noise.loc[5, "score"] = math.nan
    noise.to_parquet(path / "noise.parquet")


def test_a_run_with_gaps_is_smoothed_chosen_from_and_reported(tmp_path: Path) -> None:
    plan = Plan(n_trials=24, noise=0.1)
    whole, gappy = (write_run(tmp_path / name, plan) for name in ("whole", "gappy"))
    with_gaps(gappy.path)
    first, second = choose(whole), choose(gappy)
    assert first is not None
    assert second is not None
    assert second.smoothing.smoothers.keys() == first.smoothing.smoothers.keys() >= {"tool_calls"}
    for name, scores in second.smoothing.scores.items():
        own = gappy.measurement(name, "search")
        assert own is not None
        values = own.loc[own["score_name"] == "tool_calls", "score"]
        assert second.measured[name]["tool_calls"].value == pytest.approx(np.nanmean(values))
        assert scores["tool_calls"].n_items == 59
        assert scores["tool_calls"].value == pytest.approx(
            first.smoothing.scores[name]["tool_calls"].value, abs=0.03
        )
        assert 0 <= scores["tool_calls"].value <= 1
        assert scores["persona"] == first.smoothing.scores[name]["persona"]
    data = gather(gappy)
    assert data.noise is not None
    assert data.noise.n_items == 3 * 60 - len({5, _gap(gappy.path)})
    assert all(math.isfinite(c.difference.value) for c in data.verdict.comparisons)
    assert data.confirmation.mean is not None
    assert math.isfinite(data.confirmation.mean.interval.lower)
    assert None in unpacked(data.items.packs["scores.search"])["base"]  # no verdict is no score
    estimate = Run(gappy.path).scores("base")["tool_calls"]
    assert math.isfinite(estimate.interval.lower)
    assert estimate.n_items == 59


def _gap(path: Path) -> int:
    frame = pd.read_parquet(path / "candidates" / "base.search.parquet")
    return int(np.flatnonzero(frame["score"].isna())[0])
