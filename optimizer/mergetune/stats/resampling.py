"""Resample the items of a suite: intervals of scores, and fronts that know their noise.

The words of every function here:

- Scores of several models stand in the same order of items, and greater is better: negate what is to be
  minimized. A score is the mean over its tasks of the mean over their items.
- NaN among the scores of several models, (n_items, n_candidates), is an item that one of them has no value
  of, as where a judge gave no verdict: a mean is over the items that the model has a value of (`completed`).
- `strata`, (n_items,): the task of each item; without them there is one stratum.
- `level` is two-sided.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mergetune.evaluation.aggregations import linear_scores, not_means
from mergetune.evaluation.evaluate import ITEM_KEYS, Score
from mergetune.stats import pareto

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
    """One score of several candidates on the items that all of them have.

    `is_mean` is False where the score is no mean of items, and `scores` are linear ones; see `aggregations`.
    """

    names: tuple[str, ...]
    scores: Floats  # (n_items, n_candidates), NaN where a candidate has no value
    tasks: Labels  # (n_items,) the strata
    is_mean: bool = True

    def of(self, names: Sequence[str]) -> ItemScores:
        """Return the scores of some of the candidates."""
        return replace(self, names=tuple(names), scores=self.scores[:, [self.names.index(n) for n in names]])


class ItemJoin:
    """Joins measurements that come one after another, item by item: of each, the scores alone are kept."""

    def __init__(self) -> None:
        self._keys = pd.DataFrame(columns=ITEM_KEYS)  # of the first measurement, in its order
        self._others: set[str] = set()  # the scores that are no means of items
        self._present = np.ones(0, dtype=bool)  # whether all have the item
        self._scores: dict[str, Floats] = {}  # by candidate, (n_items,)

    def add(self, name: str, frame: pd.DataFrame) -> None:
        """Take in a candidate's measurement; raises `ValueError` where an item is in it twice."""
        if not self._scores:
            self._keys, self._present = frame[ITEM_KEYS], np.ones(len(frame), dtype=bool)
        self._others |= not_means(frame)
        scores = linear_scores(frame)["score"].to_numpy(np.float64)
        same = all(frame[key].array.equals(self._keys[key].array) for key in ITEM_KEYS)
        if not same or not self._scores:
            own = pd.MultiIndex.from_frame(frame[ITEM_KEYS])
            if not own.is_unique:
                raise ValueError(f"`{name}` has an item twice: {own[own.duplicated()][0]}.")
            places = own.get_indexer(pd.MultiIndex.from_frame(self._keys))  # -1: it lacks the item
            self._present &= places >= 0
            scores = scores[places] if len(scores) else np.zeros(len(places))
        self._scores[name] = scores

    def items(self) -> dict[str, ItemScores]:
        """Return the linear scores by objective and guard, on the items that all candidates have."""
        found, names = {}, self._keys["score_name"].to_numpy()
        for key in pd.unique(names[self._present]):
            rows = self._present & (names == key)
            scores = np.column_stack([own[rows] for own in self._scores.values()])
            tasks = self._keys["task"].to_numpy()[rows]
            found[str(key)] = ItemScores(tuple(self._scores), scores, tasks, key not in self._others)
        return found


def join_items(frames: Mapping[str, pd.DataFrame]) -> dict[str, ItemScores]:
    """Join measurements, by candidate, item by item: the linear scores by objective and guard."""
    join = ItemJoin()
    for name, frame in frames.items():
        join.add(name, frame)
    return join.items()


@dataclass(frozen=True)
class Hypervolume:
    """The hypervolume of the measured scores, the same less its optimism, and an interval of the true one."""

    observed: float
    corrected: float
    interval: Interval


def bootstrap_scores(
    scores: Floats,
    strata: Labels | None = None,
    *,
    n_resamples: int = N_RESAMPLES,
    seed: Seed = 0,
) -> Floats:
    """Resample the items of `scores`, (n_items, n_candidates), the same ones for every candidate.

    A stratum of n items draws n − 1 of them with replacement: the variance is then unbiased however small
    the strata (McCarthy & Snowden 1985; Rao & Wu 1988). A stratum of one item shows no spread. Objectives
    have items of their own: pass one `Generator` to the calls of all, else their resamples are the same.

    Returns:
        The scores of each resample, (n_resamples, n_candidates).

    Raises:
        ValueError: shapes differ, a score is infinite, or a candidate has no value in a stratum.
    """
    rng, stratum = np.random.default_rng(seed), stratum_of(strata, len(scores))
    scores = completed(scores, stratum)
    sizes = np.bincount(stratum)
    resampled = np.zeros((n_resamples, scores.shape[1]))
    for i, size in enumerate(sizes.tolist()):
        own = scores[stratum == i]
        rows = max(1, _COUNTS_AT_ONCE // size)
        for start in range(0, n_resamples, rows):
            counts = _counts(rng, min(rows, n_resamples - start), size)
            resampled[start : start + rows] += counts @ own / max(size - 1, 1) / len(sizes)
    return resampled


def bootstrap_parts(
    parts: Floats, combine: Callable[[Floats], Floats], *, n_resamples: int = N_RESAMPLES, seed: Seed = 0
) -> Floats:
    """Resample the items of one task whose score is a function of means; see `aggregations`.

    Args:
        parts: (n_items, n_candidates, n_parts).
        combine: (..., n_parts) → (...).
        n_resamples: how many.
        seed: as in `bootstrap_scores`, whose draws these are.

    Returns:
        The scores of each resample, (n_resamples, n_candidates).
    """
    size = len(parts)
    means = bootstrap_scores(parts.reshape(size, -1), n_resamples=n_resamples, seed=seed)
    return np.asarray(combine(means.reshape(n_resamples, *parts.shape[1:])), dtype=np.float64)


def score_means(scores: Floats, strata: Labels | None = None) -> Floats:
    """Return the scores of candidates, (n_candidates,), from (n_items, n_candidates)."""
    stratum = stratum_of(strata, len(scores))
    return np.asarray(stratum_means(completed(scores, stratum), stratum).mean(axis=0))


def score_covariance(scores: Floats, strata: Labels | None = None) -> Floats:
    """Return the covariance of the scores of candidates, (n_candidates, n_candidates), from their items.

    What `bootstrap_scores` tends to with many resamples: candidates covary since they answer the same items.

    Args:
        scores: (n_items, n_candidates).
        strata: the task of each item.

    Raises:
        ValueError: shapes differ, a score is infinite, or a candidate has no value in a stratum.
    """
    stratum = stratum_of(strata, len(scores))
    sizes = np.bincount(stratum)[stratum].astype(np.float64)  # (n_items,)
    found = influences(completed(scores, stratum), stratum)
    found *= np.sqrt(sizes / np.maximum(sizes - 1, 1))[:, None]  # a stratum of one item has influence 0
    return np.asarray(found.T @ found)


def percentile_interval(resampled: Floats, level: float = 0.95) -> Interval:
    """Return the percentile bootstrap interval of a resampled score or difference, (n_resamples,)."""
    lower, upper = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(lower), float(upper), level)


def score_interval(
    score: Score, resampled: Floats, level: float = 0.95, *, is_share: bool = True
) -> Interval:
    """Return the interval of a score by its resamples or, where all items agree, the exact one of a share.

    Resamples of 26 right answers are all 100 %; by Clopper & Pearson (1934) the share may be 86.8 %.

    Args:
        score: as measured.
        resampled: from `bootstrap_scores`, (n_resamples,).
        level: two-sided.
        is_share: whether it is one, as of right answers; else the resamples alone tell.
    """
    if not (is_share and score.value in (0.0, 1.0) and score.is_unanimous):
        return percentile_interval(resampled, level)
    room = 1 - ((1 - level) / 2) ** (1 / score.n_items)
    return Interval(1 - room, 1.0, level) if score.value else Interval(0.0, room, level)


def pareto_probability(resampled: Floats, feasible: NDArray[np.bool_] | None = None) -> Floats:
    """Return how often each candidate is on the front, (n_candidates,), equal points all being on it.

    Args:
        resampled: from `bootstrap_scores`, (n_resamples, n_candidates, n_objectives).
        feasible: which candidates keep every guard in each resample, (n_resamples, n_candidates): the
            others are not on the front, and keep no one off it. If not given, all are feasible.
    """
    kept = np.ones(resampled.shape[:2], dtype=bool) if feasible is None else feasible
    counts = np.zeros(resampled.shape[1])
    for points, own in zip(resampled, kept, strict=True):
        counts[np.flatnonzero(own)[pareto.on_front(points[own])]] += 1
    return counts / len(resampled)


def hypervolume_interval(
    points: pareto.Points, resampled: Floats, reference: Sequence[float], level: float = 0.95
) -> Hypervolume:
    """Return the hypervolume of noisy scores with the basic bootstrap interval of that of the true ones.

    The best of noisy scores are too good: the measured hypervolume exceeds the true one about as much as
    the resampled exceed the measured. So the resampled are mirrored at the measured one (Davison & Hinkley
    1997, section 5.2); a percentile interval would count the optimism twice.

    Args:
        points: measured scores, (n_candidates, n_objectives).
        resampled: from `bootstrap_scores`, (n_resamples, n_candidates, n_objectives).
        reference: the point above which volume counts, (n_objectives,).
        level: two-sided.
    """
    observed = pareto.hypervolume(points, reference)
    mirrored = 2 * observed - np.array([pareto.hypervolume(own, reference) for own in resampled])
    return Hypervolume(observed, float(mirrored.mean()), percentile_interval(mirrored, level))


def stratum_of(strata: Labels | None, n_items: int) -> Indices:
    """Number the stratum of each item, (n_items,); raises `ValueError` where the labels are not as many."""
    if strata is None:
        return np.zeros(n_items, dtype=np.intp)
    if np.shape(strata) != (n_items,):
        raise ValueError(f"strata must label {n_items} items, but have shape {np.shape(strata)}.")
    return np.unique(np.asarray(strata), return_inverse=True)[1]


def completed(scores: Floats, stratum: Indices) -> Floats:
    """Return scores of several models, (n_items, n_candidates), with numbers where there is no value.

    These are linear scores (see `aggregations`) of the mean over the items that have a value: their own mean
    is that mean, and their spread gives its standard error. An item without a value stands at the mean of
    its stratum, and the others are further from it by as much as there are fewer of them.

    Raises:
        ValueError: a score is infinite, or a candidate has no value in a stratum.
    """
    scores = np.asarray(scores, dtype=np.float64)
    given = ~np.isnan(scores)
    if scores.ndim == 2 and not given.all():
        shares = stratum_means(given.astype(np.float64), stratum)[stratum]
        with np.errstate(invalid="ignore"):  # 0 / 0 is NaN again, and refused
            means = stratum_means(np.where(given, scores, 0.0), stratum)[stratum] / shares
        scores = np.where(given, means + (scores - means) / shares, means)
    return checked(scores, 2)


def influences(scores: Floats, stratum: Indices) -> Floats:
    """Return what each item adds to the scores of (n_items, n_candidates), in the same shape."""
    sizes = np.bincount(stratum)
    deviations = scores - stratum_means(scores, stratum)[stratum]
    deviations[np.abs(deviations) < 1e-12 * np.abs(scores).max()] = 0.0  # rounding is no spread
    return np.asarray(deviations / (len(sizes) * sizes[stratum])[:, None])


def stratum_means(scores: Floats, stratum: Indices) -> Floats:
    """Return the mean of each stratum's items: (n_strata, n_candidates)."""
    sizes = np.bincount(stratum)
    sums = np.zeros((len(sizes), scores.shape[1]))
    np.add.at(sums, stratum, scores)
    return np.asarray(sums / sizes[:, None])


def checked(scores: Floats, n_dims: int) -> Floats:
    """Return the scores as floats; raises `ValueError` where they have another shape or are not finite."""
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != n_dims or scores.size == 0 or not np.isfinite(scores).all():
        shape = "(n_items,)" if n_dims == 1 else "(n_items, n_candidates)"
        raise ValueError(f"scores must be finite numbers, {shape}, of one item or more, but got {scores!r}.")
    return scores


def _counts(rng: np.random.Generator, rows: int, n_items: int) -> Floats:
    """How often each item is drawn, a row per resample: (rows, n_items)."""
    drawn = rng.integers(n_items, size=(rows, max(n_items - 1, 1))) + n_items * np.arange(rows)[:, None]
    return np.bincount(drawn.ravel(), minlength=rows * n_items).reshape(rows, n_items).astype(np.float64)
