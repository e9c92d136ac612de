"""Paired statistics by item: intervals, tests, non-inferiority and sample sizes.

The words of `mergetune.stats.resampling` hold here; `alpha` is one-sided, and differences are
candidate − baseline, in the unit of the score.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, stats

from mergetune.stats.resampling import (
    N_RESAMPLES,
    Floats,
    Indices,
    Interval,
    Labels,
    Seed,
    bootstrap_scores,
    checked,
    completed,
    influences,
    stratum_means,
    stratum_of,
)

Verdict = Literal["pass", "fail", "inconclusive"]


@dataclass(frozen=True)
class PairedDifference:
    """A mean difference on the same items, its standard error, and the degrees of freedom of that."""

    estimate: float
    stderr: float
    dof: float

    def interval(self, level: float = 0.95) -> Interval:
        """Return the t interval; it is infinite where the standard error is."""
        half_width = float(stats.t.isf((1 - level) / 2, self.dof)) * self.stderr
        return Interval(self.estimate - half_width, self.estimate + half_width, level)

    @property
    def p_value(self) -> float:
        """Two-sided p-value of the t test; 1 where the items show no spread to judge by."""
        if not 0 < self.stderr < math.inf:
            return 1.0
        return float(2 * stats.t.sf(abs(self.estimate) / self.stderr, self.dof))


@dataclass(frozen=True)
class NonInferiority:
    """Whether a candidate is worse than a baseline by less than `margin`, on `n_items`.

    Attributes:
        interval: of level 1 − 2α, so that each bound is a one-sided bound at 1 − α.
        verdict: "pass" where the lower bound is above −margin, "fail" where the upper bound is below it.
        method: "tango" for binary scores, else "bootstrap".
        items_to_decide: items of the same mix that would decide, with the power asked for, if the true
            difference is the estimate. None where it is decided, or where no number would do.
        minimum_detectable_effect: the smallest margin at which a candidate equal to the baseline passes,
            with the power asked for, on this many items.
    """

    estimate: float
    interval: Interval
    margin: float
    verdict: Verdict
    method: Literal["tango", "bootstrap"]
    n_items: int
    items_to_decide: int | None
    minimum_detectable_effect: float


def paired_difference(candidate: Floats, baseline: Floats, strata: Labels | None = None) -> PairedDifference:
    """Return the mean difference of scores, each (n_items,), with its paired standard error.

    SE² = Σ (dᵢ − d̄)² / (n · (n − 1)) (Miller 2024, arXiv 2411.00640, "paired"). Over strata, a mean has the
    mean's variance (Cochran 1977, ch. 5), and degrees of freedom after Satterthwaite (1946). The standard
    error is infinite where a stratum has a single item.

    Raises:
        ValueError: shapes differ, or a score is not finite.
    """
    difference = _differences(candidate, baseline)
    return _paired(difference, stratum_of(strata, len(difference)))


def paired_stderrs(scores: Floats, baseline: Floats, strata: Labels | None = None) -> Floats:
    """Return the standard errors of `paired_difference` for many models at once, (n_models,).

    Args:
        scores: (n_items, n_models), NaN where a model has no value; only pairs count that have both.
        baseline: scores of the same items, (n_items,), likewise.
        strata: the task of each item.

    Raises:
        ValueError: shapes differ, a score is infinite, or a stratum has no pair.
    """
    difference, stratum = scores - baseline[:, None], stratum_of(strata, len(baseline))
    return np.asarray(np.sqrt(_variances(completed(difference, stratum), stratum).sum(axis=0)))


def bca_interval(
    difference: Floats,
    strata: Labels | None = None,
    level: float = 0.95,
    *,
    n_resamples: int = N_RESAMPLES,
    seed: Seed = 0,
    resampled: Floats | None = None,
) -> Interval:
    """Return the BCa bootstrap interval of the mean of differences, (n_items,).

    Follows their skewness, such as that of a few large losses (Efron 1987; Efron & Tibshirani 1993,
    eqs. 14.9-14.15), with the resamples of `bootstrap_scores`; with `resampled`, (n_resamples,), the interval
    of what was resampled so and equals the mean of the differences on all items.

    Raises:
        ValueError: shapes differ, or a difference is not finite.
    """
    stratum = stratum_of(strata, len(difference))
    if resampled is None:
        resampled = bootstrap_scores(difference[:, None], stratum, n_resamples=n_resamples, seed=seed)[:, 0]
    mean, parts = _mean(difference, stratum), _influences(difference, stratum)
    below = ((resampled < mean).mean() + (resampled <= mean).mean()) / 2  # ties: half
    bias = stats.norm.ppf(np.clip(below, 1 / len(resampled), 1 - 1 / len(resampled)))
    parts = parts / (np.abs(parts).max() or 1.0)  # so that no cube overflows
    squares = (parts**2).sum()
    acceleration = (parts**3).sum() / (6 * squares**1.5) if squares > 0 else 0.0
    shifted = bias + stats.norm.ppf([(1 - level) / 2, (1 + level) / 2])
    lower, upper = np.quantile(resampled, stats.norm.cdf(bias + shifted / (1 - acceleration * shifted)))
    return Interval(float(lower), float(upper), level)


def mcnemar_midp(candidate: Floats, baseline: Floats) -> float:
    """Return the two-sided mid-p value of McNemar's test of binary scores, each (n_items,).

    Fagerland, Lydersen & Laake (2013, BMC Med. Res. Methodol. 13:91); 1 where no item differs.

    Raises:
        ValueError: shapes differ, or a score is neither 0 nor 1.
    """
    difference = _differences(candidate, baseline)
    if not _is_binary(candidate, baseline):
        raise ValueError("McNemar's test takes scores of 0 and 1; `paired_difference` has a test of others.")
    wins, losses = int((difference > 0).sum()), int((difference < 0).sum())
    if wins == losses:
        return 1.0 if wins == 0 else float(1 - stats.binom.pmf(wins, 2 * wins, 0.5) / 2)
    fewer, discordant = min(wins, losses), wins + losses
    return float(2 * stats.binom.cdf(fewer, discordant, 0.5) - stats.binom.pmf(fewer, discordant, 0.5))


def tango_interval(wins: ArrayLike, losses: ArrayLike, n_items: ArrayLike, level: float = 0.95) -> Interval:
    """Return Tango's score interval of the difference (wins − losses) / n_items of paired proportions.

    Valid where no item differs (Tango 1998, Stat. Med. 17:891). Counts of several strata, (n_strata,), give
    the interval of the mean of their differences: the scores and their variances under the null are summed
    over the strata as Miettinen & Nurminen (1985) do for independent groups.

    Args:
        wins: how many items only the candidate solved.
        losses: how many items only the baseline solved.
        n_items: how many items there are, solved or not.
        level: two-sided.

    Raises:
        ValueError: a count is negative, or more items differ than there are.
    """
    b, c, n = (np.atleast_1d(np.asarray(counts, dtype=np.float64)) for counts in (wins, losses, n_items))
    if min(b.min(), c.min(), n.min() - 1, (n - b - c).min()) < 0:
        raise ValueError(
            f"0 ≤ wins + losses ≤ n_items ≥ 1 must hold, but got {wins!r}, {losses!r}, {n_items!r}."
        )
    z = float(stats.norm.isf((1 - level) / 2))
    return Interval(_tango_lower(b, c, n, z), -_tango_lower(c, b, n, z), level)


def non_inferiority(
    candidate: Floats,
    baseline: Floats,
    margin: float,
    strata: Labels | None = None,
    *,
    alpha: float = 0.05,
    power: float = 0.8,
    noise: float = 0.0,
    score_range: float | None = None,
    resampled: Floats | None = None,
    seed: Seed = 0,
) -> NonInferiority:
    """Decide whether a candidate is worse than a baseline by less than a margin.

    Binary scores have Tango's interval. Others have, at each bound, the wider of the BCa bootstrap, which
    knows of skewness, and the t interval, which knows of small n.

    Equal scores on few items are no certainty: where fewer than 10 items of a stratum, and fewer than half,
    differ from its median one, no bound is nearer to the estimate than −ln α · score_range / n, what n
    items without a difference allow (rule of three; Hanley & Lippman-Hand 1983).

    Args:
        candidate: scores, (n_items,).
        baseline: scores of the same items, (n_items,).
        margin: ≥ 0.
        strata: the task of each item.
        alpha: the error of "pass", and that of "fail".
        power: what `items_to_decide` and `minimum_detectable_effect` are for.
        noise: a variance to add, from `noise_variance`.
        score_range: largest less smallest possible score; if not given, that of the scores at hand.
        resampled: differences of the scores in resamples of the items, (n_resamples,), where these are no
            means and `candidate` and `baseline` hold linear scores (see `aggregations`): their interval is
            the BCa bootstrap's alone.
        seed: of the bootstrap.

    Raises:
        ValueError: margin < 0, alpha ∉ (0, 0.5), shapes differ, or a score is not finite.
    """
    if margin < 0 or not 0 < alpha < 0.5:
        raise ValueError(f"margin ≥ 0 and 0 < alpha < 0.5 must hold, but got {margin} and {alpha}.")
    difference = _differences(candidate, baseline)
    stratum = stratum_of(strata, len(difference))
    mean, binary, n_items = _paired(difference, stratum), _is_binary(candidate, baseline), len(difference)
    if binary:
        score_range = 1.0
    elif score_range is None:  # scores that are all equal do not say how far one can be off
        score_range = float(np.ptp([candidate, baseline])) or math.inf
    method: Literal["tango", "bootstrap"] = "tango" if binary else "bootstrap"
    if method == "tango":
        interval = _by_tango(difference, stratum, 1 - 2 * alpha)
    else:
        interval = bca_interval(difference, stratum, 1 - 2 * alpha, seed=seed, resampled=resampled)
        if resampled is None:
            interval = _hull(interval, mean.interval(1 - 2 * alpha))
    unseen = _unseen_weight(difference, stratum) * score_range
    least = -math.log(alpha) * unseen
    near = min(least, score_range)
    floor = Interval(mean.estimate - near, mean.estimate + near, interval.level)
    interval = widen(_hull(interval, floor), mean.estimate, noise)
    verdict = _verdict(interval, margin)
    # Where few differ, planned as if one item at least had differed by the whole range.
    variance = n_items * max(mean.stderr, unseen) ** 2
    smallest = max(minimum_detectable_effect(n_items, variance + n_items * noise, alpha, power), least)
    items = None
    if verdict == "inconclusive":
        items = _items_to_decide(mean.estimate + margin, n_items, variance, least, noise, alpha, power)
    return NonInferiority(mean.estimate, interval, margin, verdict, method, n_items, items, smallest)


def noise_variance(first: Floats, second: Floats, strata: Labels | None = None) -> float:
    """Return the variance of a difference that two measurements of one model, (n_items,), show: A/A test.

    The larger of the squared mean difference, as of a shift of a whole run, and its squared standard error,
    as of items that flip by themselves. The paired standard error of two models holds the latter already:
    counted twice it errs on the safe side. It is a floor with one degree of freedom, no precise estimate;
    0 where the runs agree on every item.

    Raises:
        ValueError: shapes differ, or a score is not finite.
    """
    difference = paired_difference(first, second, strata)
    stderr = difference.stderr if math.isfinite(difference.stderr) else 0.0
    return max(difference.estimate**2, stderr**2)


def widen(interval: Interval, estimate: float, variance: float) -> Interval:
    """Add an independent variance, such as `noise_variance`, to the interval of an estimate.

    The squared distance of each bound to the estimate grows by z² · variance (MOVER: Zou & Donner 2008).
    """
    extra = float(stats.norm.isf((1 - interval.level) / 2)) * math.sqrt(variance)
    lower = estimate - math.hypot(estimate - interval.lower, extra)
    return Interval(lower, estimate + math.hypot(interval.upper - estimate, extra), interval.level)


def holm(p_values: ArrayLike) -> Floats:
    """Return the p-values of a family adjusted by Holm's step-down method (1979), in the order given."""
    from statsmodels.stats.multitest import multipletests

    raw = np.asarray(p_values, dtype=np.float64)
    return np.asarray(multipletests(raw, method="holm")[1] if raw.size else raw, dtype=np.float64)


def sample_size(margin: float, variance: float, alpha: float = 0.05, power: float = 0.8) -> int:
    """Return how many items show, with `power`, that a true difference of 0 is above −margin.

    n = (z₁₋α + z_power)² · variance / margin², rounded up. The variance is that of an item's difference: for
    binary scores the share of items that differ (Miller 2024, arXiv 2411.00640, power analysis).
    """
    from statsmodels.stats.power import normal_sample_size_one_tail

    n_items = float(normal_sample_size_one_tail(margin, power, alpha, std_null=math.sqrt(variance)))
    return math.ceil(n_items)


def minimum_detectable_effect(
    n_items: int, variance: float, alpha: float = 0.05, power: float = 0.8
) -> float:
    """Return the difference that `n_items` detect with `power`: `sample_size` solved for the margin."""
    z = float(stats.norm.isf(alpha) + stats.norm.ppf(power))
    return z * math.sqrt(variance / n_items)


def _paired(difference: Floats, stratum: Indices) -> PairedDifference:
    estimate, sizes = _mean(difference, stratum), np.bincount(stratum)
    if sizes.min() < 2:
        return PairedDifference(estimate, math.inf, 1.0)
    variances = _variances(difference[:, None], stratum)[:, 0]
    total = float(variances.sum())
    shares = variances / total if total > 0 else sizes / sizes.sum()
    return PairedDifference(estimate, math.sqrt(total), float(1 / (shares**2 / (sizes - 1)).sum()))


def _variances(difference: Floats, stratum: Indices) -> Floats:
    """Return what each stratum adds to the variance of mean differences of (n_items, n_models).

    (n_strata, n_models); infinite where a stratum has a single item.
    """
    sizes = np.bincount(stratum)[:, None]  # (n_strata, 1)
    means = stratum_means(influences(difference, stratum) ** 2, stratum)
    return np.where(sizes > 1, means * sizes**2 / np.maximum(sizes - 1, 1), np.inf)


def _mean(difference: Floats, stratum: Indices) -> float:
    return float(stratum_means(difference[:, None], stratum).mean())


def _influences(difference: Floats, stratum: Indices) -> Floats:
    return influences(difference[:, None], stratum)[:, 0]


def _by_tango(difference: Floats, stratum: Indices, level: float) -> Interval:
    wins = np.bincount(stratum, difference > 0)
    losses = np.bincount(stratum, difference < 0)
    return tango_interval(wins, losses, np.bincount(stratum), level)


def _hull(first: Interval, second: Interval) -> Interval:
    return Interval(min(first.lower, second.lower), max(first.upper, second.upper), first.level)


def _verdict(interval: Interval, margin: float) -> Verdict:
    if interval.lower > -margin:
        return "pass"
    return "fail" if interval.upper < -margin else "inconclusive"


def _unseen_weight(difference: Floats, stratum: Indices) -> float:
    """Weight of an item where few differ, largest over such strata: what an unseen kind of item can weigh."""
    weights, sizes = [0.0], np.bincount(stratum).tolist()
    for i, size in enumerate(sizes):
        own = difference[stratum == i]
        n_differ = (~np.isclose(own, np.median(own), rtol=1e-9, atol=1e-12)).sum()
        if n_differ < min(10, size / 2):
            weights.append(1 / (len(sizes) * size))
    return max(weights)


def _tango_lower(b: Floats, c: Floats, n: Floats, z: float) -> float:
    """Lower bound of the mean over strata of (b − c) / n: where the score statistic equals z."""
    estimate = float(((b - c) / n).mean())

    def excess(delta: float) -> float:
        # Probability of a loss under the null: the greater root of A q² + B q + C (Tango 1998).
        linear = -b - c + (2 * n - b + c) * delta
        root = np.sqrt(np.maximum(linear**2 + 8 * n * c * delta * (1 - delta), 0))
        loss = np.maximum((root - linear) / (4 * n), max(0.0, -delta))
        variance = float(((2 * loss + delta * (1 - delta)) / n).sum()) / len(n) ** 2
        return estimate - delta - z * math.sqrt(max(variance, 0.0))

    if estimate + 1 < 1e-9:
        return -1.0
    # The bracket ends below the estimate, which is a root too where no item differs.
    return float(optimize.brentq(excess, -1.0, estimate - 1e-9, xtol=1e-12))


def _items_to_decide(
    distance: float, n_items: int, variance: float, least: float, noise: float, alpha: float, power: float
) -> int | None:
    """Items, more than n_items, that tell a difference at this distance from −margin apart from it."""
    room = distance**2 - minimum_detectable_effect(1, noise, alpha, power) ** 2
    if room < 1e-12 or not math.isfinite(variance):
        return None
    by_spread = sample_size(math.sqrt(room), variance, alpha, power)
    return max(by_spread, math.ceil(n_items * least / math.sqrt(room)), n_items + 1)


def _differences(candidate: Floats, baseline: Floats) -> Floats:
    candidate, baseline = checked(candidate, 1), checked(baseline, 1)
    if candidate.shape != baseline.shape:
        raise ValueError(
            "candidate and baseline must be scores of the same items, "
            f"but got {len(candidate)} and {len(baseline)} of them."
        )
    return candidate - baseline


def _is_binary(candidate: Floats, baseline: Floats) -> bool:
    """Say whether all scores are 0 or 1, or, negated, 0 or −1."""
    values = np.unique([candidate, baseline])
    return bool(np.isin(values, (0, 1)).all() or np.isin(values, (-1, 0)).all())
