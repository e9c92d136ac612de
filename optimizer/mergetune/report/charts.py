"""The main charts: the trade-off between objectives, or a single objective over time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt
import pandas as pd

from mergetune.report.data import Entry, ReportData
from mergetune.report.labels import Label, place_labels
from mergetune.report.metric import Metric
from mergetune.report.style import BROKEN, BROKEN_BASELINE, MARKS, OTHER, RECOMMENDED, Axis, mark_of
from mergetune.theme import BLUE, GREY, INK, WHITE


def canvas(data: ReportData) -> tuple[int, int]:
    """Return width and height of a main chart, in pixels; on the page, it takes the width there is."""
    return (760, 440) if len(data.objectives) <= 2 else (420, 380)


def main_charts(data: ReportData) -> list[alt.LayerChart]:
    """Draw the trade-off: a chart per pair of objectives; of a single one, its score over time."""
    if not data.entries:
        return []
    objectives = data.objectives
    if len(objectives) == 1:
        return [score_over_time(data)]
    pairs = [(x, y) for i, x in enumerate(objectives) for y in objectives[i + 1 :]]
    return [trade_off(data, x, y) for x, y in pairs]


def trade_off(data: ReportData, x: Metric, y: Metric) -> alt.LayerChart:
    """Draw all candidates in two objectives; better is always up and to the right."""
    frame = points(data)
    across, up = _axis(frame, data, x), _axis(frame, data, y)
    bars = [_error_bars(frame, across, up, of) for of in ("x", "y")]
    # With more objectives, the front is no staircase in any two of them.
    front = data.front if len(data.objectives) == 2 else ()
    corners = [(entry.search[x.name].value, entry.search[y.name].value) for entry in front]
    labels = _labels(frame, across, up, corners, canvas(data))
    return alt.LayerChart(
        layer=[*_steps(corners, across, up), *bars, _marks(frame, data, across, up), *labels]
    )


def score_over_time(data: ReportData) -> alt.LayerChart:
    """Draw the single objective in the order measured, and the best one so far."""
    frame = points(data)
    metric = data.objectives[0]
    across = Axis("order", "candidate, in the order measured", "d", (0, len(frame) + 1))
    up = _axis(frame, data, metric)
    kept = frame[frame["feasible"]].sort_values("order")
    best = kept[up.column].cummax() if metric.sign > 0 else kept[up.column].cummin()
    corners = list(zip(kept["order"], best, strict=True))[::-1]  # from right to left: down, across
    bars = _error_bars(frame, across, up, "y")
    labels = _labels(frame, across, up, corners, canvas(data))
    return alt.LayerChart(
        layer=[*_steps(corners, across, up), bars, _marks(frame, data, across, up), *labels]
    )


def parallel_coordinates(data: ReportData) -> alt.LayerChart:
    """Draw each candidate as a line over all objectives, from the worst measured to the best."""
    frame = points(data)
    names = [metric.name for metric in data.objectives]
    for metric in data.objectives:
        signed = metric.sign * frame[_column(data, metric)]
        spread = signed.max() - signed.min()
        frame[metric.name] = (signed - signed.min()) / (spread or 1.0)
    others = [column for column in frame.columns if column not in names]
    long = frame.melt(id_vars=others, value_vars=names, var_name="objective", value_name="share")
    shown = [mark for mark in MARKS if mark.label in set(frame["mark"])]
    colours = [GREY if mark in (BROKEN, BROKEN_BASELINE) else mark.stroke for mark in shown]
    lines = [
        alt.Chart(long[long["mark"] == mark.label])
        .mark_line(
            point=mark.width > 1,
            strokeWidth=mark.width,
            strokeDash=[3, 3] if mark.fill == WHITE else [1, 0],
            opacity=0.5 if mark.width == 1 else 1.0,
        )
        .encode(
            x=alt.X("objective:N", sort=names, title=None, axis=alt.Axis(labelAngle=0)),
            y=alt.Y("share:Q", title="worst measured → best measured", axis=alt.Axis(format="%")),
            color=alt.Color(
                "mark:N",
                title=None,
                scale=alt.Scale(domain=[m.label for m in shown], range=colours),
                legend=alt.Legend(symbolType="stroke", symbolStrokeWidth=3, symbolOpacity=1),
            ),
            detail="name:N",
            tooltip=_tooltip(data),
        )
        for mark in shown
    ]
    return alt.LayerChart(layer=[*lines])


def points(data: ReportData) -> pd.DataFrame:
    """Return a row per candidate: its place in every objective ±1 standard error, and its tooltip."""
    rows = [_point(data, entry, order) for order, entry in enumerate(data.entries, start=1)]
    rank = {mark.label: i for i, mark in enumerate(MARKS)}
    return pd.DataFrame(rows).sort_values("mark", key=lambda m: m.map(rank), kind="stable")


def _point(data: ReportData, entry: Entry, order: int) -> dict[str, Any]:
    mark = mark_of(entry)
    named = {"base", "expert"} if len(data.objectives) > 2 else {"base", "expert", "average"}
    row: dict[str, Any] = {
        "name": entry.name,
        "order": order,
        "mark": mark.label,
        "size": mark.size,
        "strong": mark not in (OTHER, BROKEN),
        "named": entry.recommended or entry.role in named,
        "feasible": entry.feasible,
        "probability": entry.probability,
        "coefficients": "; ".join(entry.coefficients),
    }
    for i, metric in enumerate(data.metrics):
        score = entry.search[metric.name]
        row[f"m{i}"] = score.value
        row[f"m{i}_low"], row[f"m{i}_high"] = score.value - score.stderr, score.value + score.stderr
        row[f"m{i}_text"] = metric.text(score)
    return row


def _column(data: ReportData, metric: Metric) -> str:
    return f"m{data.metrics.index(metric)}"  # a metric's own name may hold dots, which Vega splits at


def _tooltip(data: ReportData) -> list[alt.Tooltip]:
    scores = [alt.Tooltip(f"{_column(data, metric)}_text:N", title=metric.name) for metric in data.metrics]
    chance = alt.Tooltip("probability:Q", title="p(front)", format=".0%")
    return [alt.Tooltip("name:N"), alt.Tooltip("mark:N"), chance, *scores, alt.Tooltip("coefficients:N")]


def _axis(frame: pd.DataFrame, data: ReportData, metric: Metric) -> Axis:
    column = _column(data, metric)
    strong = frame[frame["strong"]]
    low = min(frame[column].min(), strong[f"{column}_low"].min())
    high = max(frame[column].max(), strong[f"{column}_high"].max())
    pad = 0.06 * (high - low) or 0.05
    better = "higher is better" if metric.sign > 0 else "lower is better, axis reversed"
    return Axis(
        column,
        f"{metric.name} ({better})",
        ".0%" if metric.percent else ".3~f",
        (low - pad, high + pad),
        metric.sign < 0,
    )


def _marks(frame: pd.DataFrame, data: ReportData, across: Axis, up: Axis) -> alt.Chart:
    shown = [mark for mark in reversed(MARKS) if mark.label in set(frame["mark"])]
    domain = [mark.label for mark in shown]

    def scale(values: list[Any]) -> alt.Scale:
        return alt.Scale(domain=domain, range=values)

    marks: alt.Chart = (
        alt.Chart(frame)
        .mark_point(opacity=0.95, strokeWidth=1.5)
        .encode(
            x=across.x(),
            y=up.y(),
            fill=alt.Fill("mark:N", title=None, scale=scale([m.fill for m in shown])),
            stroke=alt.Stroke("mark:N", title=None, scale=scale([m.stroke for m in shown])),
            shape=alt.Shape("mark:N", title=None, scale=scale([m.shape for m in shown])),
            size=alt.Size("size:Q", scale=None, legend=None),
            tooltip=_tooltip(data),
        )
    )
    return marks


def _steps(corners: Sequence[tuple[float, float]], across: Axis, up: Axis) -> list[alt.Chart]:
    """Draw a step line through the corners, each step down (or up) first, then across."""
    if len(corners) < 2:
        return []
    frame = pd.DataFrame(corners, columns=[across.column, up.column])
    line = alt.Chart(frame.assign(rank=range(len(frame)))).mark_line(
        interpolate="step-before", color=BLUE, strokeWidth=1.5, opacity=0.6
    )
    return [line.encode(x=across.x(), y=up.y(), order="rank:Q")]


def _error_bars(frame: pd.DataFrame, across: Axis, up: Axis, of: str) -> alt.Chart:
    bars = alt.Chart(frame[frame["strong"]]).mark_rule(color="#777777", opacity=0.55)
    if of == "x":
        drawn: alt.Chart = bars.encode(x=across.x("_low"), x2=f"{across.column}_high", y=up.y())
    else:
        drawn = bars.encode(y=up.y("_low"), y2=f"{up.column}_high", x=across.x())
    return drawn


def _labels(
    frame: pd.DataFrame,
    across: Axis,
    up: Axis,
    line: Sequence[tuple[float, float]],
    size: tuple[int, int],
) -> list[alt.Chart]:
    """Write the names of the recommended merge and of the baselines, none over another or the line."""
    width, height = size

    def pixel(x: float, y: float) -> tuple[float, float]:
        return across.share(x) * width, (1 - up.share(y)) * height

    named = frame[frame["named"]].iloc[::-1]
    places = zip(named["name"], named[across.column], named[up.column], strict=True)
    labels = [Label(name, *pixel(x, y)) for name, x, y in places]
    marks = [pixel(x, y) for x, y in zip(frame[across.column], frame[up.column], strict=True)]
    spots = place_labels(labels, marks, [pixel(x, y) for x, y in line], size)
    layers = []
    for spot, row in zip(spots, named.to_dict("records"), strict=True):
        point = alt.Chart(pd.DataFrame([row])).encode(x=across.x(), y=up.y())
        if spot.is_far:
            leader = point.mark_rule(x2Offset=spot.dx, y2Offset=spot.dy, strokeWidth=0.7, color=INK)
            layers.append(leader.encode(x2=across.column, y2=up.column))
        style: dict[str, Any] = {
            "align": spot.align,
            "baseline": "middle",
            "dx": spot.dx,
            "dy": spot.dy,
            "fontSize": 12,
            "fontWeight": 700 if row["mark"] == RECOMMENDED.label else 400,
        }
        halo = point.mark_text(**style, stroke=WHITE, strokeWidth=3, strokeOpacity=0.8)
        text = point.mark_text(**style, color=INK)
        layers += [halo.encode(text="name:N"), text.encode(text="name:N")]
    return layers
