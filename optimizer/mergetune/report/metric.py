"""An objective or a guard as the report writes it: no score without its error."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from mergetune.evaluation.evaluate import Score
from mergetune.evaluation.suite import SuiteConfig
from mergetune.results.roles import BASE, reference_name
from mergetune.stats.number_text import number
from mergetune.stats.resampling import Interval


@dataclass(frozen=True)
class Metric:
    """An objective or a guard, and how its figures are written.

    `percent` writes 0.713 as 71.3%; `margin` and `reference` (a candidate's name) are a guard's.
    """

    name: str
    kind: Literal["objective", "guard"]
    sign: int
    percent: bool
    margin: float = 0.0
    reference: str = BASE

    def number(self, value: float) -> str:
        """Write a value alone, for axes and margins."""
        return f"{value:.1%}" if self.percent else number(value)

    def text(self, score: Score) -> str:
        """Write a score with its standard error, or with its count where all items agree.

        `71.3% ± 2.1`, but `100.0% (51 of 51)`: an error of 0 would say more than the items do.
        """
        if self._is_all_or_none(score):
            return f"{self.number(score.value)} ({score.value * score.n_items:.0f} of {score.n_items})"
        return f"{self.number(score.value)} ± {self._error(score)}"

    def interval(self, score: Score, resampled: Interval) -> Interval:
        """Return the interval of a score by resamples or, where all items agree, the exact one of a share.

        Resamples of 26 right answers are all 100%; by Clopper & Pearson (1934) it may be 86.8%.
        """
        if not self._is_all_or_none(score):
            return resampled
        room = 1 - ((1 - resampled.level) / 2) ** (1 / score.n_items)
        low, high = (1 - room, 1.0) if score.value else (0.0, room)
        return Interval(low, high, resampled.level)

    def change(self, difference: Score, is_paired: bool = True) -> str:
        """Write a difference of two scores with its standard error: `+2.1 ± 1.3 points`."""
        unit = " points" if self.percent else ""
        if is_paired and difference.value == 0 and _is_unanimous(difference):
            return f"{self.signed(0.0)}{unit} on all {difference.n_items} items"
        return f"{self.signed(difference.value)} ± {self._error(difference)}{unit}"

    def signed(self, difference: float) -> str:
        """Write a difference alone, with its sign: `+2.1`."""
        size = f"{100 * abs(difference):.1f}" if self.percent else number(abs(difference))
        return f"{'+' if difference >= 0 else '−'}{size}"

    def size(self, difference: float) -> str:
        """Write the size of a difference that has no error of its own, such as a margin."""
        return f"{100 * difference:.1f} points" if self.percent else number(difference)

    def _is_all_or_none(self, score: Score) -> bool:
        return self.percent and score.value in (0.0, 1.0) and _is_unanimous(score)

    def _error(self, score: Score) -> str:
        if score.n_items < 2 or not math.isfinite(score.stderr):
            return "?"  # one item has no spread, be it of all or of a task
        return f"{100 * score.stderr:.1f}" if self.percent else number(score.stderr)


def _is_unanimous(score: Score) -> bool:
    """Say whether all items agree."""
    return score.n_items > 1 and score.stderr == 0


def metrics_of(suite: SuiteConfig, measured: Iterable[Mapping[str, Score]]) -> tuple[Metric, ...]:
    """List the suite's objectives, then its guards; one is a percentage if all its scores are shares."""
    scores = list(measured)
    percent = {
        name: config.are_shares(own[name].value for own in scores) for name, config in suite.scores.items()
    }
    objectives = [
        Metric(name, "objective", config.sign, percent[name]) for name, config in suite.objectives.items()
    ]
    guards = [
        Metric(name, "guard", guard.sign, percent[name], guard.margin, reference_name(guard))
        for name, guard in suite.guards.items()
    ]
    return (*objectives, *guards)
