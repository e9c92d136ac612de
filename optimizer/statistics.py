"""Paired statistics by item: intervals, tests, non-inferiority, sample sizes, and fronts with their noise.

The words of every function here:

- Scores of several models stand in the same order of items, and greater is better: negate what is to be
  minimized. A score is the mean over its tasks of the mean over their items.
- `strata`, (n_items,): the task of each item. `clusters`, (n_items,): what items share, such as a passage;
  a cluster lies within one stratum. Without them there is one stratum, and every item stands alone.
- `level` is two-sided, `alpha` one-sided. Differences are candidate − baseline, in the unit of the score.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats

from optimizer import pareto

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]
Labels = Sequence[Any] | NDArray[Any]
Seed = int | np.random.SeedSequence | np.random.Generator
Verdict = Literal["pass", "fail", "inconclusive"]
_N_RESAMPLES = 5000
_COUNTS_AT_ONCE = 2**21  # bounds the memory of a resampling to some 50 MB


@dataclass(frozen=True)
class Interval:
    """A confidence interval of two-sided `level`: each bound alone errs with (1 − level) / 2."""

    lower: float
    upper: float
    level: float


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
        method: "tango" for binary scores without clusters, else "bootstrap".
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


@dataclass(frozen=True)
class Hypervolume:
    """The hypervolume of the measured scores, the same less its optimism, and an interval of the true one."""

    observed: float
    corrected: float
    interval: Interval


@dataclass(frozen=True)
class _Design:
    """How the items were drawn: independent units (items, or clusters of items) within strata (tasks)."""

    item_stratum: Indices  # (n_items,)
    unit: Indices  # (n_items,) the unit of each item
    unit_stratum: Indices  # (n_units,)
    n_units: Indices  # (n_strata,) units of each stratum


def paired_difference(
    candidate: Floats, baseline: Floats, strata: Labels | None = None, clusters: Labels | None = None
) -> PairedDifference:
    """Return the mean difference of scores, each (n_items,), with its paired, clustered standard error.

    SE² = G / (G − 1) · Σ_c (Σ_{i∈c} (dᵢ − d̄))² / n² (Miller 2024, arXiv 2411.00640, "clustered" and
    "paired"), with the factor of G clusters, so that clusters of one item change nothing. Over strata, a
    mean has the mean's variance (Cochran 1977, ch. 5), and degrees of freedom after Satterthwaite (1946).
    The standard error is infinite where a stratum has a single item or cluster.

    Raises:
        ValueError: shapes differ, a score is not finite, or a cluster lies in two strata.
    """
    difference = _differences(candidate, baseline)
    return _paired(difference, _design(len(difference), strata, clusters))


def bootstrap_scores(
    scores: Floats,
    strata: Labels | None = None,
    clusters: Labels | None = None,
    *,
    n_resamples: int = _N_RESAMPLES,
    seed: Seed = 0,
) -> Floats:
    """Resample the items of `scores`, (n_items, n_candidates), the same ones for every candidate.

    A stratum of G units draws G − 1 of them with replacement: the variance is then unbiased however small
    the strata (McCarthy & Snowden 1985; Rao & Wu 1988). A stratum of one unit shows no spread. Objectives
    have items of their own: pass one `Generator` to the calls of all, else their resamples are the same.

    Returns:
        The scores of each resample, (n_resamples, n_candidates).

    Raises:
        ValueError: shapes differ, a score is not finite, or a cluster lies in two strata.
    """
    scores = _checked(scores, 2)
    return _resample(scores, _design(len(scores), strata, clusters), n_resamples, seed)


def percentile_interval(resampled: Floats, level: float = 0.95) -> Interval:
    """Return the percentile bootstrap interval of a resampled score or difference, (n_resamples,)."""
    lower, upper = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(lower), float(upper), level)


def bca_interval(
    candidate: Floats,
    baseline: Floats,
    strata: Labels | None = None,
    clusters: Labels | None = None,
    level: float = 0.95,
    *,
    n_resamples: int = _N_RESAMPLES,
    seed: Seed = 0,
) -> Interval:
    """Return the BCa bootstrap interval of the mean difference of scores, each (n_items,).

    Follows the skewness of the differences, such as a few large losses (Efron 1987; Efron & Tibshirani
    1993, eqs. 14.9-14.15), with the resamples of `bootstrap_scores`.

    Raises:
        ValueError: shapes differ, a score is not finite, or a cluster lies in two strata.
    """
    difference = _differences(candidate, baseline)
    return _bca(difference, _design(len(difference), strata, clusters), level, n_resamples, seed)


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
    clusters: Labels | None = None,
    *,
    alpha: float = 0.05,
    power: float = 0.8,
    noise: float = 0.0,
    score_range: float | None = None,
    seed: Seed = 0,
) -> NonInferiority:
    """Decide whether a candidate is worse than a baseline by less than a margin.

    Binary scores without clusters have Tango's interval. Others have, at each bound, the wider of the BCa
    bootstrap, which knows of skewness, and the t interval, which knows of small n.

    Equal scores on few items are no certainty: where fewer than 10 units of a stratum, and fewer than half,
    differ from its median one, no bound is nearer to the estimate than −ln α · score_range / n, what n
    units without a difference allow (rule of three; Hanley & Lippman-Hand 1983).

    Args:
        candidate: scores, (n_items,).
        baseline: scores of the same items, (n_items,).
        margin: ≥ 0.
        strata: the task of each item.
        clusters: what items share.
        alpha: the error of "pass", and that of "fail".
        power: what `items_to_decide` and `minimum_detectable_effect` are for.
        noise: a variance to add, from `noise_variance`.
        score_range: largest less smallest possible score; if not given, that of the scores at hand.
        seed: of the bootstrap.

    Raises:
        ValueError: margin < 0, alpha ∉ (0, 0.5), shapes differ, a score is not finite, or a cluster lies in
            two strata.
    """
    if margin < 0 or not 0 < alpha < 0.5:
        raise ValueError(f"margin ≥ 0 and 0 < alpha < 0.5 must hold, but got {margin} and {alpha}.")
    difference = _differences(candidate, baseline)
    design = _design(len(difference), strata, clusters)
    mean, binary, n_items = _paired(difference, design), _is_binary(candidate, baseline), len(difference)
    if binary:
        score_range = 1.0
    elif score_range is None:  # scores that are all equal do not say how far one can be off
        score_range = float(np.ptp([candidate, baseline])) or math.inf
    method: Literal["tango", "bootstrap"] = "tango" if binary and clusters is None else "bootstrap"
    if method == "tango":
        interval = _by_tango(difference, design, 1 - 2 * alpha)
    else:
        bca = _bca(difference, design, 1 - 2 * alpha, _N_RESAMPLES, seed)
        interval = _hull(bca, mean.interval(1 - 2 * alpha))
    unseen = _unseen_weight(difference, design) * score_range
    least = -math.log(alpha) * unseen
    near = min(least, score_range)
    floor = Interval(mean.estimate - near, mean.estimate + near, interval.level)
    interval = widen(_hull(interval, floor), mean.estimate, noise)
    verdict = _verdict(interval, margin)
    # Where few differ, planned as if one unit at least had differed by the whole range.
    variance = n_items * max(mean.stderr, unseen) ** 2
    smallest = max(minimum_detectable_effect(n_items, variance + n_items * noise, alpha, power), least)
    items = None
    if verdict == "inconclusive":
        items = _items_to_decide(mean.estimate + margin, n_items, variance, least, noise, alpha, power)
    return NonInferiority(mean.estimate, interval, margin, verdict, method, n_items, items, smallest)


def noise_variance(
    first: Floats, second: Floats, strata: Labels | None = None, clusters: Labels | None = None
) -> float:
    """Return the variance of a difference that two measurements of one model, (n_items,), show: A/A test.

    The larger of the squared mean difference, as of a shift of a whole run, and its squared standard error,
    as of items that flip by themselves. The paired standard error of two models holds the latter already:
    counted twice it errs on the safe side. It is a floor with one degree of freedom, no precise estimate;
    0 where the runs agree on every item.

    Raises:
        ValueError: shapes differ, a score is not finite, or a cluster lies in two strata.
    """
    difference = paired_difference(first, second, strata, clusters)
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


def pareto_probability(resampled: Floats) -> Floats:
    """Return how often each candidate is non-dominated, (n_candidates,), ties counting as non-dominated.

    Args:
        resampled: from `bootstrap_scores`, (n_resamples, n_candidates, n_objectives).
    """
    objectives = [np.ascontiguousarray(resampled[:, :, k]) for k in range(resampled.shape[2])]
    probabilities = np.empty(resampled.shape[1])
    for i in range(len(probabilities)):
        no_worse = np.logical_and.reduce([values >= values[:, [i]] for values in objectives])
        better = np.logical_or.reduce([values > values[:, [i]] for values in objectives])
        probabilities[i] = 1 - (no_worse & better).any(axis=1).mean()
    return probabilities


def hypervolume_interval(
    points: pareto.Points, resampled: Floats, reference: Sequence[float], level: float = 0.95
) -> Hypervolume:
    """Return the hypervolume of noisy scores with the basic bootstrap interval of that of the true ones.

    The best of noisy scores are too good: the measured hypervolume exceeds the true one about as much as
    the resampled exceed the measured. So the resampled are mirrored at the measured one (Davison & Hinkley
    1997, section 5.2); a percentile interval would count the optimism twice. Two objectives are fast, and
    more call `pareto.hypervolume` for every resample: pass fewer.

    Args:
        points: measured scores, (n_candidates, n_objectives).
        resampled: from `bootstrap_scores`, (n_resamples, n_candidates, n_objectives).
        reference: the point above which volume counts, (n_objectives,).
        level: two-sided.
    """
    observed = float(_hypervolumes(points[None], reference)[0])
    mirrored = 2 * observed - _hypervolumes(resampled, reference)
    return Hypervolume(observed, float(mirrored.mean()), percentile_interval(mirrored, level))


def _influences(difference: Floats, design: _Design) -> tuple[Floats, Floats]:
    """Means of the strata, (n_strata,), and what each unit adds to the mean over them, (n_units,)."""
    sizes = np.bincount(design.item_stratum)
    means = np.bincount(design.item_stratum, difference) / sizes
    deviations = difference - means[design.item_stratum]
    deviations[np.abs(deviations) < 1e-12 * np.abs(difference).max()] = 0.0  # rounding is no spread
    shares = deviations / (len(sizes) * sizes[design.item_stratum])
    return means, np.bincount(design.unit, shares).astype(np.float64)


def _paired(difference: Floats, design: _Design) -> PairedDifference:
    means, influences = _influences(difference, design)
    estimate, n_units = float(means.mean()), design.n_units
    if n_units.min() < 2:
        return PairedDifference(estimate, math.inf, 1.0)
    variances = np.bincount(design.unit_stratum, influences**2) * n_units / (n_units - 1)  # (n_strata,)
    total = float(variances.sum())
    shares = variances / total if total > 0 else n_units / n_units.sum()
    return PairedDifference(estimate, math.sqrt(total), float(1 / (shares**2 / (n_units - 1)).sum()))


def _resample(scores: Floats, design: _Design, n_resamples: int, seed: Seed) -> Floats:
    rng = np.random.default_rng(seed)
    sums = np.zeros((len(design.unit_stratum), scores.shape[1]))  # (n_units, n_candidates)
    np.add.at(sums, design.unit, scores)
    sizes = np.bincount(design.unit).astype(np.float64)
    resampled = np.zeros((n_resamples, scores.shape[1]))
    for stratum, n_units in enumerate(design.n_units.tolist()):
        own = design.unit_stratum == stratum
        rows = max(1, _COUNTS_AT_ONCE // n_units)
        for start in range(0, n_resamples, rows):
            counts = _counts(rng, min(rows, n_resamples - start), n_units)
            means = (counts @ sums[own]) / (counts @ sizes[own])[:, None]
            resampled[start : start + rows] += means / len(design.n_units)
    return resampled


def _counts(rng: np.random.Generator, rows: int, n_units: int) -> Floats:
    """How often each unit is drawn, a row per resample: (rows, n_units)."""
    drawn = rng.integers(n_units, size=(rows, max(n_units - 1, 1))) + n_units * np.arange(rows)[:, None]
    return np.bincount(drawn.ravel(), minlength=rows * n_units).reshape(rows, n_units).astype(np.float64)


def _by_tango(difference: Floats, design: _Design, level: float) -> Interval:
    wins = np.bincount(design.item_stratum, difference > 0)
    losses = np.bincount(design.item_stratum, difference < 0)
    return tango_interval(wins, losses, design.n_units, level)


def _bca(difference: Floats, design: _Design, level: float, n_resamples: int, seed: Seed) -> Interval:
    resampled = _resample(difference[:, None], design, n_resamples, seed)[:, 0]
    means, influences = _influences(difference, design)
    below = ((resampled < means.mean()).mean() + (resampled <= means.mean()).mean()) / 2  # ties: half
    bias = stats.norm.ppf(np.clip(below, 1 / n_resamples, 1 - 1 / n_resamples))
    squares = (influences**2).sum()
    acceleration = (influences**3).sum() / (6 * squares**1.5) if squares > 0 else 0.0
    shifted = bias + stats.norm.ppf([(1 - level) / 2, (1 + level) / 2])
    lower, upper = np.quantile(resampled, stats.norm.cdf(bias + shifted / (1 - acceleration * shifted)))
    return Interval(float(lower), float(upper), level)


def _hull(first: Interval, second: Interval) -> Interval:
    return Interval(min(first.lower, second.lower), max(first.upper, second.upper), first.level)


def _verdict(interval: Interval, margin: float) -> Verdict:
    if interval.lower > -margin:
        return "pass"
    return "fail" if interval.upper < -margin else "inconclusive"


def _unseen_weight(difference: Floats, design: _Design) -> float:
    """Weight of a unit where few differ, largest over such strata: what an unseen kind of item can weigh."""
    means = np.bincount(design.unit, difference) / np.bincount(design.unit)  # (n_units,)
    weights = [0.0]
    for stratum, n_units in enumerate(design.n_units.tolist()):
        own = means[design.unit_stratum == stratum]
        n_differ = (~np.isclose(own, np.median(own), rtol=1e-9, atol=1e-12)).sum()
        if n_differ < min(10, n_units / 2):
            weights.append(1 / (len(design.n_units) * n_units))
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


def _hypervolumes(resampled: Floats, reference: Sequence[float]) -> Floats:
    """Hypervolume of each resample, (n_resamples,)."""
    if resampled.shape[2] != 2:
        return np.array([pareto.hypervolume(points, reference) for points in resampled])
    above = np.maximum(resampled - np.asarray(reference), 0.0)
    order = np.argsort(-above[:, :, 0], axis=1)
    first, second = (np.take_along_axis(above[:, :, k], order, axis=1) for k in (0, 1))
    widths = first - np.pad(first[:, 1:], ((0, 0), (0, 1)))
    return np.asarray((widths * np.maximum.accumulate(second, axis=1)).sum(axis=1), dtype=np.float64)


def _checked(scores: Floats, n_dims: int) -> Floats:
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != n_dims or scores.size == 0 or not np.isfinite(scores).all():
        shape = "(n_items,)" if n_dims == 1 else "(n_items, n_candidates)"
        raise ValueError(f"scores must be finite numbers, {shape}, of one item or more, but got {scores!r}.")
    return scores


def _differences(candidate: Floats, baseline: Floats) -> Floats:
    candidate, baseline = _checked(candidate, 1), _checked(baseline, 1)
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


def _design(n_items: int, strata: Labels | None, clusters: Labels | None) -> _Design:
    item_stratum = np.zeros(n_items, dtype=np.intp) if strata is None else _codes(strata, n_items)
    unit = np.arange(n_items) if clusters is None else _codes(clusters, n_items)
    unit_stratum = np.zeros(unit.max() + 1, dtype=np.intp)
    unit_stratum[unit] = item_stratum
    if (torn := unit_stratum[unit] != item_stratum).any():
        raise ValueError(
            f"a cluster must lie within one stratum, but that of item {int(np.argmax(torn))} lies in two: "
            "join these strata, or name the cluster differently in each."
        )
    return _Design(item_stratum, unit, unit_stratum, np.bincount(unit_stratum))


def _codes(labels: Labels, n_items: int) -> Indices:
    if np.shape(labels) != (n_items,):
        raise ValueError(
            f"strata and clusters must label {n_items} items, but have shape {np.shape(labels)}."
        )
    return np.unique(np.asarray(labels), return_inverse=True)[1]
