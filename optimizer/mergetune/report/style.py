"""How the report's charts look: marks, which differ in shape as well as in colour, and axes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import altair as alt

from mergetune.report.data import Entry
from mergetune.results.selection import PLAUSIBLE, SOLID
from mergetune.theme import BLUE, INK, LIGHT, ORANGE, WHITE

_STAR = (
    "M0,-1L0.225,-0.309L0.951,-0.309L0.363,0.118L0.588,0.809L0,0.382"
    "L-0.588,0.809L-0.363,0.118L-0.951,-0.309L-0.225,-0.309Z"
)


@dataclass(frozen=True)
class Mark:
    """How one kind of candidate is drawn; later ones lie on top."""

    label: str
    fill: str
    stroke: str
    shape: str
    size: int
    width: float  # of its line in parallel coordinates


BROKEN = Mark("merge, breaks a guard", WHITE, LIGHT, "circle", 55, 1.0)
OTHER = Mark("other merge", LIGHT, LIGHT, "circle", 55, 1.0)
BROKEN_BASELINE = Mark("baseline, breaks a guard", WHITE, INK, "diamond", 120, 1.5)
BASELINE = Mark("base, expert, average", INK, INK, "diamond", 120, 1.5)
FRONT = Mark("on the front (p ≥ 50%)", BLUE, BLUE, "circle", 80, 2.0)
PERHAPS = Mark("perhaps on the front (p ≥ 10%)", WHITE, BLUE, "circle", 80, 1.5)
RECOMMENDED = Mark("recommended", ORANGE, ORANGE, _STAR, 460, 4.0)
MARKS = (BROKEN, OTHER, BROKEN_BASELINE, BASELINE, PERHAPS, FRONT, RECOMMENDED)


@dataclass(frozen=True)
class Axis:
    """One axis of a scatter chart: a column of `points`, its title and its range of values."""

    column: str
    title: str
    format: str
    domain: tuple[float, float]
    reverse: bool = False

    def x(self, suffix: str = "") -> alt.X:
        """Return the axis as x, of the column itself or of that with the suffix."""
        return alt.X(**self._options(suffix))

    def y(self, suffix: str = "") -> alt.Y:
        """Return the axis as y, of the column itself or of that with the suffix."""
        return alt.Y(**self._options(suffix))

    def share(self, value: float) -> float:
        """Return where a value stands between the axis' lower (0) and upper (1) end."""
        low, high = self.domain
        share = (value - low) / (high - low)
        return 1 - share if self.reverse else share

    def _options(self, suffix: str) -> dict[str, Any]:
        """Return what `alt.X` and `alt.Y` take; the domain is fixed, so that labels can be placed."""
        return {
            "shorthand": self.column + suffix,
            "type": "quantitative",
            "title": self.title,
            "scale": alt.Scale(domain=list(self.domain), nice=False, zero=False, reverse=self.reverse),
            "axis": alt.Axis(format=self.format, tickCount=6),
        }


def mark_of(entry: Entry) -> Mark:
    """Return how a candidate is drawn."""
    if entry.recommended:
        return RECOMMENDED
    if entry.role != "merge":
        return BASELINE if entry.feasible else BROKEN_BASELINE
    if entry.probability >= PLAUSIBLE:
        return FRONT if entry.probability >= SOLID else PERHAPS
    return OTHER if entry.feasible else BROKEN
