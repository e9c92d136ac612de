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
        if self.percent and score.value in (0.0, 1.0) and score.is_unanimous:
            return f"{self.number(score.value)} ({score.value * score.n_items:.0f} of {score.n_items})"
        return f"{self.number(score.value)} ± {self._error(score)}"

    def change(self, difference: Score, is_paired: bool = True) -> str:
        """Write a difference of two scores with its standard error: `+2.1 ± 1.3 points`."""
        unit = " points" if self.percent else ""
        if is_paired and difference.value == 0 and difference.is_unanimous:
            return f"{self.signed(0.0)}{unit} on all {difference.n_items} items"
        return f"{self.signed(difference.value)} ± {self._error(difference)}{unit}"

    def signed(self, difference: float) -> str:
        """Write a difference alone, with its sign: `+2.1`."""
        size = f"{100 * abs(difference):.1f}" if self.percent else number(abs(difference))
        return f"{'+' if difference >= 0 else '−'}{size}"

    def size(self, difference: float) -> str:
        """Write the size of a difference that has no error of its own, such as a margin."""
        return f"{100 * difference:.1f} points" if self.percent else number(difference)

    def _error(self, score: Score) -> str:
        if score.n_items < 2 or not math.isfinite(score.stderr):
            return "?"  # one item has no spread, be it of all or of a task
        return f"{100 * score.stderr:.1f}" if self.percent else number(score.stderr)


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
