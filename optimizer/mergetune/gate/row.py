"""One judged line of a gate: a score or one of its tasks, against its margin."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from mergetune.evaluation.suite import Direction, GuardConfig, ObjectiveConfig
from mergetune.stats.paired import (
    NonInferiority,
    Verdict,
    holm,
    mcnemar_midp,
    non_inferiority,
    paired_difference,
    widen,
)
from mergetune.stats.resampling import Floats, Interval, Labels, score_means
from mergetune.stats.sequential import Levels, Look

Kind = Literal["objective", "guard", "task"]


@dataclass(frozen=True)
class Row:
    """The verdict on an objective, a guard, or a task of a score that has several.

    Attributes:
        name: the score's or the task's name.
        candidate: the candidate's score, in the user's direction, as `baseline` is.
        difference: candidate − baseline, signed so that greater is better, as `interval` is.
        items_to_decide: how many items would decide if the true difference is the one seen; None where it is
            decided, or where no number would do.
        minimum_detectable_effect: the smallest margin at which an equal candidate passes with power 0.8 on
            these items; None of an early look.
        n_won: how many items got better, as `n_lost` got worse.
        improvement_p: one-sided p-value of "no better than the baseline", adjusted by Holm's method over
            objectives and guards; None of tasks and early looks, which claim nothing.
    """

    name: str
    score_name: str
    kind: Kind
    direction: Direction
    n_items: int
    candidate: float
    baseline: float
    difference: float
    interval: Interval
    margin: float
    verdict: Verdict
    method: Literal["tango", "bootstrap", "sequential"]
    items_to_decide: int | None
    minimum_detectable_effect: float | None
    n_won: int
    n_lost: int
    improvement_p: float | None
    improved: bool


@dataclass(frozen=True)
class Subject:
    """What becomes a row: the scores of both models, item by item, and the rule that they are judged by.

    Attributes:
        tasks: the task of each item, (n_items,).
        candidate: scores as they are, (n_items,), linear ones where the score is no mean (see
            `aggregations`); so are those of the `baseline`.
        noise: the variance of the noise floor.
        resampled: candidate − baseline in resamples of the items, (n_resamples,); None where the score is a
            mean.
        n_won: how many items got better, as `n_lost` got worse.
    """

    name: str
    score_name: str
    kind: Kind
    config: ObjectiveConfig | GuardConfig
    tasks: Labels
    candidate: Floats
    baseline: Floats
    noise: float
    n_won: int
    n_lost: int
    resampled: Floats | None = None

    @property
    def strata(self) -> Labels | None:
        """The task of each item, or None where there is only one task."""
        return strata_of(self.tasks)


def strata_of(tasks: Labels) -> Labels | None:
    """Return the task of each item, or None where there is only one task."""
    return tasks if len(set(tasks)) > 1 else None


def tested(subject: Subject, pass_alpha: float, fail_alpha: float) -> Row:
    """Judge a subject by the test of a fixed sample: only above −margin it can pass, only below it fail."""
    to_pass = _test(subject, pass_alpha)
    decisive = to_pass if to_pass.estimate > -to_pass.margin else _test(subject, fail_alpha)
    return Row(
        **_facts(subject),
        difference=to_pass.estimate,
        interval=to_pass.interval,
        verdict=decisive.verdict,
        method=to_pass.method,
        items_to_decide=decisive.items_to_decide,
        minimum_detectable_effect=to_pass.minimum_detectable_effect,
        improvement_p=None if subject.kind == "task" else _improvement_p(subject, to_pass),
    )


@dataclass(frozen=True)
class SliceRow:
    """How two models differ on one slice of one score's items; nothing is judged by it.

    `difference` is candidate − baseline, signed so that greater is better, as its `interval` is.
    """

    key: str
    value: str
    score_name: str
    n_items: int
    candidate: float
    baseline: float
    difference: float
    interval: Interval


def sliced(subject: Subject, key: str, value: str, alpha: float) -> SliceRow:
    """Compare two models on a slice, by the interval that a row of its size would have."""
    facts, test = _facts(subject), _test(subject, alpha)
    return SliceRow(
        key,
        value,
        subject.score_name,
        facts["n_items"],
        facts["candidate"],
        facts["baseline"],
        test.estimate,
        test.interval,
    )


@dataclass(frozen=True)
class Attribution:
    """What of a score's difference is quantizing's, and what was there before; nothing is judged by it.

    `before` is unquantized − baseline and `quantizing` is candidate − unquantized, signed so that greater is
    better, as their intervals are.
    """

    score_name: str
    n_items: int
    candidate: float
    unquantized: float
    baseline: float
    before: float
    before_interval: Interval
    quantizing: float
    quantizing_interval: Interval


def attributed(before: Subject, quantizing: Subject, alpha: float) -> Attribution:
    """Split a difference by a model on the way: `before` is its subject, `quantizing` the candidate's."""
    facts, steps = _facts(quantizing), (_test(before, alpha), _test(quantizing, alpha))
    return Attribution(
        quantizing.score_name,
        facts["n_items"],
        facts["candidate"],
        facts["baseline"],
        _facts(before)["baseline"],
        steps[0].estimate,
        steps[0].interval,
        steps[1].estimate,
        steps[1].interval,
    )


def looked_at(subject: Subject, look: Look, levels: Levels) -> Row:
    """Take over an early look; noise may take its verdict back."""
    # Both bounds hold at `early_pass`; the upper one even at the stricter `early_fail`.
    bounds = Interval(look.lower, look.upper, 1 - 2 * levels.early_pass)
    bounds, margin = widen(bounds, look.estimate, subject.noise), subject.config.margin
    verdict: Verdict = "inconclusive"
    if look.verdict == "pass" and bounds.lower > -margin:
        verdict = "pass"
    elif look.verdict == "fail" and bounds.upper < -margin:
        verdict = "fail"
    return Row(
        **_facts(subject),
        difference=look.estimate,
        interval=bounds,
        verdict=verdict,
        method="sequential",
        items_to_decide=None,
        minimum_detectable_effect=None,
        improvement_p=None,
    )


def with_claims(rows: Sequence[Row], alpha: float) -> tuple[Row, ...]:
    """Adjust the p-values by Holm's method over all scores, and say which scores improved."""
    scores = [row for row in rows if row.kind != "task"]
    raw = [1.0 if row.improvement_p is None else row.improvement_p for row in scores]
    adjusted = {row.name: float(p) for row, p in zip(scores, holm(raw), strict=True)}
    claims = []
    for row in rows:
        p_value = None if row.improvement_p is None else adjusted[row.name]
        improved = p_value is not None and p_value < alpha and row.interval.lower > 0
        claims.append(replace(row, improvement_p=p_value, improved=improved))
    return tuple(claims)


def _facts(subject: Subject) -> dict[str, Any]:
    """Return what a row says whatever it is tested by."""
    both = np.column_stack([subject.candidate, subject.baseline])
    candidate, baseline = score_means(both, subject.strata).tolist()
    return {
        "name": subject.name,
        "score_name": subject.score_name,
        "kind": subject.kind,
        "direction": subject.config.better,
        "n_items": len(subject.candidate),
        "candidate": candidate,
        "baseline": baseline,
        "margin": subject.config.margin,
        "n_won": subject.n_won,
        "n_lost": subject.n_lost,
        "improved": False,
    }


def _test(subject: Subject, alpha: float) -> NonInferiority:
    both = np.concatenate([subject.candidate, subject.baseline])
    is_share = bool(((both >= 0) & (both <= 1)).all())
    return non_inferiority(
        subject.config.sign * subject.candidate,
        subject.config.sign * subject.baseline,
        subject.config.margin,
        subject.strata,
        alpha=alpha,
        noise=subject.noise,
        score_range=1.0 if is_share else None,
        resampled=None if subject.resampled is None else subject.config.sign * subject.resampled,
    )


def _improvement_p(subject: Subject, test: NonInferiority) -> float:
    """Return the one-sided p-value: McNemar's of plain binary scores, else that of the paired t test.

    McNemar's test knows neither of tasks, whose sizes differ, nor of noise.
    """
    scores = subject.config.sign * subject.candidate, subject.config.sign * subject.baseline
    if test.method == "tango" and subject.strata is None and subject.noise == 0:
        two_sided = mcnemar_midp(*scores)
    else:
        mean = paired_difference(*scores, subject.strata)
        stderr = math.hypot(mean.stderr, math.sqrt(subject.noise))
        two_sided = replace(mean, stderr=stderr).p_value
    return two_sided / 2 if test.estimate > 0 else 1 - two_sided / 2
