"""Early verdicts: error rates under repeated looks by simulation, bounds against closed forms."""

from __future__ import annotations

from dataclasses import astuple
from functools import cache
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.integrate import quad
from scipy.special import betainc, betaln
from scipy.stats import norm

from mergetune.errors import MergetuneError
from mergetune.stats.sequential import (
    Array,
    Levels,
    Look,
    LookVerdict,
    item_order,
    look,
    split_alpha,
    whole_verdict,
)

ALPHA = 0.05
EARLY_ONLY = split_alpha(ALPHA, early_share=1)
MARGIN = 0.05
BATCH = 25

differences = arrays(
    np.float64,
    st.tuples(st.integers(1, 2), st.integers(1, 40)),
    elements=st.sampled_from([-1.0, -0.5, 0.0, 0.25, 1.0]),
)


def drawn(mean: float, discordance: float, n_runs: int, n_items: int, seed: int) -> Array:
    """Draw differences of binary scores, (n_runs, n_items)."""
    chances = [(discordance - mean) / 2, 1 - discordance, (discordance + mean) / 2]
    return np.random.default_rng(seed).choice([-1.0, 0.0, 1.0], size=(n_runs, n_items), p=chances)


@cache
def judged(losses: int, wins: int, n_items: int, levels: Levels) -> Look:
    """Judge by the counts, which is all that matters; runs share most of theirs."""
    seen = np.zeros(n_items)
    seen[:losses], seen[losses : losses + wins] = -1, 1
    return look(seen, MARGIN, levels)


def gate(seen: Array, levels: Levels = EARLY_ONLY) -> Look:
    """Look after every batch until a verdict is reached or the items are used up."""
    for n in range(BATCH, len(seen) + 1, BATCH):
        losses, wins = int((seen[:n] == -1).sum()), int((seen[:n] == 1).sum())
        last = judged(losses, wins, n, levels)
        if last.verdict != "undecided":
            break
    return last


def rate(verdicts: list[LookVerdict], wanted: LookVerdict) -> float:
    return verdicts.count(wanted) / len(verdicts)


def bound(n_runs: int) -> float:
    """Return what a rate of ALPHA stays below in all but one of 700 simulations."""
    return ALPHA + 3 * float(np.sqrt(ALPHA * (1 - ALPHA) / n_runs))


def tango_z(seen: Array, margin: float) -> float:
    """Score statistic of a paired difference of proportions against −margin (Tango 1998)."""
    n, wins, losses = len(seen), (seen == 1).sum(), (seen == -1).sum()
    b = -wins - losses - (2 * n - wins + losses) * margin
    c = losses * margin * (1 + margin)
    q = (np.sqrt(b * b - 8 * n * c) - b) / (4 * n)
    return float((wins - losses + n * margin) / np.sqrt(n * (2 * q - margin * (1 + margin))))


@pytest.mark.parametrize("discordance", [MARGIN, 0.1, 0.2])
def test_looking_after_every_batch_keeps_both_error_rates_at_the_margin(discordance: float) -> None:
    runs = drawn(-MARGIN, discordance, 700, 300, seed=1)
    verdicts = [gate(run).verdict for run in runs]
    assert rate(verdicts, "pass") <= bound(len(runs))
    assert rate(verdicts, "fail") <= bound(len(runs))


@pytest.mark.parametrize("mean", [-0.02, 0.0, 0.02])
def test_candidates_above_the_margin_hardly_ever_fail(mean: float) -> None:
    verdicts = [gate(run).verdict for run in drawn(mean, 0.1, 300, 300, seed=2)]
    assert rate(verdicts, "fail") <= 0.01


@pytest.mark.parametrize("discordance", [0.1, 0.2])
def test_early_looks_and_the_test_at_the_end_err_at_most_alpha_together(discordance: float) -> None:
    levels = split_alpha(ALPHA)
    runs = drawn(-MARGIN, discordance, 1200, 200, seed=3)
    verdicts = [gate(run, levels).verdict for run in runs]
    for i, run in enumerate(runs):
        if verdicts[i] == "undecided":
            z = tango_z(run, MARGIN)
            verdicts[i] = "pass" if norm.sf(z) < levels.final_pass else verdicts[i]
            verdicts[i] = "fail" if norm.cdf(z) < levels.final_fail else verdicts[i]
    assert 0.01 < rate(verdicts, "pass") <= bound(len(runs))
    assert 0.01 < rate(verdicts, "fail") <= bound(len(runs))


def test_many_scores_at_the_margin_fail_a_good_gate_no_more_often_than_one() -> None:
    levels = split_alpha(ALPHA, n_scores=6, early_share=1)
    scores = drawn(-MARGIN, 0.1, 6 * 300, 400, seed=4).reshape(300, 6, 400)
    verdicts = [whole_verdict(gate(score, levels).verdict for score in run) for run in scores]
    assert rate(verdicts, "fail") <= bound(len(scores))


def test_one_bad_score_among_good_ones_passes_no_more_often_than_alone() -> None:
    bad, good = drawn(-MARGIN, 0.1, 700, 300, seed=5), drawn(0.2, 0.2, 700, 300, seed=6)
    verdicts = [whole_verdict(gate(score).verdict for score in pair) for pair in zip(bad, good, strict=True)]
    assert rate(verdicts, "pass") <= bound(len(bad))
    assert rate(verdicts, "fail") <= bound(len(bad))


def test_tasks_that_move_apart_keep_the_error_rates_of_their_mean() -> None:
    better, worse = drawn(0.1, 0.1, 700, 150, seed=7), drawn(-0.1 - 2 * MARGIN, 0.2, 700, 150, seed=8)
    rounds = np.stack([better, worse], axis=2).reshape(len(better), -1)  # one item of each task in turn
    verdicts = [gate(run).verdict for run in rounds]
    assert rate(verdicts, "pass") <= bound(len(rounds))
    assert rate(verdicts, "fail") <= bound(len(rounds))


def test_the_interval_holds_the_true_mean_at_all_looks_at_once() -> None:
    values, chances = [-1.0, -0.25, 0.0, 0.5, 0.75], [0.05, 0.2, 0.5, 0.2, 0.05]
    truth = float(np.dot(values, chances))
    runs = np.random.default_rng(9).choice(values, size=(200, 150), p=chances)
    looks = [[look(run[:n], MARGIN, EARLY_ONLY) for n in range(BATCH, 151, BATCH)] for run in runs]
    missed = [any(not one.lower <= truth <= one.upper for one in run) for run in looks]
    assert np.mean(missed) <= 2 * ALPHA  # ALPHA on either side


@pytest.mark.parametrize(
    ("mean", "discordance", "verdict", "n_items"),
    [
        (0.0, 0.0, "pass", 150),  # measured 125 of 500
        (0.0, 0.05, "pass", 310),  # 268
        (0.02, 0.1, "pass", 280),  # 238
        (-0.3, 0.4, "fail", 80),  # 64
        (-0.2, 0.25, "fail", 120),  # 98
    ],
)
def test_clear_cases_are_decided_on_a_part_of_500_items(
    mean: float, discordance: float, verdict: LookVerdict, n_items: int
) -> None:
    looks = [gate(run, split_alpha(ALPHA)) for run in drawn(mean, discordance, 200, 500, seed=10)]
    assert rate([one.verdict for one in looks], verdict) > 0.85
    assert np.mean([one.n_items for one in looks]) <= n_items


def test_thirty_items_decide_only_a_disaster() -> None:
    levels = split_alpha(ALPHA)
    assert look(np.zeros(30), MARGIN, levels).verdict == "undecided"
    assert look(-np.repeat([1.0, 0.0], 15), MARGIN, levels).verdict == "fail"


@given(differences)
@settings(max_examples=60)
def test_the_interval_holds_the_estimate_and_decides_the_verdict(seen: Array) -> None:
    one = look(seen, MARGIN, EARLY_ONLY)
    assert -1 <= one.lower <= one.estimate <= one.upper <= 1
    assert one.estimate == pytest.approx(seen.mean())
    assert one.n_items == seen.size
    assert (one.verdict == "pass") is (one.lower > -MARGIN)
    assert (one.verdict == "fail") is (one.upper < -MARGIN)


@given(differences, st.randoms(use_true_random=False))
@settings(max_examples=40)
def test_order_does_not_matter_and_swapping_the_models_mirrors_the_interval(
    seen: Array, random: Random
) -> None:
    one = look(seen, MARGIN, EARLY_ONLY)
    shuffled = list(seen.flat)
    random.shuffle(shuffled)
    assert look(np.array(shuffled), MARGIN, EARLY_ONLY) == one
    mirrored = look(-seen, MARGIN, EARLY_ONLY)
    assert (mirrored.lower, mirrored.upper) == pytest.approx((-one.upper, -one.lower))


@given(differences)
@settings(max_examples=40)
def test_a_better_item_never_lowers_a_bound_and_a_stricter_level_never_narrows_them(seen: Array) -> None:
    better = seen.copy()
    better.flat[0] = 1.0
    one, raised = look(seen, MARGIN, EARLY_ONLY), look(better, MARGIN, EARLY_ONLY)
    assert raised.lower >= one.lower
    assert raised.upper >= one.upper
    strict = look(seen, MARGIN, split_alpha(ALPHA, n_scores=3))
    assert strict.lower <= one.lower
    assert strict.upper >= one.upper


@pytest.mark.parametrize(("losses", "wins"), [(0, 20), (12, 30), (40, 60), (30, 1)])
def test_the_bound_of_differences_of_one_is_the_closed_form_of_a_coin(losses: int, wins: int) -> None:
    # With x = (d + 1)/2 ∈ {0, 1} and null p, even stakes are an even prior on a coin's chance over (p, 1):
    # W = ∫ₚ¹ qʷ(1 − q)ˡ dq / ((1 − p) pʷ(1 − p)ˡ), an incomplete beta function.
    lower = look(np.repeat([-1.0, 1.0], [losses, wins]), MARGIN, EARLY_ONLY).lower
    p = (1 + lower) / 2
    log_integral = betaln(wins + 1, losses + 1) + np.log(betainc(losses + 1, wins + 1, 1 - p))
    log_wealth = log_integral - wins * np.log(p) - (losses + 1) * np.log(1 - p)
    assert log_wealth == pytest.approx(-np.log(ALPHA), abs=0.01)


@pytest.mark.parametrize("seed", range(4))
def test_the_bounds_are_where_the_wealth_by_numerical_integration_is_one_over_alpha(seed: int) -> None:
    values = [-1.0, -0.3, 0.0, 0.0, 0.0, 0.4, 1.0]
    seen = np.random.default_rng(seed).choice(values, size=60)
    one = look(seen, MARGIN, EARLY_ONLY)
    for sign, mean in ((1, one.lower), (-1, -one.upper)):
        gains = (sign * seen - mean) / (1 + mean)

        def wealth(stake: float, gains: Array = gains) -> float:
            return float(np.prod(1 + stake * gains))

        assert quad(wealth, 0, 1)[0] == pytest.approx(1 / ALPHA, rel=0.01)


def test_levels_add_up_to_alpha_over_both_stages_and_all_scores() -> None:
    levels = split_alpha(0.05, n_scores=4, early_share=0.4)
    assert astuple(levels) == pytest.approx((0.02, 0.005, 0.03, 0.0075))


@pytest.mark.parametrize(
    ("verdicts", "whole"),
    [
        (["pass", "pass"], "pass"),
        (["pass", "undecided"], "undecided"),
        (["undecided", "fail", "pass"], "fail"),
        ([], "undecided"),
    ],
)
def test_a_gate_passes_with_its_last_score_and_fails_with_its_first(
    verdicts: list[LookVerdict], whole: LookVerdict
) -> None:
    assert whole_verdict(verdicts) == whole


@given(
    st.lists(st.integers(0, 99).map(str), unique=True, max_size=20),
    st.lists(st.integers(100, 199).map(str), unique=True, max_size=20),
)
@settings(max_examples=40)
def test_the_order_is_a_shuffle_that_new_items_do_not_disturb(old: list[str], new: list[str]) -> None:
    order = [old[i] for i in item_order("task", old)]
    assert sorted(order) == sorted(old)
    everything = [*new, *old]
    longer = [everything[i] for i in item_order("task", everything)]
    assert [item for item in longer if item in set(old)] == order


def test_the_order_depends_on_seed_and_task_and_nothing_else() -> None:
    ids = [f"item {i}" for i in range(8)]
    assert item_order("arithmetic", ids) == [0, 7, 6, 4, 3, 2, 5, 1]
    assert item_order("arithmetic", ids, seed=1) != item_order("arithmetic", ids)
    assert item_order("spelling", ids) != item_order("arithmetic", ids)


@pytest.mark.parametrize(
    ("seen", "margin", "message"),
    [
        (np.array([0.0, 12.5]), 0.05, "got 0.0 to 12.5"),
        (np.array([0.0, np.nan]), 0.05, "got nan"),
        (np.empty((2, 0)), 0.05, "got no differences"),
        (np.zeros(3), 1.0, "margin=1.0"),
        (np.zeros(3), -0.1, "margin=-0.1"),
    ],
)
def test_what_cannot_be_judged_early_is_refused_with_the_value(
    seen: Array, margin: float, message: str
) -> None:
    with pytest.raises(MergetuneError, match=message):
        look(seen, margin, EARLY_ONLY)


def test_levels_out_of_range_are_refused() -> None:
    with pytest.raises(MergetuneError, match="alpha=5"):
        split_alpha(5)
