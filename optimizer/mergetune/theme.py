"""What all charts have in common: colours, fonts, grid and legend.

Colours are Okabe & Ito's, and those of what helps and harms ColorBrewer's PRGn: colour-blind readers can
tell them apart.
"""

from __future__ import annotations

import re

import altair as alt

Drawing = alt.LayerChart | alt.ConcatChart
ORANGE, BLUE, SKY, GREEN = "#D55E00", "#0072B2", "#56B4E9", "#009E73"
YELLOW, PINK, GREY, INK, WHITE = "#E69F00", "#CC79A7", "#A6A6A6", "#222222", "#FFFFFF"
LIGHT, PALE = "#CCCCCC", "#F1F1F1"
HELPS, HELPS_A_LITTLE = "#1B7837", "#D9F0D3"
HARMS, HARMS_A_LITTLE = "#762A83", "#E7D4E8"
EXPERTS = [BLUE, ORANGE, GREEN, PINK, SKY, YELLOW, GREY]  # colours of experts, in order

DARK = {  # what takes the place of a colour on a dark ground
    "white": "#15191d",
    WHITE: "#15191d",
    INK: "#e6eaee",
    "#444444": "#c5ccd3",
    "#777777": "#8d98a2",
    "#999999": "#7b8791",
    "#ECECEC": "#2b3238",
    LIGHT: "#4a545e",
    PALE: "#262c32",
    BLUE: "#4aa8e0",
    ORANGE: "#ff8030",
    HELPS: "#7fbf7b",
    HARMS: "#c9a0d6",
}


def darkened(drawing: str) -> str:
    """Return an SVG drawing with its colours for a dark ground."""

    def darker(found: re.Match[str]) -> str:
        return f'{found[1]}="{_DARK.get(found[2].lower(), found[2])}"'

    return re.sub(r'(fill|stroke)="([^"]+)"', darker, drawing)


def for_both(drawing: str) -> str:
    """Return an SVG drawing that shows itself light or dark, as its reader prefers."""
    rules = " ".join(
        f'[{what}="{light}" i] {{ {what}: {dark} }}'
        for light, dark in DARK.items()
        for what in ("fill", "stroke")
    )
    style = f"<style>@media screen and (prefers-color-scheme: dark) {{ {rules} }}</style>"
    end = drawing.index(">") + 1
    return f"{drawing[:end]}{style}{drawing[end:]}"


# Labels are measured in one font and shown in the reader's, which may be wider.
_PADDING = {"left": 24, "top": 5, "right": 12, "bottom": 5}
_DARK = {light.lower(): dark for light, dark in DARK.items()}


def themed(chart: Drawing) -> Drawing:
    """Give a finished chart its fonts, grid and legend."""
    styled: Drawing = (
        chart.configure(font="system-ui, 'Segoe UI', Helvetica, Arial, sans-serif", padding=_PADDING)
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
            labelColor=INK,
            labelLimit=260,
            columns=2,
            columnPadding=28,  # browsers write wider than is reckoned with
            symbolSize=150,
            symbolStrokeWidth=1.5,
        )
        .configure_title(fontSize=14, fontWeight=600, anchor="start", color=INK)
    )
    return styled
