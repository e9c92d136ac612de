"""The verdict: does the recommended merge beat what one has without a search, and how surely?"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pandas as pd

from optimizer import selection
from optimizer.baselines import is_soup
from optimizer.evaluate import ITEM_KEYS, Measurement, Score
from optimizer.report.metric import Metric
from optimizer.resampling import Floats, bootstrap_scores, join_items
from optimizer.selection import Recommendation
from optimizer.suite import Split, SuiteConfig

N_RESAMPLES = 2000
CLEAR = 0.95  # share of the resamples in which one must be ahead to be called clearly better


@dataclass(frozen=True)
class Comparison:
    """The recommended merge against the best expert of one objective, paired by item."""

    metric: Metric
    own: Score
    base: Score
    expert: str
    best: Score
    difference: Score


@dataclass(frozen=True)
class Rival:
    """A model one has without a search, its worst loss, and how often the merge is ahead of it."""

    name: str
    worst_loss: float
    ahead: float  # share of the resamples


@dataclass(frozen=True)
class Verdict:
    """The answer in words, and the figures behind it, on the split named."""

    level: Literal["good", "mixed", "none"]
    headline: str
    sentences: tuple[str, ...]
    split: Split
    worst_loss: float | None = None
    rivals: tuple[Rival, ...] = ()
    comparisons: tuple[Comparison, ...] = ()


def paired(first: pd.DataFrame, second: pd.DataFrame) -> pd.DataFrame:
    """Join two measurements item by item; `score` becomes the difference first − second."""
    both = first.merge(second, on=ITEM_KEYS, suffixes=("", "_other"))
    return both.assign(own=both["score"], score=both["score"] - both["score_other"])


def judge(
    chosen: Recommendation | None,
    frames: Mapping[str, pd.DataFrame],
    metrics: Sequence[Metric],
    suite: SuiteConfig,
    split: Split,
    averages: Collection[str],
    noise: Mapping[str, float] | None = None,
) -> Verdict:
    """Judge the recommended merge on the models measured on `split`.

    Args:
        chosen: what `selection.recommend` said.
        frames: per-item scores of the recommended merge, the base, the experts and what is in
            `averages`, by candidate name.
        metrics: the suite's objectives and guards.
        suite: the suite's file.
        split: where `frames` were measured.
        averages: the names of the plain averages, the soups and the usual defaults.
        noise: variances that two measurements of one model show, by score: added to the differences'.
    """
    if chosen is None:
        return Verdict("mixed", "No merge has been measured yet.", (), split)
    scores = {name: Measurement(frame, 0.0).scores() for name, frame in frames.items()}
    losses = _resampled_losses(frames, scores, suite)
    point = {name: _worst_loss(scores, name, suite) for name in scores}
    rivals = [
        Rival(name, point[name], _share_ahead(losses[chosen.name], losses[name]))
        for name in scores
        if name != chosen.name and _keeps_guards(scores, name, suite)
    ]
    level, headline, sentences = _words(chosen, point[chosen.name], rivals, averages)
    if level == "good" and len(suite.objectives) > 1:
        headline = f"As one model for all objectives, {headline}"
    if chosen.keeps_guards and not _keeps_guards(scores, chosen.name, suite):
        level = "mixed" if level == "good" else level
        headline = f"{headline.rstrip('.')}, but it breaks a guard on the held-out items."
    return Verdict(
        level,
        headline,
        tuple(sentences),
        split,
        point[chosen.name],
        tuple(rivals),
        tuple(_comparisons(chosen.name, frames, scores, metrics, noise or {})),
    )


def _words(
    chosen: Recommendation, own: float, rivals: Sequence[Rival], averages: Collection[str]
) -> tuple[Literal["good", "mixed", "none"], str, list[str]]:
    """Choose the headline and the sentence of the figures behind it."""
    if not chosen.keeps_guards:
        return "none", "No merge keeps every guard.", []
    expert = _best([rival for rival in rivals if rival.name not in averages])
    average = _best([rival for rival in rivals if rival.name in averages])
    if expert and expert.worst_loss <= own:
        whose = "the base model" if expert.name == selection.BASE else "your experts"
        return (
            "none",
            f"No merge beats {whose}.",
            [
                f"Deploy `{expert.name}`: its worst loss is {expert.worst_loss:.0%}, that of the best "
                f"merge `{chosen.name}` is {own:.0%}; the merge is ahead in {expert.ahead:.0%} of "
                f"{N_RESAMPLES:,} resamples of the items.",
                "A merge cannot know what no expert knows: for more, train again.",
            ],
        )
    ahead = [rival for rival in (expert, average) if rival]
    figures = [_standing(own, ahead)] if ahead else []
    if chosen.name in averages:
        return "mixed", f"The search found no merge better than {_title(chosen.name)}.", figures
    if average and average.worst_loss <= own:
        return (
            "mixed",
            f"The search found nothing clearly better than {_title(average.name)}.",
            figures,
        )
    if unclear := [rival.name for rival in ahead if rival.ahead < CLEAR]:
        names = " or ".join(f"`{name}`" for name in unclear)
        return "mixed", f"`{chosen.name}` is ahead, but not clearly: {names} may be as good.", figures
    kinds = {"every expert": None} | {f"every {_kind(r.name)}": None for r in rivals if r.name in averages}
    whom = " and ".join(kinds)
    return "good", f"`{chosen.name}` beats {whom}.", figures


def _kind(average: str) -> str:
    return "soup" if is_soup(average) else "plain average"


def _title(average: str) -> str:
    return f"the {_kind(average)} `{average}`"


def _standing(own: float, rivals: Sequence[Rival]) -> str:
    losses = ", ".join(f"that of `{rival.name}` is {rival.worst_loss:.0%}" for rival in rivals)
    ahead = ", of ".join(f"`{rival.name}` in {rival.ahead:.1%}" for rival in rivals)
    return (
        f"Its worst loss is {own:.0%}; {losses}. In {N_RESAMPLES:,} resamples of the items it is "
        f"ahead of {ahead}."
    )


def _best(rivals: Sequence[Rival]) -> Rival | None:
    return min(rivals, key=lambda rival: rival.worst_loss, default=None)


def _keeps_guards(scores: Mapping[str, Mapping[str, Score]], name: str, suite: SuiteConfig) -> bool:
    return all(value <= 0 for value in selection.guard_violations(scores[name], scores, suite).values())


def _worst_loss(scores: Mapping[str, Mapping[str, Score]], name: str, suite: SuiteConfig) -> float:
    kept = selection.retained_gains(scores, scores[name], suite)
    return max(suite.objectives[key].weight * (1 - share) for key, share in kept.items())


def _share_ahead(own: Floats, other: Floats) -> float:
    return float(np.mean(own < other) + np.mean(own == other) / 2)


def _comparisons(
    name: str,
    frames: Mapping[str, pd.DataFrame],
    scores: Mapping[str, Mapping[str, Score]],
    metrics: Sequence[Metric],
    noise: Mapping[str, float],
) -> list[Comparison]:
    experts = [other for other in scores if selection.is_expert(other)]
    found = []
    for metric in metrics:
        if metric.kind == "guard" or not experts:
            continue
        best = max(experts, key=lambda other: metric.sign * scores[other][metric.name].value)
        difference = Measurement(paired(frames[name], frames[best]), 0.0).scores()[metric.name]
        stderr = math.hypot(difference.stderr, math.sqrt(noise.get(metric.name, 0.0)))
        difference = replace(difference, stderr=stderr)
        own, base = scores[name][metric.name], scores[selection.BASE][metric.name]
        found.append(Comparison(metric, own, base, best, scores[best][metric.name], difference))
    return found


def _resampled_losses(
    frames: Mapping[str, pd.DataFrame],
    scores: Mapping[str, Mapping[str, Score]],
    suite: SuiteConfig,
) -> dict[str, Floats]:
    """Return each model's worst loss in every bootstrap resample: (N_RESAMPLES,).

    Items are drawn with replacement within each task, the same for all models. What a loss is
    measured by, the best expert's gain over the base, stays that of the whole sample.
    """
    names, items = list(frames), join_items(frames)
    rng = np.random.default_rng(0)
    worst = np.full((N_RESAMPLES, len(names)), -np.inf)
    for objective, config in suite.objectives.items():
        joined = items[objective]
        values = config.sign * bootstrap_scores(
            joined.scores, joined.tasks, n_resamples=N_RESAMPLES, seed=rng
        )  # (N_RESAMPLES, n_models)
        points = {name: config.sign * own[objective].value for name, own in scores.items()}
        base = points[selection.BASE]
        best = max((v for name, v in points.items() if selection.is_expert(name)), default=base)
        gain, goal = (best - base, best) if best > base else (1.0, base)
        worst = np.maximum(worst, config.weight * (goal - values) / gain)
    return {name: worst[:, column] for column, name in enumerate(names)}
