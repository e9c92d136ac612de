"""Which candidates are on the front, which keep the guards, and which one is recommended, and why."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from mergetune.evaluation.evaluate import Measurement, Score
from mergetune.evaluation.suite import GuardConfig, ObjectiveConfig, Split, SuiteConfig
from mergetune.results.roles import BASE, is_expert, is_merge, reference_name
from mergetune.results.run_dir import RunDir
from mergetune.results.smoothing import Smoothing, smooth
from mergetune.stats import pareto, resampling
from mergetune.stats.gains import ROUNDING, Gain, GainScale, best_gain
from mergetune.stats.number_text import number, signed
from mergetune.stats.resampling import Floats, Hypervolume, Indices, ItemJoin, ItemScores, join_items

Scores = Mapping[str, Score]
SOLID, PLAUSIBLE = 0.5, 0.1  # from these probabilities of being on the front
N_RESAMPLES = 2000
_FEWER_RESAMPLES = 100


@dataclass(frozen=True)
class Recommendation:
    """The candidate recommended, the reason in words, and whether it keeps every guard."""

    name: str
    reason: str
    keeps_guards: bool


@dataclass(frozen=True)
class Scales:
    """What makes scores comparable where one merge is chosen, from the items as measured.

    Attributes:
        gains: what the gains on each objective are weighed by; none where no base was measured.
        guards: the unit of each guard's excess.
    """

    gains: Mapping[str, GainScale]
    guards: Mapping[str, float]

    @classmethod
    def of(
        cls, items: Mapping[str, ItemScores], measured: Mapping[str, Scores], suite: SuiteConfig
    ) -> Scales:
        """Return the scales of a suite's scores, `items` being `measured` item by item."""
        experts = [name for name in measured if is_expert(name)]
        gains = {key: GainScale.of(items[key], BASE, experts) for key in suite.objectives if BASE in measured}
        return cls(gains, guard_units(measured, suite))

    @classmethod
    def of_frames(cls, frames: Mapping[str, pd.DataFrame], suite: SuiteConfig) -> Scales:
        """Return the scales of a suite's scores, from the measurements of some models by candidate name."""
        measured = {name: Measurement(frame, 0.0).scores() for name, frame in frames.items()}
        return cls.of(join_items(frames), measured, suite)


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


def guard_violations(
    scores: Scores, references: Mapping[str, Scores], suite: SuiteConfig
) -> dict[str, float]:
    """Return by how much each guard is broken: positive is broken, zero and below is kept.

    A guard that is met exactly is kept, whatever rounding says.

    Args:
        scores: the candidate's.
        references: the scores of the base and of the experts, by candidate name.
        suite: the suite's file.
    """
    violations = {}
    for name, guard in suite.guards.items():
        reference, own = references[reference_name(guard)][name].value, scores[name].value
        violations[name] = float(_excess(np.array(guard.sign * own), np.array(guard.sign * reference), guard))
    return violations


def _excess(own: Floats, reference: Floats, guard: GuardConfig) -> Floats:
    """Return by how much signed scores break a guard: 0 where it is met exactly, rounding apart."""
    excess = reference - own - guard.margin
    size = np.maximum(np.abs(reference), np.abs(own)) + guard.margin
    return np.where(np.abs(excess) <= ROUNDING * size, 0.0, excess)


def guard_units(references: Mapping[str, Scores], suite: SuiteConfig) -> dict[str, float]:
    """Return what the excess over each guard is divided by, so that those of several can be compared.

    It is the margin; where that is narrower than the standard error of the reference's score, as a margin
    of 0 is, the standard error; 1 where that is 0, too, or unknown.
    """
    units = {}
    for name, guard in suite.guards.items():
        stderr = references[reference_name(guard)][name].stderr
        units[name] = max(guard.margin, stderr if math.isfinite(stderr) else 0.0) or 1.0
    return units


def reaches(scores: Scores, target: Mapping[str, float], suite: SuiteConfig) -> bool:
    """Say whether scores are as good as a target's in all its objectives."""
    wanted = {name: suite.objectives[name].sign * value for name, value in target.items()}
    return all(suite.objectives[name].sign * scores[name].value >= value for name, value in wanted.items())


def relative_violations(
    scores: Scores, references: Mapping[str, Scores], suite: SuiteConfig
) -> dict[str, float]:
    """Return by how much each guard is broken, as `guard_violations`, in the units of `guard_units`."""
    units = guard_units(references, suite)
    return {
        name: excess / units[name] for name, excess in guard_violations(scores, references, suite).items()
    }


def keeps_guards(scores: Scores, references: Mapping[str, Scores], suite: SuiteConfig) -> bool:
    """Say whether no guard is broken; arguments as of `guard_violations`."""
    return all(excess <= 0 for excess in guard_violations(scores, references, suite).values())


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
    kept = {name: scores for name, scores in candidates.items() if keeps_guards(scores, candidates, suite)}
    names = list(kept)
    return [names[i] for i in pareto.front(objective_points(kept, suite))] if kept else []


def hypervolume(front: Iterable[Scores], base: Scores, suite: SuiteConfig) -> float:
    """Return the volume that these scores dominate above the base's."""
    points = objective_points({str(i): scores for i, scores in enumerate(front)}, suite)
    return pareto.hypervolume(points, objective_points({"": base}, suite)[0])


def gains_over_base(candidates: Mapping[str, Scores], suite: SuiteConfig, scales: Scales) -> dict[str, Gain]:
    """Return the best expert's gain over the base in each objective: (1,) each."""
    experts = [name for name in candidates if is_expert(name)]
    signed = _signed({name: candidates[name] for name in (BASE, *experts)}, suite.objectives)
    return {key: _gain(values[:1], values[1:], experts, scales.gains[key]) for key, values in signed.items()}


def retained_gains(
    candidates: Mapping[str, Scores], scores: Scores, suite: SuiteConfig, scales: Scales
) -> dict[str, float]:
    """Return, per objective, 1 less the loss: the share kept of the best expert's gain over the base.

    1 equals the best expert and, where the gain is clear, 0 equals the base; see `gains`.
    """
    gains = gains_over_base(candidates, suite, scales)
    return {key: _share(gain, suite.objectives[key], scores[key]) for key, gain in gains.items()}


def _share(gain: Gain, objective: ObjectiveConfig, score: Score) -> float:
    return 1 - float(gain.loss(np.array([objective.sign * score.value]))[0])


def best_merge(candidates: Mapping[str, Scores], suite: SuiteConfig, scales: Scales) -> str | None:
    """Return the merge with the least worst weighted loss against the experts, of those that keep the guards.

    The loss of an objective is 1 minus the share kept of the best expert's gain (see `gains` for gains
    that noise may have made), times the objective's weight (a weighted Chebyshev distance to the ideal
    point; Bowman 1976). Where no merge keeps the guards, the one that breaks them least, each excess in
    the unit of `guard_units`. The base and the experts themselves are not merges. None where no merge
    was measured.

    Args:
        candidates: the scores to choose by, smoothed or measured, by candidate name.
        suite: the suite's file.
        scales: of the base and the experts, and of others if they are at hand.
    """
    names = list(candidates)
    if BASE not in candidates or not any(map(is_merge, names)):
        return None
    return names[int(_choose(_signed(candidates, suite.scores), names, suite, scales))]


def recommend(
    candidates: Mapping[str, Scores],
    suite: SuiteConfig,
    scales: Scales,
    measured: Mapping[str, Scores] | None = None,
) -> Recommendation | None:
    """Choose one merge as `best_merge` does, and say why. None where no merge was measured.

    Args:
        candidates: the scores to choose by, smoothed or measured, by candidate name.
        suite: the suite's file.
        scales: of the scores as measured.
        measured: where `candidates` are smoothed, the scores as measured, for the reason's words.
    """
    best = best_merge(candidates, suite, scales)
    if best is None:
        return None
    merges = [name for name in candidates if is_merge(name)]
    kept = [name for name in merges if keeps_guards(candidates[name], candidates, suite)]
    by = "By smoothed scores, " if measured else ""
    if best in kept:
        text = f"{by}of the {len(kept)} merges that keep every guard, its worst loss is the smallest: "
    else:
        text = f"{by}no merge keeps every guard; this one breaks them least: "
    text += f"{kept_words(candidates, best, suite, scales)}."
    if measured:
        text += f" As measured, {kept_words(measured, best, suite, scales)}."
    return Recommendation(best, text[0].upper() + text[1:], best in kept)


def kept_words(candidates: Mapping[str, Scores], name: str, suite: SuiteConfig, scales: Scales) -> str:
    """Say how much a candidate keeps of each objective's gain, or that no expert gains beyond noise."""
    gains = gains_over_base(candidates, suite, scales)
    kept = {
        key: _share(gain, suite.objectives[key], candidates[name][key])
        for key, gain in gains.items()
        if gain.is_clear
    }
    shares = [
        f"{'more than all' if share > 1 + ROUNDING else format(share, '.0%')} on `{key}`"
        for key, share in kept.items()
    ]
    unclear = [
        f"no expert gains on `{key}` beyond noise, and it is {change} from the base"
        for key, change in _changes(candidates, name, suite, scales)
        if not gains[key].is_clear
    ]
    clear = [f"it keeps {', '.join(shares)} of the best expert's gain over the base"] if shares else []
    return "; ".join([*clear, *unclear])


def _changes(
    candidates: Mapping[str, Scores], name: str, suite: SuiteConfig, scales: Scales
) -> Iterator[tuple[str, str]]:
    """Yield each objective with the difference to the base and its paired standard error, in words."""
    for key, scale in scales.gains.items():
        change, stderr = candidates[name][key].value - candidates[BASE][key].value, scale.stderrs[name]
        if suite.objectives[key].are_shares(scores[key].value for scores in candidates.values()):
            yield key, f"{100 * change:+.1f} ± {100 * stderr:.1f} points".replace("-", "−")
        else:
            yield key, f"{signed(change)} ± {number(stderr)}"


def _signed(
    candidates: Mapping[str, Scores], configs: Mapping[str, ObjectiveConfig | GuardConfig]
) -> dict[str, Floats]:
    """Return these objectives and guards, signed so that greater is better: (n_candidates,) each."""
    return {
        key: config.sign * np.array([scores[key].value for scores in candidates.values()])
        for key, config in configs.items()
    }


def _gain(base: Floats, experts: Floats, names: Sequence[str], scale: GainScale) -> Gain:
    return best_gain(base, experts, scale.clear(names), scale.spread)


def _choose(
    signed: Mapping[str, Floats], names: Sequence[str], suite: SuiteConfig, scales: Scales
) -> Indices:
    """Return the merge that `recommend` chooses, (...), by signed scores, (..., n_candidates) each."""
    excess, losses = _excess_and_losses(signed, names, suite, scales)
    order = np.lexsort((np.sum(losses, axis=0), np.max(losses, axis=0), excess), axis=-1)
    return np.asarray(order[..., 0])


def _excess_and_losses(
    signed: Mapping[str, Floats], names: Sequence[str], suite: SuiteConfig, scales: Scales
) -> tuple[Floats, list[Floats]]:
    """Return by how much guards are broken at most, infinite for no merge, and each objective's loss.

    All are (..., n_candidates), as the signed scores are.
    """
    experts = [name for name in names if is_expert(name)]
    columns, base = [names.index(name) for name in experts], names.index(BASE)
    losses = []
    for key, config in suite.objectives.items():
        own = signed[key]
        gain = _gain(own[..., [base]], own[..., columns], experts, scales.gains[key])
        losses.append(config.weight * gain.loss(own))
    worse = [
        _excess(signed[key], signed[key][..., [names.index(reference_name(guard))]], guard)
        / scales.guards[key]
        for key, guard in suite.guards.items()
    ]
    excess = np.max([np.zeros_like(losses[0]), *worse], axis=0)
    excess[..., [i for i, name in enumerate(names) if not is_merge(name)]] = np.inf
    return excess, losses


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
        feasible &= _excess(resampled[key], reference, guard) <= 0
    points = np.stack([resampled[key] for key in suite.objectives], axis=2)
    found = resampling.pareto_probability(points, feasible)
    return NoisyFront(names, resampled, points, dict(zip(names, found.tolist(), strict=True)))


@dataclass(frozen=True)
class Choice:
    """What the search split of a run says: scores as measured and to choose by, the front, the merge."""

    measured: Mapping[str, Scores]
    smoothing: Smoothing
    scales: Scales
    front: NoisyFront
    recommendation: Recommendation | None

    def finalists(self, k: int, suite: SuiteConfig) -> tuple[str, ...]:
        """Return up to k merges to confirm on the holdout split.

        The recommended one comes first, then those that one would least regret to have taken: by the mean
        over resamples of the items of the worst loss and of what guards are broken by, in their units. One
        that differs from an earlier finalist by less than a standard error in every objective is left out,
        as is one that is hardly ever on the front. The base and the experts alone are no finalists.
        """
        if self.recommendation is None:
            return ()
        names = self.front.names
        excess, losses = _excess_and_losses(self.resampled(suite), names, suite, self.scales)
        regret = dict(zip(names, (excess + np.max(losses, axis=0)).mean(axis=0).tolist(), strict=True))
        found = [self.recommendation.name]
        for name in sorted(names, key=regret.__getitem__):
            plausible = self.front.probability[name] >= PLAUSIBLE and is_merge(name)
            if plausible and not any(self.front.alike(name, other) for other in found):
                found.append(name)
        return tuple(found[:k])

    def optimism(self, suite: SuiteConfig) -> list[Floats]:
        """Predict by how much the chosen merge's measured score is too good, per objective: (n_resamples,).

        The merge is chosen anew in each resample, by the same rule and with the smoothing of the fit; its
        score there is compared with its score on all items (Efron & Tibshirani 1993, section 17.6).
        """
        chosen = _choose(self.resampled(suite), self.front.names, suite, self.scales)
        measured = _signed(self.measured, suite.scores)
        return [
            self.front.resampled[key][np.arange(len(chosen)), chosen] - measured[key][chosen]
            for key in suite.objectives
        ]

    def resampled(self, suite: SuiteConfig) -> dict[str, Floats]:
        """Return the scores to choose by in each resample, signed: (n_resamples, n_candidates) each."""
        names, found = self.front.names, {}
        for key, scores in self.front.resampled.items():
            found[key] = scores.copy()
            if smoother := self.smoothing.smoothers.get(key):
                columns = [names.index(name) for name in smoother.names]
                sign = suite.scores[key].sign
                found[key][:, columns] = sign * smoother.apply(sign * scores[:, columns])
        return found

    def hypervolume(self, suite: SuiteConfig) -> Hypervolume:
        """Return the hypervolume above the base's scores, with its interval, of those that keep the guards.

        Who keeps them is taken from the scores as measured: were it drawn anew, candidates near a margin
        would come and go, and mirroring the resamples would add volume instead of taking optimism off.
        More than five objectives take long, and so have fewer resamples.
        """
        names, signed = self.front.names, _signed(self.measured, suite.scores)
        kept = np.array([keeps_guards(self.measured[name], self.measured, suite) for name in names])
        base = names.index(BASE)

        def above(points: Floats) -> Floats:
            return np.where(kept[:, None], points - points[..., [base], :], 0.0)

        points = np.stack([signed[key] for key in suite.objectives], axis=1)
        drawn = self.front.points[: N_RESAMPLES if points.shape[1] <= 5 else _FEWER_RESAMPLES]
        return resampling.hypervolume_interval(above(points), above(drawn), [0.0] * points.shape[1])


def choose(run: RunDir) -> Choice | None:
    """Smooth, resample and recommend, from the search split alone.

    None before the base and what the guards refer to are measured.
    """
    suite, candidates = run.study.suite_config, run.candidates()
    measured: dict[str, Scores] = {}
    join = ItemJoin()
    for candidate in candidates:
        frame = run.measurement(candidate.name, "search", responses=False)
        if frame is not None:
            measured[candidate.name] = Measurement(frame, 0.0).scores()
            join.add(candidate.name, frame)
    if not {BASE, *map(reference_name, suite.guards.values())} <= measured.keys():
        return None
    items = join.items()
    smoothing, scales = smooth(candidates, measured, items, run.study.seed), Scales.of(items, measured, suite)
    chosen = recommend(smoothing.scores, suite, scales, measured if smoothing.smoothers else None)
    return Choice(measured, smoothing, scales, noisy_front(items, suite), chosen)


def scales_of(run: RunDir, names: Iterable[str], split: Split = "search") -> Scales:
    """Return the scales of a run's scores, from what was measured of these candidates on one split."""
    found = {name: run.measurement(name, split, responses=False) for name in names}
    frames = {name: frame for name, frame in found.items() if frame is not None}
    return Scales.of_frames(frames, run.study.suite_config)


def best_baseline(run: RunDir, choice: Choice) -> str | None:
    """Return the merge that would be recommended had there been no search, by the same scores and rule."""
    baselines = {candidate.name for candidate in run.candidates() if candidate.is_baseline}
    scores = {name: own for name, own in choice.smoothing.scores.items() if name in baselines}
    return best_merge(scores, run.study.suite_config, choice.scales)
