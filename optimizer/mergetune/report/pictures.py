"""Charts for slides, each as PNG, SVG and PDF, light and dark."""

from __future__ import annotations

from pathlib import Path

import altair as alt
import vl_convert

from mergetune.files.atomic_files import write_bytes, write_text
from mergetune.report import charts, study_charts
from mergetune.report.data import ReportData
from mergetune.theme import Drawing, darkened, themed

PICTURES = {
    "pareto": "the trade-off, two objectives at a time",
    "parallel": "all objectives side by side",
    "changes": "gains and losses by slice",
    "depth": "coefficients over depth",
}
_COLUMNS = 3  # of charts in a picture
_MOST_PANELS = 6
_PNG_SCALE = 2


def pictures(data: ReportData) -> dict[str, Drawing]:
    """Draw what there is to draw of `PICTURES`."""
    width, height = charts.canvas(data)
    found = {
        "pareto": [chart.properties(width=width, height=height) for chart in charts.main_charts(data)],
        "parallel": [charts.parallel_coordinates(data).properties(width=860, height=420)]
        if len(data.objectives) > 2 and data.entries
        else [],
        "changes": study_charts.changes(data),
        "depth": [
            panel.properties(width=300, height=220)
            for panel in study_charts.depth_panels(data)[:_MOST_PANELS]
        ],
    }
    return {
        name: own[0] if len(own) == 1 else alt.concat(*own, columns=_COLUMNS)
        for name, own in found.items()
        if own
    }


def write_pictures(data: ReportData, folder: Path) -> list[str]:
    """Write all pictures, the dark ones with `-dark` in their names; returns the names of `PICTURES`."""
    drawn = pictures(data)
    for name, chart in drawn.items():
        light = as_svg(chart)
        for suffix, drawing in (("", light), ("-dark", darkened(light))):
            write_text(folder / f"{name}{suffix}.svg", drawing)
            write_bytes(folder / f"{name}{suffix}.png", vl_convert.svg_to_png(drawing, scale=_PNG_SCALE))
            write_bytes(folder / f"{name}{suffix}.pdf", vl_convert.svg_to_pdf(drawing))
    return list(drawn)


def as_svg(chart: Drawing) -> str:
    """Return a picture as SVG."""
    spec = themed(chart.properties(background="white", padding=16)).to_dict()
    drawing: str = vl_convert.vegalite_to_svg(spec)
    return drawing
