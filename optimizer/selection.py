"""Which candidates are on the front, which keep the guards, and which one is recommended, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from optimizer import pareto, resampling
from optimizer.evaluate import Measurement, Score
from optimizer.resampling import Floats, Hypervolume, Indices, ItemScores, join_items
from optimizer.run_dir import RunDir
from optimizer.smoothing import Smoothing, smooth
from optimizer.suite import GuardConfig, SuiteConfig

Scores = Mapping[str, Score]
BASE = "base"
SOLID, PLAUSIBLE = 0.5, 0.1  # from these probabilities of being on the front
_EXPERT = "expert-"
GRADIENT = "gradient-"  # begins the names of the points that slopes led to
N_RESAMPLES = 2000
_FEWER_RESAMPLES = 100


@dataclass(frozen=True)
class Recommendation:
    """The candidate recommended, the reason in words, and whether it keeps every guard."""

    name: str
    reason: str
    keeps_guards: bool


@dataclass(frozen=True)
class NoisyFront:
    """All scores in resamples of the items, signed, and how often each candidate is on the front.

    `resampled` holds objectives and guards, (n_resamples, n_candidates) each; `points` are the objectives
    alone, (n_resamples, n_candidates, n_objectives).
    """

    names: tuple[str, ...]
    resampled: Mapping[str, Floats]
    points: Floats
    probability: Mapping[str, float]

    def alike(self, first: str, second: str) -> bool:
        """Say whether two candidates differ by less than a paired standard error in every objective."""
        i, j = self.names.index(first), self.names.index(second)
        difference = self.points[:, i] - self.points[:, j]
        return bool((np.abs(difference.mean(axis=0)) <= difference.std(axis=0)).all())


def expert_name(expert: str) -> str:
    """Return the candidate's name of an expert measured alone."""
    return f"{_EXPERT}{expert}"


def is_merge(name: str) -> bool:
    """Say whether a candidate is neither the base nor an expert alone."""
    return name != BASE and not is_expert(name)


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


def recommend(
    candidates: Mapping[str, Scores], suite: SuiteConfig, measured: Mapping[str, Scores] | None = None
) -> Recommendation | None:
    """Choose one merge: guards kept, then the least worst weighted loss against the experts.

    The loss of an objective is 1 minus the share kept of the best expert's gain, times the
    objective's weight (a weighted Chebyshev distance to the ideal point; Bowman 1976). The base and
    the experts themselves are not merges. None where no merge was measured.

    Args:
        candidates: the scores to choose by, smoothed or measured, by candidate name.
        suite: the suite's file.
        measured: where `candidates` are smoothed, the scores as measured, for the reason's words.
    """
    names = list(candidates)
    merges = [name for name in names if is_merge(name)]
    if not merges or BASE not in candidates:
        return None
    best = names[int(_choose(_signed(candidates, suite), names, suite))]

    def excess(name: str) -> float:
        return max([0.0, *guard_violations(candidates[name], candidates, suite).values()])

    by = "By smoothed scores, " if measured else ""
    if keeps_guards := excess(best) == 0:
        n_kept = sum(excess(name) == 0 for name in merges)
        text = f"{by}of the {n_kept} merges that keep every guard, its worst loss is the smallest: it keeps "
    else:
        text = f"{by}no merge keeps every guard; this one breaks them least. It keeps "
    text += f"{kept_shares(candidates, best, suite)} of the best expert's gain over the base."
    if measured:
        text += f" As measured, it keeps {kept_shares(measured, best, suite)}."
    return Recommendation(best, text[0].upper() + text[1:], keeps_guards)


def kept_shares(candidates: Mapping[str, Scores], name: str, suite: SuiteConfig) -> str:
    """Say how much a candidate keeps of each objective's gain."""
    kept = retained_gains(candidates, candidates[name], suite)
    return ", ".join(
        f"{'more than all' if share > 1 else format(share, '.0%')} on `{key}`" for key, share in kept.items()
    )


def _signed(candidates: Mapping[str, Scores], suite: SuiteConfig) -> dict[str, Floats]:
    """Return each objective and guard, signed so that greater is better: (n_candidates,)."""
    return {
        key: config.sign * np.array([scores[key].value for scores in candidates.values()])
        for key, config in suite.scores.items()
    }


def _choose(signed: Mapping[str, Floats], names: Sequence[str], suite: SuiteConfig) -> Indices:
    """Return the merge that `recommend` chooses, (...), by signed scores, (..., n_candidates) each."""
    experts = [i for i, name in enumerate(names) if is_expert(name)]
    losses = []
    for key, config in suite.objectives.items():
        own, base = signed[key], signed[key][..., [names.index(BASE)]]
        best = np.maximum(base, own[..., experts].max(axis=-1, keepdims=True)) if experts else base
        gain = np.where(best > base, best - base, 1.0)
        losses.append(config.weight * (best - own) / gain)
    worse = [
        signed[key][..., [names.index(reference_name(guard))]] - signed[key] - guard.margin
        for key, guard in suite.guards.items()
    ]
    excess = np.max([np.zeros_like(losses[0]), *worse], axis=0)
    excess[..., [i for i, name in enumerate(names) if not is_merge(name)]] = np.inf
    order = np.lexsort((np.sum(losses, axis=0), np.max(losses, axis=0), excess), axis=-1)
    return np.asarray(order[..., 0])


def noisy_front(items: Mapping[str, ItemScores], suite: SuiteConfig, seed: int = 0) -> NoisyFront:
    """Resample the items, the same ones for all candidates, and count who is on the front.

    On the front of a resample are the non-dominated among those that keep every guard in it, against the
    reference on the same items.
    """
    rng, names = np.random.default_rng(seed), next(iter(items.values())).names
    resampled = {}
    for key, config in suite.scores.items():
        resampled[key] = config.sign * resampling.bootstrap_scores(
            items[key].scores, items[key].tasks, n_resamples=N_RESAMPLES, seed=rng
        )
    feasible = np.ones((N_RESAMPLES, len(names)), dtype=bool)
    for key, guard in suite.guards.items():
        reference = resampled[key][:, [names.index(reference_name(guard))]]
        feasible &= reference - resampled[key] <= guard.margin
    points = np.stack([resampled[key] for key in suite.objectives], axis=2)
    found = resampling.pareto_probability(points, feasible)
    return NoisyFront(names, resampled, points, dict(zip(names, found.tolist(), strict=True)))


@dataclass(frozen=True)
class Choice:
    """What the search split of a run says: scores as measured and to choose by, the front, the merge."""

    measured: Mapping[str, Scores]
    smoothing: Smoothing
    front: NoisyFront
    recommendation: Recommendation | None

    def finalists(self, k: int) -> tuple[str, ...]:
        """Return up to k merges to confirm on the holdout split.

        The recommended one comes first, then those that are most probably on the front; one that differs
        from an earlier finalist by less than a standard error in every objective is left out, as is one
        that is hardly ever on the front. The base and the experts alone are no finalists.
        """
        if self.recommendation is None:
            return ()
        found = [self.recommendation.name]
        for name in sorted(self.front.names, key=lambda name: -self.front.probability[name]):
            plausible = self.front.probability[name] >= PLAUSIBLE and is_merge(name)
            if plausible and not any(self.front.alike(name, other) for other in found):
                found.append(name)
        return tuple(found[:k])

    def optimism(self, suite: SuiteConfig) -> list[Floats]:
        """Predict by how much the chosen merge's measured score is too good, per objective: (n_resamples,).

        The merge is chosen anew in each resample, by the same rule and with the smoothing of the fit; its
        score there is compared with its score on all items (Efron & Tibshirani 1993, section 17.6).
        """
        names = self.front.names
        chosen_by = {}
        for key, scores in self.front.resampled.items():
            chosen_by[key] = scores.copy()
            if smoother := self.smoothing.smoothers.get(key):
                columns = [names.index(name) for name in smoother.names]
                sign = suite.scores[key].sign
                chosen_by[key][:, columns] = sign * smoother.apply(sign * scores[:, columns])
        chosen = _choose(chosen_by, names, suite)
        measured = _signed(self.measured, suite)
        return [
            self.front.resampled[key][np.arange(len(chosen)), chosen] - measured[key][chosen]
            for key in suite.objectives
        ]

    def hypervolume(self, suite: SuiteConfig) -> Hypervolume:
        """Return the hypervolume above the base's scores, with its interval, of those that keep the guards.

        Who keeps them is taken from the scores as measured: were it drawn anew, candidates near a margin
        would come and go, and mirroring the resamples would add volume instead of taking optimism off.
        Other than two objectives take long, and so have fewer resamples.
        """
        names, signed = self.front.names, _signed(self.measured, suite)
        violations = [guard_violations(self.measured[name], self.measured, suite) for name in names]
        kept = np.array([all(excess <= 0 for excess in own.values()) for own in violations])
        base = names.index(BASE)

        def above(points: Floats) -> Floats:
            return np.where(kept[:, None], points - points[..., [base], :], 0.0)

        points = np.stack([signed[key] for key in suite.objectives], axis=1)
        drawn = self.front.points[: N_RESAMPLES if points.shape[1] == 2 else _FEWER_RESAMPLES]
        return resampling.hypervolume_interval(above(points), above(drawn), [0.0] * points.shape[1])


def choose(run: RunDir) -> Choice | None:
    """Smooth, resample and recommend, from the search split alone.

    None before the base and what the guards refer to are measured.
    """
    suite, candidates = run.study.suite_config, run.candidates()
    found = {candidate.name: run.measurement(candidate.name, "search") for candidate in candidates}
    frames = {name: frame for name, frame in found.items() if frame is not None}
    if not {BASE, *map(reference_name, suite.guards.values())} <= frames.keys():
        return None
    measured = {name: Measurement(frame, 0.0).scores() for name, frame in frames.items()}
    items = join_items(frames)
    smoothing = smooth(candidates, measured, items, run.study.seed)
    recommendation = recommend(smoothing.scores, suite, measured if smoothing.smoothers else None)
    return Choice(measured, smoothing, noisy_front(items, suite), recommendation)


def best_baseline(run: RunDir, choice: Choice) -> str | None:
    """Return the merge that would be recommended had there been no search, by the same scores and rule."""
    baselines = {candidate.name for candidate in run.candidates() if candidate.kind == "baseline"}
    scores = {name: own for name, own in choice.smoothing.scores.items() if name in baselines}
    found = recommend(scores, run.study.suite_config)
    return found.name if found else None
