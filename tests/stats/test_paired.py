"""Paired statistics, against scipy, statsmodels, published examples, enumeration and simulation."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import optimize, stats
from statsmodels.stats.contingency_tables import mcnemar

from mergetune.evaluation.evaluate import Measurement
from mergetune.stats import paired as statistics
from mergetune.stats import resampling
from mergetune.stats.resampling import Floats, Interval

scores_of_20 = arrays(np.float64, 20, elements=st.floats(0, 1, width=16))
binaries_of_20 = arrays(np.float64, 20, elements=st.sampled_from([0.0, 1.0]))
TASKS = np.repeat(["easy", "hard"], [8, 12])


def binary(wins: int, losses: int, n_items: int) -> tuple[Floats, Floats]:
    """Scores of a candidate and a baseline that differ on so many items."""
    candidate, baseline = np.ones(n_items), np.ones(n_items)
    baseline[:wins] = 0
    candidate[wins : wins + losses] = 0
    return candidate, baseline


def graded(rng: np.random.Generator, n_items: int) -> tuple[Floats, Floats]:
    """Graded scores of two equal models that agree on about half of the items."""
    baseline = rng.beta(0.6, 0.6, n_items)
    return np.clip(baseline + rng.normal(0, 0.2, n_items) * (rng.random(n_items) < 0.5), 0, 1), baseline


def coverage(draw: Callable[[], Interval], truth: float, n_runs: int) -> float:
    intervals = [draw() for _ in range(n_runs)]
    return sum(i.lower <= truth <= i.upper for i in intervals) / n_runs


# --- the paired standard error


def test_without_strata_it_is_the_paired_t_test() -> None:
    candidate, baseline = graded(np.random.default_rng(0), 40)
    ours, theirs = statistics.paired_difference(candidate, baseline), stats.ttest_rel(candidate, baseline)
    expected = theirs.confidence_interval(0.9)
    assert (ours.interval(0.9).lower, ours.interval(0.9).upper) == pytest.approx(
        (expected.low, expected.high)
    )
    assert ours.p_value == pytest.approx(theirs.pvalue)


def test_with_two_strata_it_is_welchs_t_test() -> None:
    rng = np.random.default_rng(1)
    first, second = rng.normal(0.1, 1, 12), rng.normal(0.3, 3, 30)
    ours = statistics.paired_difference(
        np.r_[first, second], np.zeros(42), ["a"] * 12 + ["b"] * 30
    )  # mean of the strata's differences: half of first − (−second)
    theirs = stats.ttest_ind(first, -second, equal_var=False)
    assert ours.dof == pytest.approx(theirs.df)
    assert 2 * ours.interval().upper == pytest.approx(theirs.confidence_interval().high)


def test_strata_agree_with_the_score_of_a_measurement() -> None:
    scores = np.random.default_rng(3).random(20)
    items = pd.DataFrame({"score_name": "all", "task": TASKS, "item": range(20), "score": scores})
    theirs = Measurement(items, 0.0).scores()["all"]
    ours = statistics.paired_difference(scores, np.zeros(20), items["task"].to_numpy())
    assert (ours.estimate, ours.stderr) == pytest.approx((theirs.value, theirs.stderr))


@given(scores_of_20, scores_of_20, st.permutations(range(20)))
@settings(max_examples=50)
def test_swapping_flips_the_sign_and_order_changes_nothing(
    candidate: Floats, baseline: Floats, order: list[int]
) -> None:
    ours = statistics.paired_difference(candidate, baseline, TASKS)
    swapped = statistics.paired_difference(baseline, candidate, TASKS)
    moved = statistics.paired_difference(candidate[order], baseline[order], TASKS[order])
    assert swapped.estimate == pytest.approx(-ours.estimate)
    assert swapped.stderr == pytest.approx(ours.stderr)
    assert (moved.estimate, moved.stderr) == pytest.approx((ours.estimate, ours.stderr))


def test_a_task_of_one_item_leaves_the_error_unknown() -> None:
    ours = statistics.paired_difference(np.ones(3), np.array([0.0, 1.0, 0.5]), ["a", "a", "b"])
    assert ours.stderr == math.inf
    assert ours.interval().lower == -math.inf
    assert ours.p_value == 1


def test_equal_differences_are_no_evidence() -> None:
    assert statistics.paired_difference(np.full(9, 0.4), np.full(9, 0.3)).p_value == 1


def test_the_errors_of_many_differences_are_those_of_each() -> None:
    rng = np.random.default_rng(0)
    scores, baseline, strata = rng.random((30, 4)), rng.random(30), rng.integers(3, size=30)
    for tasks in (None, strata):
        found = statistics.paired_stderrs(scores, baseline, tasks)
        each = [statistics.paired_difference(column, baseline, tasks).stderr for column in scores.T]
        assert found == pytest.approx(each)
    assert np.isinf(statistics.paired_stderrs(scores[:3], baseline[:3], ["a", "a", "b"])).all()


@pytest.mark.parametrize("n_items", [20, 100])
def test_a_difference_of_exactly_the_margin_neither_passes_nor_fails(n_items: int) -> None:
    for right in range(n_items + 1):
        for lost in range(min(right, n_items // 10) + 1):
            baseline, candidate = (np.arange(n_items) < count for count in (right, right - lost))
            found = statistics.non_inferiority(
                candidate.astype(float), baseline.astype(float), margin=lost / n_items
            )
            assert found.verdict == "inconclusive"


def test_wrong_input_is_refused() -> None:
    with pytest.raises(ValueError, match="the same items"):
        statistics.paired_difference(np.ones(3), np.ones(4))
    with pytest.raises(ValueError, match="finite"):
        statistics.paired_difference(np.array([np.nan]), np.ones(1))
    with pytest.raises(ValueError, match=r"\(n_items, n_candidates\)"):
        resampling.bootstrap_scores(np.ones(3))
    with pytest.raises(ValueError, match=r"must hold, but got 0.02 and 0.95"):
        statistics.non_inferiority(np.ones(3), np.ones(3), 0.02, alpha=0.95)
    with pytest.raises(ValueError, match="must label 3 items"):
        statistics.paired_difference(np.ones(3), np.ones(3), ["a", "b"])


# --- paired binary scores


@pytest.mark.parametrize(
    ("wins", "losses", "p_value"),
    [
        (1, 7, 0.0391),  # Fagerland et al. 2013, airway hyper-responsiveness (Bentur et al. 2009)
        (6, 16, 0.034690),  # Fagerland et al. 2017, complete response (Cavo et al. 2012); R contingencytables
    ],
)
def test_mcnemar_midp_gives_the_published_values(wins: int, losses: int, p_value: float) -> None:
    assert statistics.mcnemar_midp(*binary(wins, losses, 161)) == pytest.approx(p_value, abs=5e-5)


def test_mcnemar_midp_is_the_exact_p_less_the_observed_probability() -> None:
    for wins, losses in [(0, 3), (2, 9), (5, 6)]:
        exact = mcnemar([[0, wins], [losses, 0]], exact=True).pvalue
        expected = exact - stats.binom.pmf(wins, wins + losses, 0.5)
        assert statistics.mcnemar_midp(*binary(wins, losses, 20)) == pytest.approx(expected)
    assert statistics.mcnemar_midp(*binary(3, 3, 20)) == pytest.approx(1 - stats.binom.pmf(3, 6, 0.5) / 2)
    assert statistics.mcnemar_midp(*binary(0, 0, 20)) == 1
    with pytest.raises(ValueError, match="scores of 0 and 1"):
        statistics.mcnemar_midp(np.array([0.5]), np.array([1.0]))


@pytest.mark.parametrize(
    ("wins", "losses", "n_items", "level", "limits"),
    [
        (9, 3, 32, 0.95, (-0.027, 0.390)),  # Tango 1998, sleeping difficulties
        (0, 1, 44, 0.90, (-0.096, 0.037)),  # Tango 1998, contact lenses: a zero cell
        (16, 8, 86, 0.95, (-0.020, 0.207)),  # Agresti & Min 2005
        (1, 7, 21, 0.95, (-0.517, -0.026)),  # Fagerland et al. 2014, airway hyper-responsiveness
        (6, 16, 161, 0.95, (-0.1240, -0.0054)),  # Fagerland et al. 2017, complete response
        (28, 25, 618, 0.90, (-0.0148, 0.0247)),  # R PropCIs::scoreci.mp(25, 28, 618)
    ],
)
def test_tangos_interval_gives_the_published_limits(
    wins: int, losses: int, n_items: int, level: float, limits: tuple[float, float]
) -> None:
    ours = statistics.tango_interval(wins, losses, n_items, level)
    digits = max(len(str(limit).partition(".")[2]) for limit in limits)
    assert (round(ours.lower, digits), round(ours.upper, digits)) == limits


@given(st.integers(0, 12), st.integers(0, 12), st.integers(0, 20), st.sampled_from([0.8, 0.95]))
@settings(max_examples=40)
def test_tangos_limits_are_where_the_score_test_rejects(b: int, c: int, same: int, level: float) -> None:
    n = b + c + same + 1
    ours, z = statistics.tango_interval(b, c, n, level), stats.norm.isf((1 - level) / 2)

    def score(delta: float) -> float:  # with the constrained maximum of the likelihood found numerically
        def loglik(loss: float) -> float:
            return -float(
                stats.multinomial.logpmf([b, c, n - b - c], n, [loss + delta, loss, 1 - 2 * loss - delta])
            )

        least, most = max(0.0, -delta), (1 - delta) / 2
        found = optimize.minimize_scalar(
            loglik, bounds=(least, most), options={"xatol": 1e-12}, method="bounded"
        )
        variance = (2 * float(found.x) + delta * (1 - delta)) / n
        return float(((b - c) / n - delta) / math.sqrt(variance))

    assert score(ours.lower) == pytest.approx(z, rel=1e-3)
    assert score(ours.upper) == pytest.approx(-z, rel=1e-3)


def test_tangos_interval_is_finite_and_not_empty_without_discordant_items() -> None:
    for n in (1, 10, 1000):
        ours, z = statistics.tango_interval(0, 0, n), stats.norm.isf(0.025)
        assert ours.upper == pytest.approx(z**2 / (n + z**2))  # solved by hand
        assert ours.lower == -ours.upper
    assert statistics.tango_interval(0, 5, 5).lower == -1
    assert statistics.tango_interval([0, 0], [0, 0], [50, 50]).upper == pytest.approx(
        statistics.tango_interval(0, 0, 100).upper
    )
    with pytest.raises(ValueError, match="must hold"):
        statistics.tango_interval(3, 3, 5)


def test_strata_of_many_items_have_the_stratified_normal_interval() -> None:
    wins, losses, sizes = np.array([400, 90]), np.array([300, 60]), np.array([8000, 2000])
    ours = statistics.tango_interval(wins, losses, sizes)
    rates = (wins - losses) / sizes
    stderr = np.sqrt((((wins + losses) / sizes - rates**2) / sizes).sum()) / 2
    assert ours.lower == pytest.approx(rates.mean() - 1.96 * stderr, abs=2e-4)
    assert ours.upper == pytest.approx(rates.mean() + 1.96 * stderr, abs=2e-4)


# --- non-inferiority


@pytest.mark.parametrize(
    ("wins", "losses", "n_items", "verdict"),
    [(60, 50, 2000, "pass"), (50, 200, 2000, "fail"), (5, 6, 60, "inconclusive"), (0, 0, 30, "inconclusive")],
)
def test_the_three_verdicts(wins: int, losses: int, n_items: int, verdict: str) -> None:
    ours = statistics.non_inferiority(*binary(wins, losses, n_items), 0.03)
    assert ours.verdict == verdict
    assert ours.method == "tango"
    assert (ours.items_to_decide is None) == (verdict != "inconclusive")


def test_few_equal_items_are_never_certainty() -> None:
    for n_items in (1, 5, 30, 100):
        for same in (np.ones(n_items), np.zeros(n_items), np.full(n_items, 0.5)):
            ours = statistics.non_inferiority(same, same, 0.02, score_range=1.0)
            assert ours.verdict == "inconclusive"
            assert -ours.interval.lower >= min(0.99, 1 - 0.05 ** (1 / n_items))  # Clopper & Pearson
    many = np.full(500, 0.5)
    assert statistics.non_inferiority(many, many, 0.02, score_range=1.0).verdict == "pass"
    assert statistics.non_inferiority(many, many, 0.02).interval.lower == -math.inf  # range unknown


def test_equal_losses_on_few_items_are_no_certainty_either() -> None:
    ours = statistics.non_inferiority(np.full(6, 0.5), np.full(6, 0.6), 0.05, score_range=1.0)
    assert ours.verdict == "inconclusive"


def test_a_single_item_decides_nothing() -> None:
    for candidate, baseline in [(0.0, 1.0), (1.0, 0.0), (0.2, 0.9)]:
        ours = statistics.non_inferiority(np.array([candidate]), np.array([baseline]), 0.02)
        assert ours.verdict == "inconclusive"


def test_as_many_items_as_asked_for_decide() -> None:
    for wins, losses, n_items in [(5, 6, 60), (0, 0, 30), (2, 8, 80), (0, 1, 20)]:
        candidate, baseline = binary(wins, losses, n_items)
        needed = statistics.non_inferiority(candidate, baseline, 0.03).items_to_decide
        assert needed is not None
        times = math.ceil(needed / n_items)
        more = statistics.non_inferiority(np.tile(candidate, times), np.tile(baseline, times), 0.03)
        assert more.verdict == ("pass" if (wins - losses) / n_items > -0.03 else "fail")


def test_no_number_of_items_decides_a_difference_at_the_margin() -> None:
    assert statistics.non_inferiority(*binary(4, 8, 200), 0.02).items_to_decide is None


@given(binaries_of_20, binaries_of_20, st.permutations(range(20)))
@settings(max_examples=30)
def test_the_order_of_the_items_and_the_sign_of_binaries_do_not_matter(
    candidate: Floats, baseline: Floats, order: list[int]
) -> None:
    ours = statistics.non_inferiority(candidate, baseline, 0.1, TASKS)
    moved = statistics.non_inferiority(candidate[order], baseline[order], 0.1, TASKS[order])
    swapped = statistics.non_inferiority(-baseline, -candidate, 0.1, TASKS)
    assert (moved.interval, moved.verdict) == (ours.interval, ours.verdict)
    assert swapped.interval == ours.interval  # wrong answers to be minimized


@given(scores_of_20, scores_of_20, st.floats(0, 0.5), st.floats(0, 0.5))
@settings(max_examples=30)
def test_a_wider_margin_never_turns_a_pass_into_less(a: Floats, b: Floats, small: float, more: float) -> None:
    tight = statistics.non_inferiority(a, b, small, TASKS)
    wide = statistics.non_inferiority(a, b, small + more, TASKS)
    ranks = ["fail", "inconclusive", "pass"]
    assert ranks.index(wide.verdict) >= ranks.index(tight.verdict)


def test_a_noise_floor_widens_the_interval_and_the_plan() -> None:
    rng = np.random.default_rng(11)
    first = (rng.random(400) < 0.7).astype(np.float64)
    second = np.where(rng.random(400) < 0.03, 1 - first, first)  # a second run flips 3 % of the items
    noise = statistics.noise_variance(first, second)
    difference = statistics.paired_difference(first, second)
    assert noise == max(difference.estimate**2, difference.stderr**2) > 0
    assert statistics.noise_variance(first, first) == 0

    candidate, baseline = binary(20, 22, 400)
    plain = statistics.non_inferiority(candidate, baseline, 0.03)
    noisy = statistics.non_inferiority(candidate, baseline, 0.03, noise=noise)
    assert noisy.interval.lower < plain.interval.lower < plain.interval.upper < noisy.interval.upper
    assert noisy.minimum_detectable_effect > plain.minimum_detectable_effect
    assert plain.items_to_decide is not None
    assert noisy.items_to_decide is None or noisy.items_to_decide > plain.items_to_decide


def test_widening_adds_variances() -> None:
    normal = Interval(1 - 1.959964 * 3, 1 + 1.959964 * 3, 0.95)
    wide = statistics.widen(normal, 1.0, 4.0**2)
    assert (wide.lower, wide.upper) == pytest.approx((1 - 1.959964 * 5, 1 + 1.959964 * 5))


# --- families and sample sizes


def test_holm_steps_down() -> None:
    # By hand: 4 · 0.005, 3 · 0.01, 2 · 0.03, and 0.04 may not fall below the one before it.
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.6, 0.7]).tolist() == [1, 1]
    assert len(statistics.holm([])) == 0


def test_sample_sizes_for_a_tenth_of_discordant_items() -> None:
    sizes = [statistics.sample_size(margin, variance=0.1) for margin in (0.02, 0.03, 0.05)]
    assert sizes == [1546, 687, 248]  # 1545.6, 687.0 and 247.3, rounded up
    for margin, n_items in zip((0.02, 0.03, 0.05), sizes, strict=True):
        assert statistics.minimum_detectable_effect(n_items, 0.1) == pytest.approx(margin, rel=2e-3)


def test_the_sample_size_has_the_power_it_promises() -> None:
    n_items = statistics.sample_size(0.02, variance=0.1, power=0.8)
    counts = np.random.default_rng(12).multinomial(n_items, [0.05, 0.05, 0.9], 1500)
    lower = [statistics.tango_interval(wins, losses, n_items, 0.9).lower for wins, losses, _ in counts]
    assert np.mean(np.array(lower) > -0.02) == pytest.approx(0.8, abs=0.03)


# --- coverage: 95 % intervals hold the truth in 93 to 97 % of runs


def in_range(share: float) -> bool:
    return 0.93 <= share <= 0.97


@pytest.mark.parametrize("n_items", [20, 100])
def test_the_t_interval_covers(n_items: int) -> None:
    rng = np.random.default_rng(14)
    share = coverage(lambda: statistics.paired_difference(*graded(rng, n_items)).interval(), 0.0, 3000)
    assert in_range(share)


def test_the_stratified_t_interval_covers_with_many_small_tasks() -> None:
    rng, tasks = np.random.default_rng(15), np.arange(57 * 6) // 6
    share = coverage(
        lambda: statistics.paired_difference(rng.normal(tasks, 1), np.zeros(342), tasks).interval(),
        28.0,
        2000,
    )
    assert in_range(share)


def test_the_percentile_and_the_bca_interval_cover() -> None:
    rng = np.random.default_rng(17)

    def percentile() -> Interval:
        resampled = resampling.bootstrap_scores(
            np.stack(graded(rng, 200), axis=1), n_resamples=1000, seed=rng
        )
        return resampling.percentile_interval(resampled[:, 0] - resampled[:, 1])

    def bca() -> Interval:  # skewed: a twelfth of the items are lost, by a lot or a little
        losses = np.where(rng.random(200) < 1 / 12, rng.random(200), 0.0)
        return statistics.bca_interval(-losses, n_resamples=1000, seed=rng)

    assert in_range(coverage(percentile, 0.0, 1000))
    assert in_range(coverage(bca, -1 / 24, 1000))


def tables_of(n_items: int, alpha: float) -> tuple[list[tuple[int, int]], Floats]:
    """Wins and losses that n items can show, and their intervals by `non_inferiority`, (n_tables, 2)."""
    tables = [(b, c) for b in range(n_items + 1) for c in range(n_items + 1 - b)]
    intervals = [
        statistics.non_inferiority(*binary(b, c, n_items), 0.1, alpha=alpha).interval for b, c in tables
    ]
    return tables, np.array([[own.lower, own.upper] for own in intervals])


def chances_of(tables: list[tuple[int, int]], n_items: int, win: float, loss: float) -> Floats:
    counts = [(b, c, n_items - b - c) for b, c in tables]
    return np.asarray(stats.multinomial.pmf(counts, n_items, [win, loss, 1 - win - loss]))


SKEWED = [(win, win + more) for more in (0.02, 0.05, 0.1, 0.15) for win in (0.0, 0.01, 0.05, 0.1, 0.2)]


@pytest.mark.parametrize("n_items", [10, 20, 50])
def test_tangos_interval_covers(n_items: int) -> None:
    """By enumeration, without simulation error, few items and skewed probabilities included."""
    tables, limits = tables_of(n_items, alpha=0.025)
    for win, loss in SKEWED:
        chances, truth = chances_of(tables, n_items, win, loss), win - loss
        share = float(chances[(limits[:, 0] <= truth) & (truth <= limits[:, 1])].sum())
        assert share > 0.93
        assert share < 0.97 or n_items * (win + loss) <= 5  # with hardly an item that differs it covers more


@pytest.mark.parametrize("n_items", [20, 50])
def test_the_gate_for_binaries_errs_as_promised(n_items: int) -> None:
    tables, limits = tables_of(n_items, alpha=0.05)
    passes, fails = [], []
    for win, loss in SKEWED:
        chances, margin = chances_of(tables, n_items, win, loss), loss - win
        passes.append(chances[limits[:, 0] > -margin].sum())
        fails.append(chances[limits[:, 1] < -margin].sum())
    assert np.mean(passes) < 0.05
    assert max(passes) < 0.06  # counts jump: at its worst a point above α
    assert np.mean(fails) < 0.055  # the score test errs more on the side of the losses: skewness
    assert max(fails) < 0.075


@pytest.mark.parametrize("case", ["graded", "lossy"])
def test_other_scores_at_the_margin_pass_no_oftener_than_promised(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics, "N_RESAMPLES", 800)  # for speed
    rng = np.random.default_rng(18)
    passes = 0
    for _ in range(600):
        if case == "graded":
            candidate, baseline = graded(rng, 60)
            ours = statistics.non_inferiority(candidate - 0.02, baseline, 0.02, seed=rng)
        else:  # a tenth of the items are lost, by a lot or a little
            losses = np.where(rng.random(100) < 0.1, rng.random(100), 0.0)
            ours = statistics.non_inferiority(
                0.9 - losses, np.full(100, 0.9), 0.05, score_range=1.0, seed=rng
            )
        assert ours.method == "bootstrap"
        passes += ours.verdict == "pass"
    assert passes / 600 < 0.05 + 0.023  # α and 2.6 simulation errors
