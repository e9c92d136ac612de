"""The verdict of a regression gate: is a candidate worse than a baseline by more than the margins allow?

What is judged are rows: every objective and guard of the suite, and each task of a score that has several. A
row passes where the candidate is shown, at one-sided level α, to be worse by less than the margin. It fails
where it is shown, at level α / number of rows, to be worse by more. Else it is inconclusive.

The whole verdict:

- PASS when every objective and guard passes and no task fails. Each is tested at α without a correction: a
  candidate that breaks any one margin passes with probability α at most (intersection–union test; Berger
  1982). Inconclusive tasks do not block, for the few items of one task seldom tell.
- FAIL when any row fails: with the levels so divided (Bonferroni), a candidate that keeps every margin fails
  with probability α at most.
- INCONCLUSIVE else: the items cannot tell.

The interval shown has level 1 − 2α, and alone decides what passes. To fail at the divided level is harder: a
row whose interval lies just below −margin is inconclusive.

That a score improved is claimed where a one-sided test of "no better than the baseline", after Holm's
correction over all objectives and guards, rejects at α, and the interval lies above zero. One-sided, as the
claim has a direction and as every α here is. Tasks claim nothing.

With `levels`, of a gate that may stop early (see `sequential`), a score in `early` takes the bounds and the
verdict of its last look, and the others are tested at the `final` levels. Those levels are shared out over
objectives and guards: nothing is left for tasks, and a fixed-sample test of items whose number hung on their
results would be wrong. Such a check has no rows of tasks, and warns that it has not. An early look claims no
improvement, for that error would be spent twice.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import pandas as pd

from mergetune.errors import MergetuneError
from mergetune.evaluation.aggregations import linear_scores, not_means, parts_of, settled
from mergetune.evaluation.evaluate import ITEM_KEYS
from mergetune.evaluation.judging.agreement import Agreements, low_agreements
from mergetune.evaluation.missing_verdicts import missing_verdicts
from mergetune.evaluation.suite import GuardConfig, ObjectiveConfig, SuiteConfig
from mergetune.gate.pairs import pairs
from mergetune.gate.row import (
    Attribution,
    Kind,
    Row,
    SliceRow,
    Subject,
    attributed,
    looked_at,
    sliced,
    strata_of,
    tested,
    with_claims,
)
from mergetune.gate.words import summary_of
from mergetune.results.slices import slices_of
from mergetune.stats.paired import Verdict, noise_variance
from mergetune.stats.resampling import Floats, bootstrap_parts
from mergetune.stats.sequential import Levels, Look

EXIT: Mapping[Verdict, int] = MappingProxyType({"pass": 0, "fail": 1, "inconclusive": 2})


@dataclass(frozen=True)
class Flip:
    """An item whose score changed, and what both models said; `gain` is signed, greater is better.

    The reasons are what a judge wrote, empty where none did.
    """

    score_name: str
    task: str
    item: str
    prompt: str
    target: str
    candidate_response: str
    baseline_response: str
    candidate_reason: str
    baseline_reason: str
    candidate_score: float
    baseline_score: float
    gain: float


@dataclass(frozen=True)
class Saving:
    """How many of a suite's items were measured on the candidate before the gate stopped."""

    n_measured: int
    n_items: int


@dataclass(frozen=True)
class Check:
    """A gate's verdict with all that it stands on.

    Attributes:
        summary: the verdict in one sentence.
        rows: the objectives, then the guards, each followed by its tasks where it has several.
        slices: how both models differ on each of the suite's slices.
        attributions: by score, what quantizing changed; empty where the candidate's origin was not measured.
        flips: losses first, the largest first.
        noise: the standard deviation of the noise floor by score; None if it was not measured.
        candidate: how the candidate is called; so are `baseline` and `suite`.
        n_items: of the suite, as measured on the baseline.
        saving: None where the gate could not stop early.
        agreements: of the judges with people, as far as replies were judged for this check.
    """

    verdict: Verdict
    summary: str
    rows: tuple[Row, ...]
    slices: tuple[SliceRow, ...]
    attributions: tuple[Attribution, ...]
    flips: tuple[Flip, ...]
    noise: Mapping[str, float] | None
    candidate: str
    baseline: str
    suite: str
    alpha: float
    n_items: int
    warnings: tuple[str, ...]
    saving: Saving | None
    agreements: Agreements


def judge(
    candidate: pd.DataFrame,
    baseline: pd.DataFrame,
    items: pd.DataFrame,
    suite: SuiteConfig,
    *,
    suite_name: str,
    labels: tuple[str, str],
    repeat: pd.DataFrame | None = None,
    unquantized: pd.DataFrame | None = None,
    alpha: float = 0.05,
    warnings: Sequence[str] = (),
    agreements: Agreements = MappingProxyType({}),
    early: Mapping[str, Look] | None = None,
    levels: Levels | None = None,
) -> Check:
    """Judge a candidate against a baseline, measured on the same items of a suite.

    Args:
        candidate: a row per item: score_name, task, item, score, response and, where a judge gave it, reason.
        baseline: the same of the baseline.
        items: score_name, task, item, prompt and target of these items, and maybe of others.
        suite: directions and margins.
        suite_name: how the suite is called.
        labels: how the candidate and the baseline are called.
        repeat: a second measurement of the baseline (A/A), whose noise widens every interval.
        unquantized: the candidate before it was quantized.
        alpha: one-sided, ∈ (0, 0.5): the error of PASS, and that of FAIL.
        warnings: what else a reader must know.
        agreements: of the suite's judges with people.
        early: the last look at each score that was stopped before its last item; only such scores may have
            fewer items of the candidate than of the baseline.
        levels: what the looks were taken at, from `sequential.split_alpha`; None if none was taken.

    Raises:
        MergetuneError: the measurements are not of the same items, or not of this suite.
        ValueError: alpha is out of its range, or `early` stands without `levels`.
    """
    looks = early or {}
    if looks and levels is None:
        raise ValueError("`early` goes with the `levels` that the looks were taken at.")
    candidate, baseline = (_with_linear(frame) for frame in (candidate, baseline))
    joined = _joined(candidate, baseline, suite, looks)
    again = None
    if repeat is not None:
        again = _with_values(pairs(_with_linear(repeat), baseline, ("repeated baseline", "baseline"), ()))
    subjects = list(_subjects(joined, again, suite, with_tasks=levels is None))
    pass_alpha, fail_alpha = alpha, alpha / len(subjects)
    if levels is not None:
        pass_alpha, fail_alpha = levels.final_pass, levels.final_fail
    rows = with_claims(
        [
            looked_at(subject, looks[subject.name], levels)
            if levels is not None and subject.name in looks
            else tested(subject, pass_alpha, fail_alpha)
            for subject in subjects
        ],
        alpha,
    )
    noise = {own.name: math.sqrt(own.noise) for own in subjects if own.kind != "task"}
    verdict = whole_verdict(rows)
    return Check(
        verdict=verdict,
        summary=summary_of(verdict, rows, noise),
        rows=rows,
        slices=tuple(_slices(joined, again, items, suite, alpha)),
        attributions=tuple(
            _attributions(candidate, _with_linear(unquantized), baseline, again, suite, alpha)
            if unquantized is not None
            else ()
        ),
        flips=_flips(joined, items),
        noise=None if repeat is None else noise,
        candidate=labels[0],
        baseline=labels[1],
        suite=suite_name,
        alpha=alpha,
        n_items=len(baseline),
        warnings=(
            *warnings,
            *low_agreements(agreements),
            *missing_verdicts(zip(labels, (candidate, baseline), strict=True), lambda: items),
            *([] if levels is None else _only_by_mean(joined)),
        ),
        saving=None if levels is None else Saving(len(candidate), len(baseline)),
        agreements=dict(agreements),
    )


def whole_verdict(rows: Sequence[Row]) -> Verdict:
    """Return the verdict of a gate: the module's rules."""
    if any(row.verdict == "fail" for row in rows):
        return "fail"
    passed = all(row.verdict == "pass" for row in rows if row.kind != "task")
    return "pass" if passed else "inconclusive"


def _subjects(
    joined: pd.DataFrame, again: pd.DataFrame | None, suite: SuiteConfig, with_tasks: bool
) -> Iterator[Subject]:
    """Yield the objectives, then the guards, each followed by its tasks where it has several."""
    for name, config in suite.scores.items():
        own = joined[joined["score_name"] == name]
        twice = None if again is None else again[again["score_name"] == name]
        yield _subject(name, name, "objective" if name in suite.objectives else "guard", config, own, twice)
        tasks = own["task"].unique()
        for task in tasks if with_tasks and len(tasks) > 1 else ():
            same = None if twice is None else twice[twice["task"] == task]
            yield _subject(str(task), name, "task", config, own[own["task"] == task], same)


def _slices(
    joined: pd.DataFrame,
    again: pd.DataFrame | None,
    items: pd.DataFrame,
    suite: SuiteConfig,
    alpha: float,
) -> Iterator[SliceRow]:
    """Yield every score's row of every slice that has two items of it, for one has no spread."""
    for one in slices_of(items, suite.slices):
        own, twice = one.of(joined), None if again is None else one.of(again)
        for name, config in suite.scores.items():
            rows = own[own["score_name"] == name]
            if len(rows) < 2:
                continue
            same = None if twice is None else twice[twice["score_name"] == name]
            kind: Kind = "objective" if name in suite.objectives else "guard"
            yield sliced(_subject(name, name, kind, config, rows, same), one.key, one.value, alpha)


def _attributions(
    candidate: pd.DataFrame,
    unquantized: pd.DataFrame,
    baseline: pd.DataFrame,
    again: pd.DataFrame | None,
    suite: SuiteConfig,
    alpha: float,
) -> Iterator[Attribution]:
    """Yield what of each score's difference is quantizing's."""
    steps = (_joined(unquantized, baseline, suite, ()), _joined(candidate, unquantized, suite, ()))
    for name, config in suite.scores.items():
        kind: Kind = "objective" if name in suite.objectives else "guard"
        twice = None if again is None else again[again["score_name"] == name]
        before, own = (
            _subject(name, name, kind, config, step[step["score_name"] == name], twice) for step in steps
        )
        yield attributed(before, own, alpha)


def _subject(
    name: str,
    score_name: str,
    kind: Kind,
    config: ObjectiveConfig | GuardConfig,
    rows: pd.DataFrame,
    again: pd.DataFrame | None,
) -> Subject:
    noise = 0.0 if again is None else noise_variance(*_both(again), strata_of(again["task"].to_numpy()))
    return Subject(
        name,
        score_name,
        kind,
        config,
        rows["task"].to_numpy(),
        *_both(rows),
        noise,
        n_won=int((rows["gain"] > 0).sum()),
        n_lost=int((rows["gain"] < 0).sum()),
        resampled=_resampled(rows),
    )


def _with_linear(frame: pd.DataFrame) -> pd.DataFrame:
    """Add linear scores, and reasons where there are none."""
    return frame.assign(linear=linear_scores(frame)["score"], reason=frame.get("reason", ""))


def _with_values(joined: pd.DataFrame) -> pd.DataFrame:
    """Leave out the pairs of which a judge gave no verdict on one or both.

    Raises:
        MergetuneError: a task has no other.
    """
    found = joined.dropna(subset=["linear", "linear_baseline"])
    if lost := set(joined["task"]) - set(found["task"]):
        raise MergetuneError(
            f"A task needs items on which the judge gave a verdict for both models, but `{min(lost)}` has "
            "none. Give it more items, or measure again."
        )
    return found


def _both(rows: pd.DataFrame) -> tuple[Floats, Floats]:
    return rows["linear"].to_numpy(dtype=float), rows["linear_baseline"].to_numpy(dtype=float)


def _resampled(rows: pd.DataFrame) -> Floats | None:
    """Resample candidate − baseline, (n_resamples,), of a score that is no mean of items; else None."""
    if not not_means(rows):
        return None
    rng, differences = np.random.default_rng(0), []
    for _, own in rows.groupby("task", sort=False):
        aggregation = settled(pd.concat([own["aggregation"], own["aggregation_baseline"]]))
        scores = bootstrap_parts(parts_of(own, ("", "_baseline")), aggregation.combine, seed=rng)
        differences.append(scores[:, 0] - scores[:, 1])
    return np.asarray(np.mean(differences, axis=0))


def _joined(
    candidate: pd.DataFrame, baseline: pd.DataFrame, suite: SuiteConfig, early: Collection[str]
) -> pd.DataFrame:
    """Join the measurements of both models item by item; adds `gain`, greater is better."""
    signs = {name: config.sign for name, config in suite.scores.items()}
    joined = _with_values(pairs(candidate, baseline, ("candidate", "baseline"), early))
    measured = set(joined["score_name"])
    if measured != signs.keys():
        raise MergetuneError(
            f"The scores measured must be those of the suite, {', '.join(signs)}, but are "
            f"{', '.join(sorted(measured)) or 'none'}. Measure both models on this suite."
        )
    gain = joined["score_name"].map(signs) * (joined["score"] - joined["score_baseline"])
    return joined.assign(gain=gain)


def _flips(joined: pd.DataFrame, items: pd.DataFrame) -> tuple[Flip, ...]:
    changed = joined[joined["gain"].fillna(0) != 0]  # an item without a value is no change
    shown = changed.merge(
        items[[*ITEM_KEYS, "prompt", "target"]], on=ITEM_KEYS, how="left", validate="many_to_one"
    )
    if unknown := int(shown["prompt"].isna().sum()):
        raise MergetuneError(
            f"Every measured item must be one of the suite's, but {unknown} are not: the suite has changed "
            "since. Measure both models again."
        )
    flips = [
        Flip(
            score_name=str(row["score_name"]),
            task=str(row["task"]),
            item=str(row["item"]),
            prompt=str(row["prompt"]),
            target=str(row["target"]),
            candidate_response=str(row["response"]),
            baseline_response=str(row["response_baseline"]),
            candidate_reason=str(row["reason"]),
            baseline_reason=str(row["reason_baseline"]),
            candidate_score=float(row["score"]),
            baseline_score=float(row["score_baseline"]),
            gain=float(row["gain"]),
        )
        for row in shown.to_dict("records")
    ]
    return tuple(sorted(flips, key=lambda flip: (flip.gain > 0, -abs(flip.gain))))


def _only_by_mean(joined: pd.DataFrame) -> Iterator[str]:
    """Warn of tasks that a gate with early stops does not judge one by one."""
    n_tasks = joined.groupby("score_name", sort=False)["task"].nunique()
    if several := [str(name) for name in n_tasks.index[n_tasks > 1]]:
        yield (
            f"The tasks of {', '.join(several)} were judged by their mean only: one may be lost unseen. "
            "Check without early stops to judge each."
        )
