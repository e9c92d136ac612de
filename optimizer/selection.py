"""Which candidates are on the front, which keep the guards, and which one is recommended, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from optimizer import pareto, resampling
from optimizer.evaluate import Score
from optimizer.resampling import Floats, ItemScores
from optimizer.run_dir import RunDir
from optimizer.suite import GuardConfig, SuiteConfig

Scores = Mapping[str, Score]
BASE = "base"
SOLID, PLAUSIBLE = 0.5, 0.1  # from these probabilities of being on the front
_EXPERT = "expert-"
_N_RESAMPLES = 2000


@dataclass(frozen=True)
class Recommendation:
    """The candidate recommended, the reason in words, and whether it keeps every guard."""

    name: str
    reason: str
    keeps_guards: bool


@dataclass(frozen=True)
class NoisyFront:
    """The objectives in resamples of the items, and how often each candidate is on the front.

    `resampled` is (n_resamples, n_candidates, n_objectives), signed so that greater is better.
    """

    names: tuple[str, ...]
    resampled: Floats
    probability: Mapping[str, float]

    def alike(self, first: str, second: str) -> bool:
        """Say whether two candidates differ by less than a paired standard error in every objective."""
        i, j = self.names.index(first), self.names.index(second)
        difference = self.resampled[:, i] - self.resampled[:, j]
        return bool((np.abs(difference.mean(axis=0)) <= difference.std(axis=0)).all())


def expert_name(expert: str) -> str:
    """Return the candidate's name of an expert measured alone."""
    return f"{_EXPERT}{expert}"


def is_expert(name: str) -> bool:
    """Say whether a candidate's name is that of an expert measured alone."""
    return name.startswith(_EXPERT)


def reference_name(guard: GuardConfig) -> str:
    """Return the candidate's name of what a guard is compared to."""
    return BASE if guard.reference == BASE else expert_name(guard.reference)


def guard_violations(
    scores: Scores, references: Mapping[str, Scores], suite: SuiteConfig
) -> dict[str, float]:
    """Return by how much each guard is broken: positive is broken, zero and below is kept.

    Args:
        scores: the candidate's.
        references: the scores of the base and of the experts, by candidate name.
        suite: the suite's file.
    """
    violations = {}
    for name, guard in suite.guards.items():
        worse = guard.sign * (references[reference_name(guard)][name].value - scores[name].value)
        violations[name] = worse - guard.margin
    return violations


def objective_points(candidates: Mapping[str, Scores], suite: SuiteConfig) -> pareto.Points:
    """Return the candidates' objectives, signed so that greater is better: (n_candidates, n_objectives)."""
    return np.array(
        [
            [objective.sign * scores[name].value for name, objective in suite.objectives.items()]
            for scores in candidates.values()
        ]
    ).reshape(len(candidates), len(suite.objectives))


def front(candidates: Mapping[str, Scores], suite: SuiteConfig) -> list[str]:
    """Return the names of the non-dominated candidates among those that keep every guard."""
    kept = {
        name: scores
        for name, scores in candidates.items()
        if all(excess <= 0 for excess in guard_violations(scores, candidates, suite).values())
    }
    names = list(kept)
    return [names[i] for i in pareto.front(objective_points(kept, suite))] if kept else []


def retained_gains(candidates: Mapping[str, Scores], scores: Scores, suite: SuiteConfig) -> dict[str, float]:
    """Return, per objective, the share kept of the best expert's gain over the base.

    1 equals the best expert and 0 the base. Where no expert is better than the base there is no gain
    to keep: the value is then 1 plus the plain difference to the base.
    """
    experts = [own for name, own in candidates.items() if is_expert(name)]
    gains = {}
    for name, objective in suite.objectives.items():
        base = objective.sign * candidates[BASE][name].value
        best = max((objective.sign * own[name].value for own in experts), default=base)
        own = objective.sign * scores[name].value
        gains[name] = (own - base) / (best - base) if best > base else 1 + own - base
    return gains


def recommend(candidates: Mapping[str, Scores], suite: SuiteConfig) -> Recommendation | None:
    """Choose one merge: guards kept, then the least worst weighted loss against the experts.

    The loss of an objective is 1 minus the share kept of the best expert's gain, times the
    objective's weight (a weighted Chebyshev distance to the ideal point; Bowman 1976). The base and
    the experts themselves are not merges. None where no merge was measured.
    """
    merges = {name: scores for name, scores in candidates.items() if name != BASE and not is_expert(name)}
    if not merges or BASE not in candidates:
        return None

    def losses(name: str) -> list[float]:
        kept = retained_gains(candidates, merges[name], suite)
        return [suite.objectives[key].weight * (1 - share) for key, share in kept.items()]

    def excess(name: str) -> float:
        return max([0.0, *guard_violations(merges[name], candidates, suite).values()])

    best = min(merges, key=lambda name: (excess(name), max(losses(name)), sum(losses(name))))
    kept = retained_gains(candidates, merges[best], suite)
    shares = ", ".join(
        f"{'more than all' if share > 1 else format(share, '.0%')} on {key}" for key, share in kept.items()
    )
    if excess(best) > 0:
        reason = (
            "No merge keeps every guard; this one breaks them least. "
            f"It keeps {shares} of the best expert's gain over the base."
        )
    else:
        reason = (
            f"Of the {sum(excess(name) == 0 for name in merges)} merges that keep every guard, its worst "
            f"loss is the smallest: it keeps {shares} of the best expert's gain over the base."
        )
    return Recommendation(best, reason, excess(best) == 0)


def noisy_front(frames: Mapping[str, pd.DataFrame], suite: SuiteConfig, seed: int = 0) -> NoisyFront:
    """Resample the items, the same ones for all candidates, and count who is on the front.

    On the front of a resample are the non-dominated among those that keep every guard in it, against the
    reference on the same items.
    """
    rng = np.random.default_rng(seed)
    names = tuple(frames)

    def resampled(score_name: str) -> Floats:
        joined = ItemScores.join(frames, score_name)
        return resampling.bootstrap_scores(joined.scores, joined.tasks, n_resamples=_N_RESAMPLES, seed=rng)

    objectives = [config.sign * resampled(name) for name, config in suite.objectives.items()]
    feasible = np.ones((_N_RESAMPLES, len(names)), dtype=bool)
    for name, guard in suite.guards.items():
        scores = guard.sign * resampled(name)
        feasible &= scores[:, [names.index(reference_name(guard))]] - scores <= guard.margin
    points = np.stack(objectives, axis=2)
    found = resampling.pareto_probability(points, feasible)
    return NoisyFront(names, points, dict(zip(names, found.tolist(), strict=True)))


def finalists(run: RunDir, k: int) -> tuple[str, ...]:
    """Return up to k merges to confirm on the holdout split, from the search split alone.

    The recommended one comes first, then those that are most probably on the front; one that differs from
    an earlier finalist by less than a standard error in every objective is left out, as is one that is
    hardly ever on the front. The base and the experts alone are no finalists.
    """
    suite, scores = run.study.suite_config, run.all_scores("search")
    chosen = recommend(scores, suite)
    if chosen is None:
        return ()
    frames = {name: frame for name in scores if (frame := run.measurement(name, "search")) is not None}
    front = noisy_front(frames, suite)
    found = [chosen.name]
    for name in sorted(front.names, key=lambda name: -front.probability[name]):
        plausible = front.probability[name] >= PLAUSIBLE and name != BASE and not is_expert(name)
        if plausible and not any(front.alike(name, other) for other in found):
            found.append(name)
    return tuple(found[:k])
