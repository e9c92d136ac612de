"""How far a judge can be trusted: its own noise, and its agreement with people."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

_LOWEST_KAPPA = 0.6  # above it agreement is "substantial": Landis and Koch (1977)


@dataclass(frozen=True)
class JudgeQuality:
    """A judge's noise and its agreement with people; NaN where it was not measured.

    Attributes:
        n_items: the replies that the noise was measured on.
        within_variance: the mean over items of the variance between repeats.
        n_labels: the replies that people gave labels.
        agreement: the share of these to which the judge gave the same grade.
        kappa: Cohen's kappa of the grades, with quadratic weights: 0 is chance, 1 is perfect.
    """

    n_items: int
    within_variance: float
    n_labels: int
    agreement: float
    kappa: float

    @property
    def sd(self) -> float:
        """The standard deviation of one verdict."""
        return math.sqrt(self.within_variance)


@dataclass(frozen=True)
class Agreement:
    """How often a judge gave the grades that people gave, as reports show it.

    Attributes:
        judge: what the user calls it.
        n_labels: see `JudgeQuality`; so are `agreement` and `kappa`.
        kappa: None where all grades are one and the same, which tells nothing.
    """

    judge: str
    n_labels: int
    agreement: float
    kappa: float | None

    @property
    def is_low(self) -> bool:
        """Whether scores by this judge say little."""
        return self.kappa is None or self.kappa < _LOWEST_KAPPA

    @property
    def text(self) -> str:
        """The figures in words."""
        return (
            f"judge `{self.judge}`: {self.agreement:.0%} of {self.n_labels} labelled replies graded as by "
            f"people, kappa {self._kappa}"
        )

    @property
    def warning(self) -> str:
        """What to know of a judge whose agreement is low."""
        return (
            f"The judge `{self.judge}` agrees too little with people: Cohen's kappa is {self._kappa} on "
            f"{self.n_labels} labelled replies, and should be {_LOWEST_KAPPA} or more. Make the rubric "
            "clearer, or take another judge."
        )

    @property
    def _kappa(self) -> str:
        return "undefined (all grades are the same)" if self.kappa is None else f"{self.kappa:.2f}"


Agreements = Mapping[str, Mapping[str, Agreement]]  # by objective or guard, and task


def low_agreements(agreements: Agreements) -> list[str]:
    """Return a warning for each judge that agrees too little with people, with the score it belongs to."""
    low = [(score, own) for score, tasks in agreements.items() for own in tasks.values() if own.is_low]
    return [f"{score}: {own.warning}" for score, own in low]


def judge_quality(
    repeated: Sequence[Sequence[float]], judged: Sequence[float], labels: Sequence[float], n_steps: int
) -> JudgeQuality:
    """Measure a judge's noise and agreement.

    Args:
        repeated: the scores that the judge gave each item, one a repeat: (n_items, n_repeats), NaN where it
            gave none.
        judged: its scores of replies that people gave labels: (n_labels,); those that are NaN do not count.
        labels: what people gave: (n_labels,), in [0, 1].
        n_steps: the grades, less one, to which scores are rounded before they are compared.
    """
    is_judged = ~np.isnan(np.asarray(judged, dtype=np.float64))
    grades, wanted = (np.rint(np.asarray(each)[is_judged] * n_steps).astype(int) for each in (judged, labels))
    return JudgeQuality(
        n_items=len(repeated),
        within_variance=_within_variance(repeated),
        n_labels=len(wanted),
        agreement=float(np.mean(grades == wanted)) if len(wanted) else math.nan,
        kappa=weighted_kappa(grades, wanted, n_steps + 1),
    )


def weighted_kappa(first: np.ndarray, second: np.ndarray, n_grades: int) -> float:
    """Return Cohen's kappa with quadratic weights (Cohen 1968); of two grades it is that without weights.

    Weights suit grades in an order: four for five is a smaller fault than one for five. NaN where all
    grades are one and the same, or there are none.
    """
    counts = np.zeros((n_grades, n_grades))  # (n_grades, n_grades)
    np.add.at(counts, (first, second), 1)
    weights = np.subtract.outer(np.arange(n_grades), np.arange(n_grades)) ** 2
    chance = np.outer(counts.sum(1), counts.sum(0)) / max(counts.sum(), 1)
    expected = (weights * chance).sum()
    return 1.0 - float((weights * counts).sum() / expected) if expected else math.nan


def _within_variance(repeated: Sequence[Sequence[float]]) -> float:
    given = [[score for score in own if not math.isnan(score)] for own in repeated]
    variances = [np.var(own, ddof=1) for own in given if len(own) > 1]
    return float(np.mean(variances)) if variances else math.nan
