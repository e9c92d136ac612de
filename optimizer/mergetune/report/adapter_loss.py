"""What the recommended merge loses where it is served as an adapter of a reduced rank, item by item."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mergetune.evaluation.evaluate import Measurement, Score, paired
from mergetune.gate.row import strata_of
from mergetune.report.metric import Metric
from mergetune.results.run_dir import RunDir
from mergetune.stats.paired import non_inferiority
from mergetune.stats.resampling import Interval

_ALPHA = 0.025  # at each end: intervals of 95 %


@dataclass(frozen=True)
class AdapterLoss:
    """A score of adapter and full merge on the same items; adapter − merge, with its 95 % interval."""

    metric: Metric
    own: Score
    merge: Score
    difference: float
    interval: Interval

    @property
    def text(self) -> str:
        """The difference with its interval: `−1.2 [−3.0, +0.6] points`."""
        low, high = (self.metric.signed(end) for end in (self.interval.lower, self.interval.upper))
        unit = " points" if self.metric.percent else ""
        return f"{self.metric.signed(self.difference)} [{low}, {high}]{unit}"


def adapter_losses(
    run: RunDir, metrics: Sequence[Metric], noise: Mapping[str, float]
) -> tuple[AdapterLoss, ...]:
    """Compare the adapter of a run with its merge; empty where it was not measured.

    `noise` holds variances that two measurements of one model show, by score: they widen the intervals.
    """
    record, items = run.adapter(), run.adapter_items()
    if record is None or record.split is None or items is None:
        return ()
    full = run.measurement(record.of, record.split, responses=False)
    if full is None:
        return ()
    both, own, merge = paired(items, full), *(Measurement(each, 0.0).scores() for each in (items, full))
    found = []
    for metric in metrics:
        rows = both[both["score_name"] == metric.name]
        if rows.empty:
            continue
        test = non_inferiority(
            rows["own"].to_numpy(),
            rows["score_other"].to_numpy(),
            margin=0.0,
            strata=strata_of(rows["task"].to_numpy()),
            alpha=_ALPHA,
            noise=noise.get(metric.name, 0.0),
            score_range=1.0 if metric.percent else None,
        )
        name = metric.name
        found.append(AdapterLoss(metric, own[name], merge[name], test.estimate, test.interval))
    return tuple(found)
