"""How the values of a task's items become its score, where that is more than their mean.

lm-eval gives each item a value (a number, or a tuple such as a log-likelihood and a count of words) and a
task's metric an aggregation of these values. Those known here are smooth functions of means: each value has
parts, p, (n_parts,), and the metric is g(p̄), p̄ being the mean of the parts over the items.

The linear scores of n items are g(p̄) + g'(p̄) · (pᵢ − p̄). Their mean is the metric exactly, and their spread
gives its standard error (the infinitesimal jackknife; Efron & Tibshirani 1993, section 21.4), so that
whatever works on means of items works on them. For the mean itself they are the values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mergetune.errors import MergetuneError

Numbers = NDArray[Any]  # real, or complex where a slope is taken
Parts = tuple[float, ...]

_MOST_NATS = 300.0  # a perplexity beyond e³⁰⁰ says no more than that
_STEP = 1e-20  # of the complex-step derivative, which has no cancellation (Squire & Trapp 1998)
_PROBES = ([0.0, 1.0, 1.0], [0.25, 0.5, 2.0, -1.0, 3.5], [1.0], [7.0, 0.0, 0.0, 0.0, 1.5, 2.5])


@dataclass(frozen=True)
class Aggregation:
    """How a metric comes from the values of a task's items.

    Attributes:
        name: lm-eval's name of it, or `affine` of a function that is one of the mean.
        parts: an item's value → its parts; they are all 0 where it has no value.
        combine: means of the parts, (..., n_parts) → the metric, (...).
        alone: an item's value → the metric on this item alone; None: `combine` of its parts.
    """

    name: str
    parts: Callable[[Any], Parts]
    combine: Callable[[Numbers], Numbers]
    alone: Callable[[Any], float] | None = None

    def of_one(self, value: Any, parts: Parts) -> float:
        """Return the metric on one item alone, which has these parts."""
        return float(self.combine(np.array(parts)) if self.alone is None else self.alone(value))

    def linear(self, parts: Numbers) -> NDArray[np.float64]:
        """Return the linear scores, (n_items,), of parts, (n_items, n_parts)."""
        mean = parts.mean(axis=0)
        steps = mean + 1j * _STEP * np.eye(len(mean))  # a row moves one part
        slope = np.imag(self.combine(steps)) / _STEP
        return np.asarray(float(self.combine(mean)) + (parts - mean) @ slope, dtype=np.float64)


def aggregation_of(task: Any, metric: str) -> Aggregation:
    """Return how an lm-eval task aggregates a metric.

    Raises:
        MergetuneError: not as any aggregation that is known here.
    """
    found = _known(task, metric)
    if found is None:
        function = task.aggregation()[metric]
        others = [other for other in task.aggregation() if _known(task, other) is not None]
        instead = f" Choose another of its metrics: {', '.join(others)}." if others else ""
        raise MergetuneError(
            f"A metric must be a mean of items or a function of such means ({', '.join(KNOWN)}), but "
            f"`{metric}` of `{task.task_name}` is aggregated by "
            f"`{getattr(function, '__name__', function)}`: it has no interval, and cannot be compared item "
            f"by item.{instead}"
        )
    return found


def linear_scores(items: pd.DataFrame) -> pd.DataFrame:
    """Return a measurement's rows with linear scores; see the module.

    `items` has score_name, task, score, aggregation and parts. Each task's rows must be all that its score is
    taken on. Frames without `parts` hold means of items, and come back as they are; so do the rows of means,
    where NaN is an item that is missing because a judge gave no verdict.
    """
    if not not_means(items):
        return items
    scores = items["score"].to_numpy(dtype=np.float64, copy=True)
    rows_of = items.assign(place=np.arange(len(items))).groupby(["score_name", "task"], sort=False)
    for _, rows in rows_of:
        if rows["parts"].notna().any():
            scores[rows["place"]] = settled(rows["aggregation"]).linear(parts_of(rows, [""])[:, 0])
    return items.assign(score=scores)


def settled(names: Iterable[str]) -> Aggregation:
    """Return the aggregation of one task's items by the names that stand beside them.

    That of a mean is `nanmean` where an item has no value.
    """
    return by_name(next((name for name in names if name != "mean"), "mean"))


def not_means(items: pd.DataFrame) -> set[str]:
    """Return the objectives and guards whose scores are no means of their items' scores."""
    if "parts" not in items:
        return set()
    return set(items.loc[items["parts"].notna(), "score_name"])


def parts_of(rows: pd.DataFrame, suffixes: Sequence[str]) -> NDArray[np.float64]:
    """Return the parts of one task's items in measurements that were joined: (n_items, n_models, n_parts).

    `suffixes` are those of the columns `score`, `aggregation` and `parts`; a mean's parts are the scores.
    """
    names = pd.concat([rows[f"aggregation{suffix}"] for suffix in suffixes])
    counts = (1.0,) if settled(names).name == "nanmean" else ()
    columns = [
        [
            parts if has_parts else (score, *counts)
            for score, parts, has_parts in zip(
                rows[f"score{suffix}"], rows[f"parts{suffix}"], rows[f"parts{suffix}"].notna(), strict=True
            )
        ]
        for suffix in suffixes
    ]
    return np.stack([np.array(column, dtype=np.float64) for column in columns], axis=1)


def by_name(name: str) -> Aggregation:
    """Return an aggregation by the name that a measurement keeps."""
    kind, *numbers = name.split(" ")
    return KNOWN[kind] if kind in KNOWN else _of_affine(*map(float, numbers))


def _known(task: Any, metric: str) -> Aggregation | None:
    from lm_eval.api.registry import AGGREGATION_REGISTRY

    function = task.aggregation().get(metric)
    name = next((name for name, known in AGGREGATION_REGISTRY.items() if known is function), None)
    return _affine(function) if name is None else KNOWN.get(name)


def _affine(function: Callable[[Any], Any] | None) -> Aggregation | None:
    """Return the affine function of the mean that a task's own aggregation is, None where it is another."""
    if function is None:  # as lm-eval, which then takes the mean
        return KNOWN["mean"]
    try:
        offset = float(function([0.0, 0.0]))
        factor = float(function([1.0, 1.0])) - offset
        if not factor or not all(_near(function(p), offset + factor * float(np.mean(p))) for p in _PROBES):
            return None
        skips_nan = _near(function([1.0, math.nan, 0.0]), offset + factor / 2)
    except Exception:  # whatever a task's own code raises at plain numbers
        return None
    if (offset, factor) == (0.0, 1.0):
        return KNOWN["nanmean" if skips_nan else "mean"]
    return None if skips_nan else _of_affine(offset, factor)


def _near(value: Any, expected: float) -> bool:
    return math.isclose(float(value), expected, rel_tol=1e-9, abs_tol=1e-12)


def _of_affine(offset: float, factor: float) -> Aggregation:
    return Aggregation(
        f"affine {offset!r} {factor!r}", lambda value: (float(value),), lambda p: offset + factor * p[..., 0]
    )


def _exp(nats: Numbers) -> Numbers:
    return np.asarray(np.exp(np.where(np.real(nats) > _MOST_NATS, _MOST_NATS, nats)))


def _present(value: Any) -> Parts:
    return (0.0, 0.0) if math.isnan(value) else (float(value), 1.0)


def _pair(value: Sequence[Any]) -> Parts:
    return float(value[0]), float(value[1])


def _confusion(value: Sequence[Any]) -> Parts:
    """Return an item's place among the true and false positives, the false and true negatives."""
    gold, said = (int(label) for label in value)
    if {gold, said} - {0, 1}:
        raise MergetuneError(f"This metric takes two classes, 0 and 1, but got the labels {gold} and {said}.")
    return float(gold and said), float(said and not gold), float(gold and not said), float(not (gold or said))


def _f1(parts: Numbers) -> Numbers:
    hit, false, missed = parts[..., 0], parts[..., 1], parts[..., 2]
    return _ratio(2 * hit, 2 * hit + false + missed)


def _mcc(parts: Numbers) -> Numbers:
    """Matthews' correlation coefficient; 0 where a row or column of the table is empty, as scikit-learn's."""
    hit, false, missed, quiet = (parts[..., i] for i in range(4))
    product = (hit + false) * (hit + missed) * (quiet + false) * (quiet + missed)
    return _ratio(hit * quiet - false * missed, np.sqrt(product))


def _ratio(above: Numbers, below: Numbers) -> Numbers:
    is_zero = np.real(below) == 0
    return np.where(is_zero, 0.0, above / np.where(is_zero, 1.0, below))


def _brier(value: Sequence[Any]) -> Parts:
    """Return the sum of squares between the choices' probabilities and the right one's indicator."""
    gold, probabilities = value
    right = np.arange(len(probabilities)) == int(gold)
    return (float(((np.asarray(probabilities) - right) ** 2).sum()),)


def _is_right(value: Sequence[Any]) -> float:
    return float(int(value[0]) == int(value[1]))


KNOWN: Mapping[str, Aggregation] = {
    each.name: each
    for each in (
        Aggregation("mean", lambda value: (float(value),), lambda p: p[..., 0]),
        Aggregation("nanmean", _present, lambda p: _ratio(p[..., 0], p[..., 1]), float),
        Aggregation("perplexity", lambda value: (float(value),), lambda p: _exp(-p[..., 0])),
        Aggregation("weighted_perplexity", _pair, lambda p: _exp(-_ratio(p[..., 0], p[..., 1]))),
        Aggregation("bits_per_byte", _pair, lambda p: -_ratio(p[..., 0], p[..., 1]) / math.log(2)),
        Aggregation("f1", _confusion, _f1, alone=_is_right),
        Aggregation("matthews_corrcoef", _confusion, _mcc, alone=_is_right),
        Aggregation("brier_score", _brier, lambda p: p[..., 0]),
    )
}
