"""What the recommended merge loses in another form, and what merging lost before, item by item."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from mergetune.evaluation.evaluate import Measurement, Score, paired
from mergetune.gate.row import strata_of
from mergetune.report.metric import Metric
from mergetune.results.roles import is_expert
from mergetune.results.run_dir import Form, RunDir
from mergetune.stats.paired import non_inferiority
from mergetune.stats.resampling import Interval

_ALPHA = 0.025  # at each end: intervals of 95 %


@dataclass(frozen=True)
class Loss:
    """A score of a model and of another on the same items; own − other, with its 95 % interval.

    `against` is the other's name.
    """

    metric: Metric
    against: str
    own: Score
    other: Score
    difference: float
    interval: Interval

    @property
    def text(self) -> str:
        """The difference with its interval: `−1.2 [−3.0, +0.6] points`."""
        low, high = (self.metric.signed(end) for end in (self.interval.lower, self.interval.upper))
        unit = " points" if self.metric.percent else ""
        return f"{self.metric.signed(self.difference)} [{low}, {high}]{unit}"


def form_losses(
    run: RunDir, form: Form, metrics: Sequence[Metric], noise: Mapping[str, float]
) -> tuple[Loss, ...]:
    """Compare the recommended merge in another form with the merge itself; empty where it was not measured.

    `noise` holds variances that two measurements of one model show, by score: they widen the intervals.
    """
    record, items = run.form(form), run.form_items(form)
    if record is None or record.split is None or items is None:
        return ()
    merge = run.measurement(record.of, record.split, responses=False)
    if merge is None:
        return ()
    found = (_loss(metric, record.of, items, merge, noise) for metric in metrics)
    return tuple(loss for loss in found if loss is not None)


def merging_losses(
    run: RunDir, form: Form, metrics: Sequence[Metric], noise: Mapping[str, float]
) -> tuple[Loss, ...]:
    """Compare the merge that a form was made of with what one had before: see `best_or_reference`.

    On the items that the form was measured on; empty where it was not.
    """
    record = run.form(form)
    if record is None or record.split is None:
        return ()
    scores = run.all_scores(record.split)
    merge = run.measurement(record.of, record.split, responses=False)
    found = []
    for metric in metrics if merge is not None else ():
        against = best_or_reference(metric, scores)
        other = run.measurement(against, record.split, responses=False) if against else None
        if against is not None and merge is not None and other is not None:
            found.append(_loss(metric, against, merge, other, noise))
    return tuple(loss for loss in found if loss is not None)


def best_or_reference(metric: Metric, scores: Mapping[str, Mapping[str, Score]]) -> str | None:
    """Return what a merge is compared with: the best expert at an objective, a guard's reference.

    None where no expert was measured; `scores` are by model and score.
    """
    experts = [name for name in scores if is_expert(name)]
    if not experts:
        return None
    if metric.kind == "guard":
        return metric.reference
    return max(experts, key=lambda name: metric.sign * scores[name][metric.name].value)


def _loss(
    metric: Metric, against: str, first: pd.DataFrame, second: pd.DataFrame, noise: Mapping[str, float]
) -> Loss | None:
    """Compare two measurements by one score; None where they have no item of it."""
    own, other = (frame[frame["score_name"] == metric.name] for frame in (first, second))
    rows = paired(own, other)
    if rows.empty:
        return None
    test = non_inferiority(
        rows["own"].to_numpy(),
        rows["score_other"].to_numpy(),
        margin=0.0,
        strata=strata_of(rows["task"].to_numpy()),
        alpha=_ALPHA,
        noise=noise.get(metric.name, 0.0),
        score_range=1.0 if metric.percent else None,
    )
    mine, theirs = (Measurement(frame, 0.0).scores()[metric.name] for frame in (own, other))
    return Loss(metric, against, mine, theirs, test.estimate, test.interval)
