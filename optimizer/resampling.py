"""Resample the items of a suite: intervals of scores, and fronts that know their noise.

The words of every function here:

- Scores of several models stand in the same order of items, and greater is better: negate what is to be
  minimized. A score is the mean over its tasks of the mean over their items.
- `strata`, (n_items,): the task of each item. `clusters`, (n_items,): what items share, such as a passage;
  a cluster lies within one stratum. Without them there is one stratum, and every item stands alone.
- `level` is two-sided.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from optimizer import pareto
from optimizer.evaluate import ITEM_KEYS

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]
Labels = Sequence[Any] | NDArray[Any]
Seed = int | np.random.SeedSequence | np.random.Generator
N_RESAMPLES = 5000
_COUNTS_AT_ONCE = 2**21  # bounds the memory of a resampling to some 50 MB


@dataclass(frozen=True)
class Interval:
    """A confidence interval of two-sided `level`: each bound alone errs with (1 − level) / 2."""

    lower: float
    upper: float
    level: float


@dataclass(frozen=True)
class ItemScores:
    """One score of several candidates on the items that all of them have."""

    names: tuple[str, ...]
    scores: Floats  # (n_items, n_candidates)
    tasks: Labels  # (n_items,) the strata

    def of(self, names: Sequence[str]) -> ItemScores:
        """Return the scores of some of the candidates."""
        return ItemScores(tuple(names), self.scores[:, [self.names.index(n) for n in names]], self.tasks)


def join_items(frames: Mapping[str, pd.DataFrame]) -> dict[str, ItemScores]:
    """Join measurements, by candidate, item by item: the scores by objective and guard."""
    columns = {name: frame.set_index(ITEM_KEYS)["score"] for name, frame in frames.items()}
    joined = pd.concat(columns, axis=1, join="inner")
    return {
        str(key): ItemScores(
            tuple(frames), rows.to_numpy(np.float64), rows.index.get_level_values("task").to_numpy()
        )
        for key, rows in joined.groupby(level="score_name", sort=False)
    }


@dataclass(frozen=True)
class Hypervolume:
    """The hypervolume of the measured scores, the same less its optimism, and an interval of the true one."""

    observed: float
    corrected: float
    interval: Interval


@dataclass(frozen=True)
class Design:
    """How the items were drawn: independent units (items, or clusters of items) within strata (tasks)."""

    item_stratum: Indices  # (n_items,)
    unit: Indices  # (n_items,) the unit of each item
    unit_stratum: Indices  # (n_units,)
    n_units: Indices  # (n_strata,) units of each stratum


def bootstrap_scores(
    scores: Floats,
    strata: Labels | None = None,
    clusters: Labels | None = None,
    *,
    n_resamples: int = N_RESAMPLES,
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
    scores = checked(scores, 2)
    return resample(scores, design_of(len(scores), strata, clusters), n_resamples, seed)


def score_means(scores: Floats, strata: Labels | None = None) -> Floats:
    """Return the scores of candidates, (n_candidates,), from (n_items, n_candidates)."""
    scores = checked(scores, 2)
    return np.asarray(stratum_means(scores, design_of(len(scores), strata, None)).mean(axis=0))


def score_covariance(scores: Floats, strata: Labels | None = None, clusters: Labels | None = None) -> Floats:
    """Return the covariance of the scores of candidates, (n_candidates, n_candidates), from their items.

    What `bootstrap_scores` tends to with many resamples: candidates covary since they answer the same items.

    Args:
        scores: (n_items, n_candidates).
        strata: the task of each item.
        clusters: what items share.

    Raises:
        ValueError: shapes differ, a score is not finite, or a cluster lies in two strata.
    """
    scores = checked(scores, 2)
    design = design_of(len(scores), strata, clusters)
    units = influences(scores, design)
    n_units = design.n_units[design.unit_stratum].astype(np.float64)  # (n_units,)
    units *= np.sqrt(n_units / np.maximum(n_units - 1, 1))[:, None]  # a stratum of one unit has influence 0
    return np.asarray(units.T @ units)


def percentile_interval(resampled: Floats, level: float = 0.95) -> Interval:
    """Return the percentile bootstrap interval of a resampled score or difference, (n_resamples,)."""
    lower, upper = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(lower), float(upper), level)


def pareto_probability(resampled: Floats, feasible: NDArray[np.bool_] | None = None) -> Floats:
    """Return how often each candidate is on the front, (n_candidates,), equal points all being on it.

    Args:
        resampled: from `bootstrap_scores`, (n_resamples, n_candidates, n_objectives).
        feasible: which candidates keep every guard in each resample, (n_resamples, n_candidates): the
            others are not on the front, and keep no one off it. If not given, all are feasible.
    """
    kept = np.ones(resampled.shape[:2], dtype=bool) if feasible is None else feasible
    objectives = [np.ascontiguousarray(resampled[:, :, k]) for k in range(resampled.shape[2])]
    probabilities = np.empty(resampled.shape[1])
    for i in range(len(probabilities)):
        no_worse = np.logical_and.reduce([kept, *(values >= values[:, [i]] for values in objectives)])
        better = np.logical_or.reduce([values > values[:, [i]] for values in objectives])
        probabilities[i] = (kept[:, i] & ~(no_worse & better).any(axis=1)).mean()
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


def design_of(n_items: int, strata: Labels | None, clusters: Labels | None) -> Design:
    """Return the design of so many items; raises `ValueError` as `bootstrap_scores` does."""
    item_stratum = np.zeros(n_items, dtype=np.intp) if strata is None else _codes(strata, n_items)
    unit = np.arange(n_items) if clusters is None else _codes(clusters, n_items)
    unit_stratum = np.zeros(unit.max() + 1, dtype=np.intp)
    unit_stratum[unit] = item_stratum
    if (torn := unit_stratum[unit] != item_stratum).any():
        raise ValueError(
            f"a cluster must lie within one stratum, but that of item {int(np.argmax(torn))} lies in two: "
            "join these strata, or name the cluster differently in each."
        )
    return Design(item_stratum, unit, unit_stratum, np.bincount(unit_stratum))


def influences(scores: Floats, design: Design) -> Floats:
    """Return what each unit adds to the scores of (n_items, n_candidates): (n_units, n_candidates)."""
    sizes = np.bincount(design.item_stratum)
    deviations = scores - stratum_means(scores, design)[design.item_stratum]
    deviations[np.abs(deviations) < 1e-12 * np.abs(scores).max()] = 0.0  # rounding is no spread
    found = np.zeros((len(design.unit_stratum), scores.shape[1]))
    np.add.at(found, design.unit, deviations / (len(sizes) * sizes[design.item_stratum])[:, None])
    return found


def stratum_means(scores: Floats, design: Design) -> Floats:
    """Return the mean of each stratum's items: (n_strata, n_candidates)."""
    sums = np.zeros((len(design.n_units), scores.shape[1]))
    np.add.at(sums, design.item_stratum, scores)
    return np.asarray(sums / np.bincount(design.item_stratum)[:, None])


def resample(scores: Floats, design: Design, n_resamples: int, seed: Seed) -> Floats:
    """Do what `bootstrap_scores` does, for a design that is known already."""
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


def checked(scores: Floats, n_dims: int) -> Floats:
    """Return the scores as floats; raises `ValueError` where they have another shape or are not finite."""
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != n_dims or scores.size == 0 or not np.isfinite(scores).all():
        shape = "(n_items,)" if n_dims == 1 else "(n_items, n_candidates)"
        raise ValueError(f"scores must be finite numbers, {shape}, of one item or more, but got {scores!r}.")
    return scores


def _counts(rng: np.random.Generator, rows: int, n_units: int) -> Floats:
    """How often each unit is drawn, a row per resample: (rows, n_units)."""
    drawn = rng.integers(n_units, size=(rows, max(n_units - 1, 1))) + n_units * np.arange(rows)[:, None]
    return np.bincount(drawn.ravel(), minlength=rows * n_units).reshape(rows, n_units).astype(np.float64)


def _hypervolumes(resampled: Floats, reference: Sequence[float]) -> Floats:
    """Hypervolume of each resample, (n_resamples,)."""
    if resampled.shape[2] != 2:
        return np.array([pareto.hypervolume(points, reference) for points in resampled])
    above = np.maximum(resampled - np.asarray(reference), 0.0)
    order = np.argsort(-above[:, :, 0], axis=1)
    first, second = (np.take_along_axis(above[:, :, k], order, axis=1) for k in (0, 1))
    widths = first - np.pad(first[:, 1:], ((0, 0), (0, 1)))
    return np.asarray((widths * np.maximum.accumulate(second, axis=1)).sum(axis=1), dtype=np.float64)


def _codes(labels: Labels, n_items: int) -> Indices:
    if np.shape(labels) != (n_items,):
        raise ValueError(
            f"strata and clusters must label {n_items} items, but have shape {np.shape(labels)}."
        )
    return np.unique(np.asarray(labels), return_inverse=True)[1]
