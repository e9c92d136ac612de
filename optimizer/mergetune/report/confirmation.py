"""What the holdout split says of the search: the ledger of its use, and optimism measured and predicted."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from mergetune.evaluation.aggregations import linear_scores
from mergetune.evaluation.evaluate import Score, paired
from mergetune.evaluation.suite import Split
from mergetune.report.metric import Metric
from mergetune.results.roles import BASE
from mergetune.results.run_dir import HoldoutUse, RunDir
from mergetune.results.selection import Choice, Scores
from mergetune.stats.paired import PairedDifference, noise_variance, paired_difference
from mergetune.stats.resampling import Interval, percentile_interval

# Returns the per-item scores of a candidate on one split, None where it was not measured.
Read = Callable[[str, Split], pd.DataFrame | None]


@dataclass(frozen=True)
class Noise:
    """What a second measurement of the base on the same items changed.

    `variances` are those of a difference of two measurements, by score; `shifts` the second less the first.
    """

    n_items: int
    n_changed: int
    variances: Mapping[str, float]
    shifts: Mapping[str, float]


@dataclass(frozen=True)
class Optimism:
    """A finalist's score on both splits, and by how much the search split looked better (> 0: optimistic)."""

    name: str
    metric: Metric
    search: Score
    smoothed: Score
    holdout: Score
    difference: Score  # search − holdout, signed
    smoothed_difference: Score


@dataclass(frozen=True)
class MeanOptimism:
    """A mean over objectives, and over finalists where it says so, with its 95 % interval."""

    estimate: float
    interval: Interval

    def agrees(self, other: float) -> bool:
        """Say whether another figure lies within the interval."""
        return self.interval.lower <= other <= self.interval.upper


@dataclass(frozen=True)
class Confirmation:
    """The holdout's uses, the finalists' optimism, its mean, and what the search alone predicted of it."""

    uses: tuple[HoldoutUse, ...]
    finalists: tuple[str, ...]
    optimism: tuple[Optimism, ...]
    mean: MeanOptimism | None
    smoothed_mean: MeanOptimism | None
    predicted: MeanOptimism | None


def measured_noise(run: RunDir, metrics: Sequence[Metric]) -> Noise | None:
    """Compare the base's two measurements, item by item; None where there is one only."""
    first, second = run.measurement(BASE, "search", responses=False), run.noise()
    if first is None or second is None:
        return None
    both = paired(second, first)
    variances, shifts = {}, {}
    for metric in metrics:
        rows = both[both["score_name"] == metric.name]
        again, once, tasks = (rows[name].to_numpy() for name in ("own", "score_other", "task"))
        variances[metric.name] = noise_variance(again, once, tasks)
        shifts[metric.name] = paired_difference(again, once, tasks).estimate
    return Noise(len(both), int((both["score"] != 0).sum()), variances, shifts)


def confirmation(
    run: RunDir,
    choice: Choice | None,
    holdout: Mapping[str, Scores],
    metrics: Sequence[Metric],
    noise: Noise | None,
    read: Read,
) -> Confirmation:
    """Compare what the search said of the finalists with what the holdout says.

    The finalists are those of the ledger's last use; where a run has no ledger, the recommended merge.
    """
    uses = run.holdout_uses()
    chosen = choice.recommendation if choice else None
    names = uses[-1].finalists if uses else (chosen.name,) if chosen else ()
    names = tuple(name for name in names if choice and name in holdout and name in choice.measured)
    objectives = [metric for metric in metrics if metric.kind == "objective"]
    variances = noise.variances if noise else {}
    if choice is None or not names:
        return Confirmation(uses, (), (), None, None, None)
    rows = [_optimism(name, metric, choice, holdout[name], variances) for name in names for metric in metrics]
    mean = _mean_optimism(read, names, objectives, variances)
    shifts = [
        one.difference.value - one.smoothed_difference.value for one in rows if one.metric in objectives
    ]
    shift = float(np.mean(shifts))  # smoothed scores are taken to err as much as measured ones
    bounds = mean.interval
    smoothed = Interval(bounds.lower - shift, bounds.upper - shift, bounds.level)
    predicted = _predicted(run, choice)
    return Confirmation(
        uses, names, tuple(rows), mean, MeanOptimism(mean.estimate - shift, smoothed), predicted
    )


def _optimism(
    name: str, metric: Metric, choice: Choice, holdout: Scores, variances: Mapping[str, float]
) -> Optimism:
    """Compare one score; the splits share no item, so that the errors add as variances."""
    search, smoothed = choice.measured[name][metric.name], choice.smoothing.scores[name][metric.name]
    own = holdout[metric.name]

    def difference(score: Score) -> Score:
        stderr = math.sqrt(score.stderr**2 + own.stderr**2 + variances.get(metric.name, 0.0))
        n_items = min(score.n_items, own.n_items)
        return Score(metric.sign * (score.value - own.value), stderr, n_items)

    return Optimism(name, metric, search, smoothed, own, difference(search), difference(smoothed))


def _mean_optimism(
    read: Read, names: Sequence[str], objectives: Sequence[Metric], variances: Mapping[str, float]
) -> MeanOptimism:
    """Average search − holdout over finalists and objectives.

    The finalists share their items, so that their mean is taken item by item.
    """
    estimates, variance = [], 0.0
    for metric in objectives:
        search, holdout = (_mean_of(read, names, metric, split) for split in ("search", "holdout"))
        estimates.append(metric.sign * (search.estimate - holdout.estimate))
        variance += search.stderr**2 + holdout.stderr**2 + variances.get(metric.name, 0.0)
    estimate = float(np.mean(estimates))
    stderr = math.sqrt(variance) / len(objectives)
    return MeanOptimism(estimate, PairedDifference(estimate, stderr, math.inf).interval())


def _mean_of(read: Read, names: Sequence[str], metric: Metric, split: Split) -> PairedDifference:
    frames = [frame for name in names if (frame := read(name, split)) is not None]
    rows = pd.concat(linear_scores(frame[frame["score_name"] == metric.name]) for frame in frames)
    items = rows.groupby(["task", "item"])["score"].mean().dropna()
    tasks = items.index.get_level_values("task").to_numpy()
    return paired_difference(items.to_numpy(np.float64), np.zeros(len(items)), tasks)


def _predicted(run: RunDir, choice: Choice) -> MeanOptimism:
    """Predict the recommended merge's mean optimism over the objectives, from resamples of the search."""
    drawn = np.mean(choice.optimism(run.study.suite_config), axis=0)
    return MeanOptimism(float(drawn.mean()), percentile_interval(drawn))
