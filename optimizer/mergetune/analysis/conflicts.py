"""Conflicts: coefficients that help one score and harm another, and how much of either's pull they hold."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mergetune.slopes.sensitivity import COEFFICIENT, fold_facts, fold_slopes, n_passes, slopes_by_group
from mergetune.space.recipe import LayerGroup, single_layers

Kind = Literal["none", "unclear", "partial", "strong"]
Vector = NDArray[np.float64]

CLEAR = 2.0  # standard errors from zero that a slope must have to count as known
# Where less than this share of two pulls is opposed, there is little to give up, or to search for.
SMALLEST_SHARE = 0.1
# Where most of what both scores want is opposed, little is left that they could gain elsewhere.
STRONG = 0.5
CLEAR_SHARE = 0.5  # of a score's pull that must be known before a conflict is named, or denied


@dataclass(frozen=True)
class Pull:
    """How strongly one score pulls at the coefficients of a point.

    Attributes:
        score_name: the objective or guard.
        loss: its mean loss there, in nats.
        n_items: the items that it was measured on.
        total: Σ |slope| over all coefficients, in nats per unit.
        clear: the share of it in slopes that lie beyond two standard errors.
    """

    score_name: str
    loss: float
    n_items: int
    total: float
    clear: float


@dataclass(frozen=True)
class Slope:
    """One score's slope at one coefficient, in nats per unit, and its share of the score's whole pull."""

    value: float
    stderr: float
    share: float


@dataclass(frozen=True)
class Place:
    """A coefficient that pulls two scores apart: one's loss falls and the other's rises with it."""

    group: str
    parameter: str
    expert: str
    first: Slope
    second: Slope

    @property
    def share(self) -> float:
        """How much is at stake for both: the smaller one of the shares that either's pull has here."""
        return min(self.first.share, self.second.share)


@dataclass(frozen=True)
class Conflict:
    """Two scores at a point: do they want the same of the coefficients?

    Attributes:
        point: where.
        first: the one score.
        second: the other score.
        cosine: of their slopes over all coefficients; below 0 their gradients conflict (Yu et al. 2020,
            Gradient Surgery for Multi-Task Learning, definition 1).
        cosine_stderr: its standard error, by leaving out one fold at a time; None where there is one.
        places: the coefficients that clearly pull them apart, where most is at stake for both first.
    """

    point: str
    first: Pull
    second: Pull
    cosine: float
    cosine_stderr: float | None
    places: tuple[Place, ...]

    @property
    def share(self) -> float:
        """How much of their pulls is opposed: 1 where the two want the contrary of all there is."""
        return sum(place.share for place in self.places)

    @property
    def kind(self) -> Kind:
        """How far the two are in conflict.

        `unclear`: more than half of a score's pull is within the noise. Of nothing but noise, two
        standard errors over four folds let a seventh of the slopes pass, and a third of the pull.
        """
        if min(self.first.clear, self.second.clear) < CLEAR_SHARE:
            return "unclear"
        if self.share >= STRONG and self.cosine + CLEAR * (self.cosine_stderr or 0.0) < 0:
            return "strong"
        return "partial" if self.share >= SMALLEST_SHARE else "none"


def conflicts(frame: pd.DataFrame, groups: Iterable[LayerGroup]) -> tuple[Conflict, ...]:
    """Compare each pair of scores at each point of a measurement, where most is at stake first.

    Args:
        frame: of `measure_sensitivity`.
        groups: the layer groups whose tensors share coefficients.
    """
    folds, facts = fold_slopes(frame, groups), fold_facts(frame)
    found: list[Conflict] = []
    for point in frame["point"].unique():
        at_point = _at_point(folds[folds["point"] == point], facts[facts["point"] == point])
        pairs = (_compare(str(point), one, two) for one, two in itertools.combinations(at_point, 2))
        found += sorted(pairs, key=lambda conflict: -conflict.share)
    return tuple(found)


def layer_gains(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the gains of single layers: a row per point, score, layer and coefficient.

    Columns: point, score_name, layer (`outside` for all that lies outside them), coefficient (the
    expert, or the parameter that is one for all), gain and stderr in nats per unit, is_clear: whether
    it lies beyond two standard errors, and opposed: the other scores that the coefficient clearly pulls
    the other way, in words.
    """
    layers = single_layers(frame["tensor"].unique())
    rows = slopes_by_group(frame, layers)
    opposed: dict[tuple[str, str, str, str], list[str]] = {}
    for each in conflicts(frame, layers):
        one, two = each.first.score_name, each.second.score_name
        for place in each.places:
            for own, other in ((one, two), (two, one)):
                opposed.setdefault((each.point, own, place.group, place.expert), []).append(other)
    # no method has two smooth coefficients for one expert, nor two that are for all
    keys = rows[["point", "score_name", "group", "expert"]].itertuples(index=False, name=None)
    return pd.DataFrame(
        {
            "point": rows["point"],
            "score_name": rows["score_name"],
            "layer": rows["group"].str.removeprefix("layer"),
            "coefficient": rows["expert"].where(rows["expert"] != "", rows["parameter"]),
            "gain": -rows["slope"],
            "stderr": rows["stderr"],
            "is_clear": rows["slope"].abs() > CLEAR * rows["stderr"],
            "opposed": [", ".join(opposed.get(key, [])) for key in keys],
        }
    )


def sensitivity_as_data(frame: pd.DataFrame, groups: Sequence[LayerGroup]) -> dict[str, object]:
    """Return slopes by layer group and the conflicts as what JSON can hold."""
    by_group = slopes_by_group(frame, groups)
    rows = by_group.astype({"stderr": object}).where(by_group.notna(), None)
    found = [asdict(each) | {"kind": each.kind, "opposed": each.share} for each in conflicts(frame, groups)]
    return {"n_passes": n_passes(frame), "slopes": rows.to_dict("records"), "conflicts": found}


@dataclass(frozen=True)
class _Score:
    """One score's slopes at a point: (n_folds, n_coefficients), with the names of the coefficients."""

    name: str
    coefficients: list[tuple[str, ...]]
    folds: Vector
    loss: float
    n_items: int

    @property
    def mean(self) -> Vector:
        return np.asarray(self.folds.mean(axis=0))

    @property
    def stderr(self) -> Vector:
        if len(self.folds) == 1:
            return np.full(self.folds.shape[1], np.inf)  # nothing is known of the noise
        return np.asarray(self.folds.std(axis=0, ddof=1) / math.sqrt(len(self.folds)))

    @property
    def shares(self) -> Vector:
        sizes = np.abs(self.mean)
        return np.asarray(sizes / (sizes.sum() or 1.0))

    @property
    def is_clear(self) -> NDArray[np.bool_]:
        return np.asarray(np.abs(self.mean) > CLEAR * self.stderr)

    @property
    def pull(self) -> Pull:
        total, clear = float(np.abs(self.mean).sum()), float(self.shares[self.is_clear].sum())
        return Pull(self.name, self.loss, self.n_items, total, clear)


def _at_point(folds: pd.DataFrame, facts: pd.DataFrame) -> list[_Score]:
    wide = folds.pivot(index=["score_name", "fold"], columns=COEFFICIENT, values="slope").fillna(0.0)
    return [
        _Score(
            str(name),
            [tuple(map(str, names)) for names in wide.columns],
            wide.loc[name].to_numpy(),
            float(own["loss"].mean()),
            int(own["n_items"].sum()),
        )
        for name, own in facts.groupby("score_name", sort=False)
    ]


def _compare(point: str, one: _Score, two: _Score) -> Conflict:
    variance = _jackknife(one.folds, lambda mean: _cosine(mean, two.mean)) + _jackknife(
        two.folds, lambda mean: _cosine(one.mean, mean)
    )
    places = sorted(_places(one, two), key=lambda place: -place.share)
    return Conflict(
        point,
        one.pull,
        two.pull,
        _cosine(one.mean, two.mean),
        math.sqrt(variance) if math.isfinite(variance) else None,
        tuple(places),
    )


def _places(one: _Score, two: _Score) -> Iterator[Place]:
    opposed = one.is_clear & two.is_clear & (one.mean * two.mean < 0)
    for i in np.flatnonzero(opposed):
        slopes = (Slope(float(s.mean[i]), float(s.stderr[i]), float(s.shares[i])) for s in (one, two))
        yield Place(*one.coefficients[i], *slopes)


def _cosine(one: Vector, two: Vector) -> float:
    norms = float(np.linalg.norm(one) * np.linalg.norm(two))
    return float(one @ two) / norms if norms else 0.0


def _jackknife(folds: Vector, statistic: Callable[[Vector], float]) -> float:
    """Return the variance of a statistic of the mean over folds, by leaving out one at a time."""
    n = len(folds)
    if n == 1:
        return math.inf
    left_out = [statistic(np.delete(folds, i, axis=0).mean(axis=0)) for i in range(n)]
    return (n - 1) * float(np.var(left_out))
