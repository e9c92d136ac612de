"""How the charts look: colours, marks, axes and theme.

Colours are Okabe & Ito's, which colour-blind readers can tell apart; marks differ in shape as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import altair as alt

from optimizer.report.data import Entry
from optimizer.selection import PLAUSIBLE, SOLID

Drawing = alt.LayerChart | alt.ConcatChart
ORANGE, BLUE, SKY, GREEN = "#D55E00", "#0072B2", "#56B4E9", "#009E73"
YELLOW, PINK, GREY, INK, WHITE = "#E69F00", "#CC79A7", "#A6A6A6", "#222222", "#FFFFFF"
LIGHT = "#CCCCCC"
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
EXPERTS = [BLUE, ORANGE, GREEN, PINK, SKY, YELLOW, GREY]  # colours of experts, in order
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


def themed(chart: Drawing) -> Drawing:
    """Give a finished chart the report's fonts, grid and legend."""
    styled: Drawing = (
        chart.configure(font="system-ui, 'Segoe UI', Helvetica, Arial, sans-serif")
        .configure_view(stroke=None)
        .configure_axis(
            gridColor="#ECECEC",
            domainColor="#999999",
            tickColor="#999999",
            labelFontSize=12,
            titleFontSize=13,
            titleFontWeight=500,
            titlePadding=10,
            labelColor="#444444",
            titleColor=INK,
        )
        .configure_legend(
            orient="top",
            title=None,
            labelFontSize=12,
            labelLimit=260,
            columns=2,
            columnPadding=14,
            symbolSize=150,
            symbolStrokeWidth=1.5,
        )
        .configure_title(fontSize=14, fontWeight=600, anchor="start")
    )
    return styled
