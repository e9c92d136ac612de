"""The verdict: does the recommended merge beat what one has without a search, and how surely?"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pandas as pd

from mergetune.evaluation.evaluate import ITEM_KEYS, Measurement, Score, paired
from mergetune.evaluation.suite import Split, SuiteConfig
from mergetune.report.losses import best_or_reference
from mergetune.report.metric import Metric
from mergetune.results import roles, selection
from mergetune.results.selection import Recommendation, Scales
from mergetune.stats.gains import Gain
from mergetune.stats.number_text import listed
from mergetune.stats.resampling import Floats, ItemScores, bootstrap_scores, join_items

N_RESAMPLES = 2000
CLEAR = 0.95  # share of the resamples in which one must be ahead to be called clearly better


@dataclass(frozen=True)
class Comparison:
    """The recommended merge against an objective's best expert or a guard's reference, paired by item."""

    metric: Metric
    own: Score
    base: Score
    against: str
    other: Score
    difference: Score
    is_broken: bool  # a guard

    @property
    def falls_short(self) -> bool:
        """Say whether the merge is worse by more than a standard error."""
        return self.metric.sign * self.difference.value < -self.difference.stderr


@dataclass(frozen=True)
class Rival:
    """A model one has without a search, its worst loss, and how often the merge is ahead of it."""

    name: str
    worst_loss: float
    ahead: float  # share of the resamples


@dataclass(frozen=True)
class Summary:
    """The answer in words, and the figures behind it, on the split named."""

    level: Literal["good", "mixed", "none"]
    headline: str
    sentences: tuple[str, ...]
    split: Split
    worst_loss: float | None = None
    rivals: tuple[Rival, ...] = ()
    comparisons: tuple[Comparison, ...] = ()


def difference(
    first: pd.DataFrame, second: pd.DataFrame, metric: Metric, noise: Mapping[str, float]
) -> Score:
    """Return the difference first − second of one score, paired by item.

    `noise` holds variances that two measurements of one model show, by score: they widen the error.
    """
    own, other = (frame[frame["score_name"] == metric.name] for frame in (first, second))
    found = Measurement(paired(own, other)[[*ITEM_KEYS, "score"]], 0.0).scores()[metric.name]
    return replace(found, stderr=math.hypot(found.stderr, math.sqrt(noise.get(metric.name, 0.0))))


def summarize(
    chosen: Recommendation | None,
    frames: Mapping[str, pd.DataFrame],
    metrics: Sequence[Metric],
    suite: SuiteConfig,
    split: Split,
    averages: Collection[str],
    noise: Mapping[str, float] | None = None,
) -> Summary:
    """Judge the recommended merge on the models measured on `split`.

    Args:
        chosen: what `selection.recommend` said.
        frames: per-item scores of the recommended merge, the base, the experts and what is in
            `averages`, by candidate name.
        metrics: the suite's objectives and guards.
        suite: the suite's file.
        split: where `frames` were measured.
        averages: the names of the averages, the soups and the usual defaults, measured on this
            split or not.
        noise: see `difference`.
    """
    if chosen is None:
        return Summary("mixed", "No merge has been measured yet.", (), split)
    scores = {name: Measurement(frame, 0.0).scores() for name, frame in frames.items()}
    items = join_items(frames)
    scales = Scales.of(items, scores, suite)
    losses = _resampled_losses(items, selection.gains_over_base(scores, suite, scales), suite)
    point = {name: _worst_loss(scores, name, suite, scales) for name in scores}
    broken = {name: _broken_guards(scores, name, suite) for name in scores}
    rivals = [
        Rival(name, point[name], _share_ahead(losses[chosen.name], losses[name]))
        for name in scores
        if name != chosen.name and not broken[name]
    ]
    where = "on the held-out items" if split == "holdout" else "on the search split"
    level, headline, found = _words(chosen, point[chosen.name], rivals, scores, averages)
    compared = tuple(_comparisons(chosen.name, frames, scores, metrics, noise or {}, broken[chosen.name]))
    if level == "good" and len(suite.objectives) > 1:
        headline = f"As one model for all objectives, {headline.rstrip('.')}{_price(compared)}."
    if chosen.keeps_guards and broken[chosen.name]:
        level = "mixed" if level == "good" else level
        headline = f"{headline.rstrip('.')}, but {where} it breaks {_listed(broken[chosen.name])}."
    kept = selection.kept_words(scores, chosen.name, suite, scales)
    sentences = [
        f"{where.capitalize()} {kept}: its worst loss is {point[chosen.name]:.0%}.",
        *found,
        *_left_out([name for name, guards in broken.items() if guards and name != chosen.name], where),
    ]
    return Summary(
        level,
        headline,
        tuple(sentences),
        split,
        point[chosen.name],
        tuple(rivals),
        compared,
    )


def _words(
    chosen: Recommendation,
    own: float,
    rivals: Sequence[Rival],
    measured: Collection[str],
    averages: Collection[str],
) -> tuple[Literal["good", "mixed", "none"], str, list[str]]:
    """Choose the headline and the sentences of the figures behind it.

    What the headline says of others rests on `rivals`: `measured` on this split, and keeping every guard.
    """
    if not chosen.keeps_guards:
        return "none", "No merge keeps every guard on the search split.", []
    expert = _best([rival for rival in rivals if rival.name not in averages])
    average = _best([rival for rival in rivals if rival.name in averages])
    if expert and expert.worst_loss <= own:
        whose = "the base model" if expert.name == roles.BASE else "your experts"
        return (
            "none",
            f"`{chosen.name}`, the best merge of the search, does not beat {whose}.",
            [
                f"Deploy `{expert.name}`: its worst loss is {expert.worst_loss:.0%}; the merge is ahead "
                f"of it in {expert.ahead:.0%} of {N_RESAMPLES:,} resamples of the items.",
                "A merge cannot know what no expert knows: for more, train again.",
            ],
        )
    ahead = [rival for rival in (expert, average) if rival]
    figures = [_standing(ahead)] if ahead else []
    if chosen.name in averages:
        return "mixed", f"The search found no merge better than {_title(chosen.name)}.", figures
    if average and average.worst_loss <= own:
        return (
            "mixed",
            f"`{chosen.name}`, the best merge of the search, does not beat {_title(average.name)}.",
            figures,
        )
    if unclear := [rival.name for rival in ahead if rival.ahead < CLEAR]:
        names = " or ".join(f"`{name}`" for name in unclear)
        return "mixed", f"`{chosen.name}` is ahead, but not clearly: {names} may be as good.", figures
    return "good", f"`{chosen.name}` beats {_beaten(rivals, measured, averages)}.", figures


def _price(compared: Sequence[Comparison]) -> str:
    """Say what the merge has less than the best expert at an objective, beyond a standard error."""
    lost = [
        f"{one.metric.size(abs(one.difference.value))} of `{one.metric.name}`"
        for one in compared
        if one.metric.kind == "objective" and one.falls_short
    ]
    return f", at the price of {' and '.join(lost)} against the best expert at it" if lost else ""


def _beaten(rivals: Sequence[Rival], measured: Collection[str], averages: Collection[str]) -> str:
    """Name the rivals kind by kind; those of which some were not measured on this split one by one."""
    by_kind: dict[str, list[str]] = {}
    for name in [*filter(roles.is_expert, measured), *averages]:
        by_kind.setdefault(_kind(name), []).append(name)
    kept, found = {rival.name for rival in rivals}, []
    for kind, names in by_kind.items():
        own = [name for name in names if name in kept]
        if len(names) > 1 and set(names) <= kept:
            found.append(f"every {kind}")
        elif own and len(names) > 1 and set(names) <= set(measured):
            found.append(f"every {kind} that keeps the guards")
        elif own:
            found.append(f"the {kind}{'s' if len(own) > 1 else ''} {_listed(own)}")
    return " and ".join(found) or "the base model"


def _left_out(names: Sequence[str], where: str) -> list[str]:
    if not names:
        return []
    are, they = ("is", "it breaks") if len(names) == 1 else ("are", "they break")
    return [f"{_listed(names)} {are} left out of the comparison: {where} {they} a guard."]


def _kind(name: str) -> str:
    role = roles.role_of(name)
    return "usual default" if role == "default" else role


def _title(average: str) -> str:
    return f"the {_kind(average)} `{average}`"


def _listed(names: Sequence[str]) -> str:
    return listed([f"`{name}`" for name in names])


def _standing(rivals: Sequence[Rival]) -> str:
    losses = ", ".join(f"that of `{rival.name}` is {rival.worst_loss:.0%}" for rival in rivals)
    ahead = ", of ".join(f"`{rival.name}` in {rival.ahead:.1%}" for rival in rivals)
    text = f"{losses}. In {N_RESAMPLES:,} resamples of the items it is ahead of {ahead}."
    return text[0].upper() + text[1:]


def _best(rivals: Sequence[Rival]) -> Rival | None:
    return min(rivals, key=lambda rival: rival.worst_loss, default=None)


def _broken_guards(
    scores: Mapping[str, Mapping[str, Score]], name: str, suite: SuiteConfig
) -> tuple[str, ...]:
    violations = selection.guard_violations(scores[name], scores, suite)
    return tuple(guard for guard, excess in violations.items() if excess > 0)


def _worst_loss(
    scores: Mapping[str, Mapping[str, Score]], name: str, suite: SuiteConfig, scales: Scales
) -> float:
    kept = selection.retained_gains(scores, scores[name], suite, scales)
    return max(suite.objectives[key].weight * (1 - share) for key, share in kept.items())


def _share_ahead(own: Floats, other: Floats) -> float:
    return float(np.mean(own < other) + np.mean(own == other) / 2)


def _comparisons(
    name: str,
    frames: Mapping[str, pd.DataFrame],
    scores: Mapping[str, Mapping[str, Score]],
    metrics: Sequence[Metric],
    noise: Mapping[str, float],
    broken: Collection[str],
) -> list[Comparison]:
    found = []
    for metric in metrics:
        against = best_or_reference(metric, scores)
        if against is None:
            continue
        change = difference(frames[name], frames[against], metric, noise)
        own, base, other = (scores[each][metric.name] for each in (name, roles.BASE, against))
        found.append(Comparison(metric, own, base, against, other, change, metric.name in broken))
    return found


def _resampled_losses(
    items: Mapping[str, ItemScores], gains: Mapping[str, Gain], suite: SuiteConfig
) -> dict[str, Floats]:
    """Return each model's worst loss in every bootstrap resample: (N_RESAMPLES,).

    Items are drawn with replacement within each task, the same for all models. What a loss is
    measured by, the best expert's gain over the base, stays that of the whole sample.
    """
    names = next(iter(items.values())).names
    rng = np.random.default_rng(0)
    worst = np.full((N_RESAMPLES, len(names)), -np.inf)
    for objective, config in suite.objectives.items():
        joined = items[objective]
        values = config.sign * bootstrap_scores(
            joined.scores, joined.tasks, n_resamples=N_RESAMPLES, seed=rng
        )  # (N_RESAMPLES, n_models)
        worst = np.maximum(worst, config.weight * gains[objective].loss(values))
    return {name: worst[:, column] for column, name in enumerate(names)}
