"""The charts of how the search went: hypervolume, parameters, coefficients over depth, time."""

from __future__ import annotations

import altair as alt
import pandas as pd

from mergetune.report.data import ReportData
from mergetune.report.insights import coordinate_name
from mergetune.results.run_dir import Cost
from mergetune.theme import BLUE, EXPERTS, GREY, HARMS, HELPS, INK, ORANGE, YELLOW

_CLEAR_CORRELATION = 0.3
_N_PARAMETERS = 12
_LOST = "lost to failures"
_HEADROOM = 1.15  # above the highest line, where the chart's menu is


def hypervolume(data: ReportData) -> alt.LayerChart:
    """Draw how much the front covers after each candidate."""
    frame = pd.DataFrame(
        {
            "order": range(1, len(data.hypervolume) + 1),
            "volume": data.hypervolume,
            "name": [entry.name for entry in data.entries],
        }
    )
    encoded = alt.Chart(frame).encode(
        x=alt.X(
            "order:Q",
            title="candidates measured",
            axis=alt.Axis(format="d", tickMinStep=1, labelOverlap="greedy", labelSeparation=6),
            scale=alt.Scale(domain=[1, max(2, len(frame))], nice=False),
        ),
        y=alt.Y(
            "volume:Q",
            title="hypervolume over the base",
            scale=alt.Scale(domain=[0, _HEADROOM * (frame["volume"].max() or 1.0)], nice=True),
        ),
        tooltip=["name:N", alt.Tooltip("volume:Q", format=".3g")],
    )
    area = encoded.mark_area(interpolate="step-after", color=BLUE, opacity=0.12)
    line = encoded.mark_line(interpolate="step-after", color=BLUE, strokeWidth=2)
    return alt.LayerChart(layer=[area, line]).properties(height=220)


def importance(data: ReportData, objective: str) -> alt.LayerChart:
    """Draw how much each parameter explains, coloured by which way it works; one scale for all objectives."""
    most = max(one.share for every in data.influences.values() for one in every)
    found = sorted(data.influences[objective], key=lambda one: -one.share)[:_N_PARAMETERS]
    frame = pd.DataFrame(
        {
            "parameter": [coordinate_name(one.parameter, data.coordinates) for one in found],
            "share": [one.share for one in found],
            "correlation": [one.correlation for one in found],
            "effect": [_effect(one.correlation) for one in found],
        }
    )
    bars = (
        alt.Chart(frame)
        .mark_bar(height={"band": 0.7})
        .encode(
            x=alt.X(
                "share:Q",
                title="share of importance",
                axis=alt.Axis(format="%", tickCount=5),
                scale=alt.Scale(domain=[0, most], nice=True),
            ),
            y=alt.Y("parameter:N", title=None, sort="-x", axis=alt.Axis(labelLimit=240)),
            color=alt.Color(
                "effect:N",
                title=None,
                scale=alt.Scale(
                    domain=["more is better", "less is better", "no clear direction"],
                    range=[HELPS, HARMS, GREY],
                ),
                legend=alt.Legend(columns=2),
            ),
            tooltip=[
                "parameter:N",
                alt.Tooltip("share:Q", format=".1%"),
                alt.Tooltip("correlation:Q", title="rank correlation", format="+.2f"),
            ],
        )
    )
    return alt.LayerChart(layer=[bars]).properties(height=24 * len(found) + 10, title=objective)


def depth_panels(data: ReportData) -> list[alt.LayerChart]:
    """Draw each coefficient over the layers: a panel per parameter and part of a layer that differs."""
    inside = pd.DataFrame([vars(value) for value in data.depth if value.layer is not None])
    if inside.empty:
        return []
    keys = ["parameter", "part"]
    panels = []
    for (parameter, part), rows in inside.groupby(keys, sort=False):
        values = inside.loc[inside["parameter"] == parameter, "value"]
        domain = [min(0.0, values.min()), max(1.0, values.max())]
        experts = list(dict.fromkeys([*data.study.experts, *rows["expert"]]))
        panels.append(_depth_panel(rows, f"{parameter}: {part}", domain, experts))
    return panels


def changes(data: ReportData) -> list[alt.LayerChart]:
    """Draw what the recommended merge gains and loses, on all items and by slice: a chart per score."""
    found = []
    for one in data.verdict.comparisons:
        metric = one.metric
        rows = [("all items", one.difference)]
        rows += [(own.name, own.changes[metric.name]) for own in data.slices if metric.name in own.changes]
        scale = 100 if metric.percent else 1
        frame = pd.DataFrame(
            {
                "slice": name,
                "change": scale * change.value,
                "low": scale * (change.value - change.stderr),
                "high": scale * (change.value + change.stderr),
                "effect": "gained" if metric.sign * change.value >= 0 else "lost",
            }
            for name, change in rows[:_N_PARAMETERS]
        )
        found.append(_changes_chart(frame, f"{metric.name} against {one.against}", metric.percent))
    return found


def _changes_chart(frame: pd.DataFrame, title: str, percent: bool) -> alt.LayerChart:
    what = "points" if percent else "difference"
    rows = alt.Y("slice:N", title=None, sort=list(frame["slice"]), axis=alt.Axis(labelLimit=200))
    bars = (
        alt.Chart(frame)
        .mark_bar(height={"band": 0.6})
        .encode(
            x=alt.X("change:Q", title=f"{what}, ± one standard error", axis=alt.Axis(tickCount=5)),
            y=rows,
            color=alt.Color(
                "effect:N", title=None, scale=alt.Scale(domain=["gained", "lost"], range=[HELPS, HARMS])
            ),
        )
    )
    errors = alt.Chart(frame).mark_rule(color=INK, strokeWidth=1.5).encode(x="low:Q", x2="high:Q", y=rows)
    zero = alt.Chart(pd.DataFrame({"zero": [0.0]})).mark_rule(color=INK).encode(x="zero:Q")
    chart = alt.LayerChart(layer=[bars, errors, zero])
    return chart.properties(width=300, height=34 * len(frame) + 20, title=title)


def cost(data: ReportData) -> alt.LayerChart:
    """Draw each candidate's seconds of merging, loading and evaluation, and those lost to failures."""
    stages = {"merging": ORANGE, "loading": YELLOW, "evaluation": BLUE}
    if data.cost.lost_s:
        stages |= {_LOST: GREY}
    frame = pd.DataFrame(
        {"order": order, "name": entry.name, "stage": stage, "rank": rank, "seconds": seconds[stage]}
        for order, entry in enumerate(data.entries, start=1)
        for seconds in [_stage_seconds(entry.candidate.cost)]
        for rank, stage in enumerate(stages)
    )
    bars = (
        alt.Chart(frame)
        .mark_bar()
        .encode(
            x=alt.X(
                "order:O",
                title="candidate, in the order measured",
                axis=alt.Axis(labelOverlap="greedy", labelSeparation=6, labelAngle=0),
            ),
            y=alt.Y("seconds:Q", title="seconds"),
            color=alt.Color(
                "stage:N", title=None, scale=alt.Scale(domain=list(stages), range=list(stages.values()))
            ),
            order="rank:O",
            tooltip=["name:N", "stage:N", alt.Tooltip("seconds:Q", format=".1f")],
        )
    )
    return alt.LayerChart(layer=[bars]).properties(height=200)


def _stage_seconds(cost: Cost) -> dict[str, float]:
    return {
        "merging": cost.merge_s,
        "loading": cost.load_s,
        "evaluation": cost.evaluate_s,
        _LOST: cost.lost_s,
    }


def _effect(correlation: float) -> str:
    if abs(correlation) < _CLEAR_CORRELATION:
        return "no clear direction"
    return "more is better" if correlation > 0 else "less is better"


def _depth_panel(rows: pd.DataFrame, title: str, domain: list[float], experts: list[str]) -> alt.LayerChart:
    line = (
        alt.Chart(rows)
        .mark_line(interpolate="step", strokeWidth=2.5)
        .encode(
            x=alt.X(
                "layer:Q",
                title="layer",
                axis=alt.Axis(format="d", tickMinStep=1),
                scale=alt.Scale(domain=[0, max(1, int(rows["layer"].max()))], nice=False),
            ),
            y=alt.Y("value:Q", title=None, scale=alt.Scale(domain=domain, nice=True)),
            color=alt.Color(
                "expert:N",
                title=None,
                scale=alt.Scale(domain=experts, range=EXPERTS[: len(experts)]),
            ),
            tooltip=["expert:N", "layer:Q", alt.Tooltip("value:Q", format=".3f")],
        )
    )
    return alt.LayerChart(layer=[line]).properties(height=180, title=title)
