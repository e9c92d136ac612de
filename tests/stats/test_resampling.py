"""Resampling, against scipy's bootstrap, plain loops, Optuna's hypervolume, and simulation."""

from __future__ import annotations

import tracemalloc
from typing import Literal

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from optuna._hypervolume import compute_hypervolume
from scipy import stats

from helpers import dominates
from mergetune.evaluation.evaluate import ITEM_KEYS, Score
from mergetune.stats import paired as statistics
from mergetune.stats import pareto, resampling
from mergetune.stats.resampling import Floats

TASKS = np.repeat(["easy", "hard"], [8, 12])


# --- joining


def measurement(rows: dict[tuple[str, str, str], float]) -> pd.DataFrame:
    frame = pd.DataFrame([*rows], columns=ITEM_KEYS)
    return frame.assign(score=[*rows.values()])


def joined_by_hand(frames: dict[str, pd.DataFrame]) -> dict[str, dict[tuple[str, str], list[float]]]:
    """By score and (task, item): the scores of all candidates, of the items that all have."""
    tables = [
        {(str(score), str(task), str(item)): float(value) for score, task, item, value in frame.to_numpy()}
        for frame in frames.values()
    ]
    found: dict[str, dict[tuple[str, str], list[float]]] = {}
    for score, task, item in tables[0]:
        if all((score, task, item) in table for table in tables):
            found.setdefault(score, {})[task, item] = [table[score, task, item] for table in tables]
    return found


@given(st.data())
@settings(max_examples=100)
def test_scores_are_joined_by_their_keys_in_whatever_order_they_stand(data: st.DataObject) -> None:
    keys = [(score, task, item) for score in "xy" for task in "st" for item in "abc"]
    subsets = st.lists(st.sampled_from(keys), min_size=1, unique=True)
    orders = st.one_of(st.just(keys), st.permutations(keys), subsets)
    numbers = iter(range(100))  # each score is another, so that one at a wrong place is seen
    frames = {
        name: measurement({key: float(next(numbers)) for key in data.draw(orders)})
        for name in ("m", "n", "o")
    }
    found, expected = resampling.join_items(frames), joined_by_hand(frames)
    assert list(found) == list(expected)
    for score, by_item in expected.items():
        assert found[score].names == ("m", "n", "o")
        assert found[score].scores.tolist() == [*by_item.values()]
        assert list(found[score].tasks) == [task for task, _ in by_item]


def test_an_item_that_is_there_twice_is_an_error() -> None:
    twice = pd.concat([measurement({("x", "t", "a"): 1.0}), measurement({("x", "t", "a"): 0.0})])
    once = measurement({("x", "t", "a"): 1.0, ("x", "t", "b"): 0.0})
    for frames in ({"m": twice}, {"m": once, "n": twice}):
        with pytest.raises(ValueError, match=r"has an item twice: \('x', 't', 'a'\)"):
            resampling.join_items(frames)


def test_of_many_measurements_the_scores_alone_are_kept() -> None:
    items = [f"item-{i:020d}" for i in range(5000)]
    join = resampling.ItemJoin()
    tracemalloc.start()
    for number in range(100):
        frame = pd.DataFrame({"score_name": "x", "task": "t", "item": items, "score": float(number)})
        join.add(f"m{number}", frame)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10e6  # the scores take 4 MB, all tables would take 50 MB


# --- the bootstrap


def test_every_candidate_gets_the_same_items() -> None:
    scores = np.random.default_rng(4).random((30, 3))
    alone = resampling.bootstrap_scores(scores[:, :1], seed=5)
    together = resampling.bootstrap_scores(np.c_[scores, scores[:, 0] + 0.25], seed=5)
    assert together[:, 0] == pytest.approx(alone[:, 0])
    assert together[:, 3] - together[:, 0] == pytest.approx(0.25)
    assert not np.allclose(resampling.bootstrap_scores(scores[:, :1], seed=6), alone)


def test_a_shared_generator_makes_objectives_independent() -> None:
    scores, rng = np.random.default_rng(7).random((30, 1)), np.random.default_rng(8)
    first, second = (resampling.bootstrap_scores(scores, seed=rng)[:, 0] for _ in range(2))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.05


def test_the_resamples_have_the_standard_error_of_the_formula() -> None:
    scores = np.random.default_rng(9).random(20)
    ours = resampling.bootstrap_scores(scores[:, None], TASKS, n_resamples=40_000)[:, 0]
    formula = statistics.paired_difference(scores, np.zeros(20), TASKS)
    assert ours.mean() == pytest.approx(formula.estimate, abs=4 * formula.stderr / 200)
    assert ours.std() == pytest.approx(formula.stderr, rel=0.015)


def test_intervals_agree_with_scipys_bootstrap() -> None:
    rng = np.random.default_rng(10)
    first, second = rng.exponential(1, 150), rng.normal(0, 1, 250)
    strata, both = np.repeat([0, 1], [150, 250]), np.r_[first, second]

    def mean_of_means(a: Floats, b: Floats, axis: int = -1) -> Floats:
        return np.asarray((a.mean(axis=axis) + b.mean(axis=axis)) / 2)

    def theirs(method: Literal["BCa", "percentile"]) -> list[float]:
        found = stats.bootstrap((first, second), mean_of_means, n_resamples=20_000, method=method, rng=rng)
        return [float(found.confidence_interval.low), float(found.confidence_interval.high)]

    bca = statistics.bca_interval(both, strata, n_resamples=20_000)
    resampled = resampling.bootstrap_scores(both[:, None], strata, n_resamples=20_000)
    percentile = resampling.percentile_interval(resampled[:, 0])
    tolerance = 0.06 * statistics.paired_difference(both, np.zeros(400), strata).stderr
    assert [bca.lower, bca.upper] == pytest.approx(theirs("BCa"), abs=tolerance)
    assert [percentile.lower, percentile.upper] == pytest.approx(theirs("percentile"), abs=tolerance)


@pytest.mark.parametrize("level", [0.9, 0.95])
@pytest.mark.parametrize("n_items", [2, 26, 4000])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_share_on_which_all_items_agree_has_an_exact_interval(
    value: float, n_items: int, level: float
) -> None:
    score, resampled = Score(value, 0.0, n_items), np.full(100, value)
    found = resampling.score_interval(score, resampled, level)
    exact = stats.binomtest(round(value * n_items), n_items).proportion_ci(level, "exact")
    assert (found.lower, found.upper) == pytest.approx((exact.low, exact.high))
    cost = resampling.score_interval(score, resampled, level, is_share=False)
    assert (cost.lower, cost.upper) == (value, value)
    some = resampling.score_interval(Score(0.5, 0.1, 26), np.linspace(0, 1, 101), level)
    assert some.lower == pytest.approx((1 - level) / 2)


def test_memory_stays_bounded_with_many_items() -> None:
    scores = np.ones((2000, 20))
    tracemalloc.start()
    resampling.bootstrap_scores(scores)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6  # all counts at once would take 80 MB, all chosen scores 1.6 GB


# --- fronts


def resampled_points(n_objectives: int) -> st.SearchStrategy[Floats]:
    grid = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])  # a grid makes equal values common
    return arrays(np.float64, st.tuples(st.just(6), st.integers(1, 6), st.just(n_objectives)), elements=grid)


@given(st.integers(1, 3).flatmap(resampled_points))
@settings(max_examples=60)
def test_pareto_probability_counts_the_fronts(resampled: Floats) -> None:
    counts = np.zeros(resampled.shape[1])
    for points in resampled:
        counts[pareto.front(points)] += 1
    assert resampling.pareto_probability(resampled) == pytest.approx(counts / len(resampled))


@given(st.data())
@settings(max_examples=60)
def test_who_breaks_a_guard_is_not_on_the_front_and_keeps_no_one_off_it(data: st.DataObject) -> None:
    resampled = data.draw(st.integers(1, 5).flatmap(resampled_points))
    feasible = data.draw(arrays(np.bool_, resampled.shape[:2]))
    counts = np.zeros(resampled.shape[1])
    for points, kept in zip(resampled, feasible, strict=True):
        for i in range(len(points)):
            dominated = any(dominates(points[j], points[i]) for j in np.flatnonzero(kept))
            counts[i] += kept[i] and not dominated
    assert resampling.pareto_probability(resampled, feasible) == pytest.approx(counts / len(resampled))


@given(st.integers(1, 5).flatmap(resampled_points))
@settings(max_examples=60)
def test_hypervolumes_agree_with_optuna(resampled: Floats) -> None:
    reference = np.full(resampled.shape[2], 0.2)  # some points are not above it
    ours = resampling.hypervolume_interval(resampled[0], resampled, list(reference), level=0.5)
    theirs = [compute_hypervolume(-np.maximum(points, reference), -reference) for points in resampled]
    assert ours.observed == pytest.approx(theirs[0])
    assert ours.corrected == pytest.approx(2 * theirs[0] - np.mean(theirs))


def test_the_hypervolume_interval_covers_the_truth_where_percentiles_do_not() -> None:
    rng = np.random.default_rng(13)
    angles = np.linspace(0, np.pi / 2, 30)
    truth = 0.5 + 0.1 * np.c_[np.cos(angles), np.sin(angles)] + rng.normal(0, 0.02, (30, 2))
    reference = [0.3, 0.3]
    true_volume = pareto.hypervolume(truth, reference)
    volumes, covered, covered_by_percentiles = [], [], []
    for _ in range(300):
        shared = rng.normal(size=(2, 150, 1))  # how hard each item is
        latent = np.sqrt(0.7) * shared + np.sqrt(0.3) * rng.normal(size=(2, 150, 30))
        scores = (latent < stats.norm.ppf(truth.T)[:, None]).astype(np.float64)
        resampled = np.stack(
            [resampling.bootstrap_scores(own, n_resamples=300, seed=rng) for own in scores], axis=2
        )
        ours = resampling.hypervolume_interval(scores.mean(axis=1).T, resampled, reference)
        volumes.append([ours.observed, ours.corrected])
        covered.append(ours.interval.lower <= true_volume <= ours.interval.upper)
        percentile = [2 * ours.observed - ours.interval.upper, 2 * ours.observed - ours.interval.lower]
        covered_by_percentiles.append(percentile[0] <= true_volume <= percentile[1])
    observed, corrected = np.mean(volumes, axis=0) - true_volume
    assert abs(corrected) < observed / 2
    assert np.mean(covered) == pytest.approx(0.95, abs=0.03)
    assert np.mean(covered_by_percentiles) < 0.85
