"""What the page's sliders work with: what each candidate loses, and how surely it stays within a limit.

A limit on a guard is its margin: signed so that greater is better, a candidate may be that much below the
guard's reference. A limit on an objective is a least score, or one at most: the same rule, with the best
expert for the reference and what lies between as the margin. So the page chooses as `selection.recommend`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mergetune.evaluation.suite import SuiteConfig
from mergetune.report.metric import Metric
from mergetune.results import selection
from mergetune.results.roles import BASE, is_expert
from mergetune.results.selection import Choice
from mergetune.stats.resampling import Floats, Interval, score_interval

# Of what a limit bounds, these quantiles over the resamples travel in the page.
LEVELS = (0.005, 0.025, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.975, 0.995)


@dataclass(frozen=True)
class ExploredScore:
    """One objective or guard of all candidates, in the order of `Exploration.names`.

    Attributes:
        reference: the candidate that a limit is told against.
        reference_stderr: the standard error of its score.
        chosen_by: the scores that one chooses by, smoothed where they can be: (n_candidates,).
        measured: the scores as measured: (n_candidates,).
        losses: of an objective, what each candidate loses, unweighted: (n_candidates,); None for a guard.
        quantiles: at `LEVELS`, of the signed score of an objective, and of how far a guard's is above its
            reference: (n_candidates, n_levels).
        intervals: the 95 % intervals of the scores as measured; see `score_interval`.
    """

    metric: Metric
    weight: float
    reference: str
    reference_stderr: float
    chosen_by: Floats
    measured: Floats
    losses: Floats | None
    quantiles: Floats
    intervals: tuple[Interval, ...]


@dataclass(frozen=True)
class Exploration:
    """All that is needed to choose again by other weights and limits."""

    names: tuple[str, ...]
    scores: tuple[ExploredScore, ...]


def explore(choice: Choice, metrics: Sequence[Metric], suite: SuiteConfig) -> Exploration:
    """Gather what the sliders work with, from the search split alone."""
    names, chosen_by = choice.front.names, choice.smoothing.scores
    resampled = choice.resampled(suite)
    gains = selection.gains_over_base(chosen_by, suite, choice.scales)
    found = []
    for metric in metrics:
        key = metric.name
        reference = metric.reference if metric.kind == "guard" else _best_expert(choice, metric)
        own = np.array([chosen_by[name][key].value for name in names])
        bounded, raw = resampled[key], metric.sign * choice.front.resampled[key]
        if metric.kind == "guard":
            bounded = bounded - bounded[:, [names.index(reference)]]
        found.append(
            ExploredScore(
                metric,
                suite.objectives[key].weight if metric.kind == "objective" else 0.0,
                reference,
                choice.measured[reference][key].stderr,
                own,
                np.array([choice.measured[name][key].value for name in names]),
                gains[key].loss(metric.sign * own) if metric.kind == "objective" else None,
                np.quantile(bounded, LEVELS, axis=0).T,
                tuple(
                    score_interval(choice.measured[name][key], own_resampled, is_share=metric.percent)
                    for name, own_resampled in zip(names, raw.T, strict=True)
                ),
            )
        )
    return Exploration(names, tuple(found))


def _best_expert(choice: Choice, metric: Metric) -> str:
    """Return the expert that is best at an objective by the scores that one chooses by; else the base."""
    scores: Mapping[str, selection.Scores] = choice.smoothing.scores
    experts = [name for name in choice.front.names if is_expert(name)] or [BASE]
    return max(experts, key=lambda name: metric.sign * scores[name][metric.name].value)
