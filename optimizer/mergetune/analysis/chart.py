"""The chart of `mergetune inspect`: lengths, cosines and sign conflicts over the layer groups."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any, Literal, cast

import altair as alt
import pandas as pd

from mergetune.analysis.advice import Advice
from mergetune.analysis.conflict_words import TITLES
from mergetune.analysis.conflicts import layer_gains
from mergetune.analysis.heat_maps import heat_maps
from mergetune.analysis.task_vectors import PartStatistics, TaskVectorStatistics
from mergetune.errors import MergetuneError
from mergetune.theme import EXPERTS, INK, ORANGE, SKY, WHITE, themed

Format = Literal["svg", "png", "html"]
_OPTIONS: dict[Format, dict[str, Any]] = {"svg": {}, "png": {"scale_factor": 2}, "html": {"inline": True}}
_WIDTH = 680
_MARGIN = 60  # of a heat map, for the names of its layers
_MOST_LABELLED = 14  # columns; where there are more, cells are too narrow for their figures


def check_chart_path(path: Path) -> None:
    """Raise `MergetuneError` if no chart can be written to this path."""
    if _format(path) not in _OPTIONS:
        raise MergetuneError(
            f"{path}: a chart's file must end in .svg, .png or .html, but got `{path.name}`. "
            f"Give for example `{path.with_suffix('.svg').name}`."
        )
    if not path.parent.is_dir():
        raise MergetuneError(f"{path}: the chart's folder must exist, but {path.parent} does not. Make it.")


def write_chart(
    statistics: TaskVectorStatistics,
    verdict: Advice,
    path: Path,
    sensitivity: pd.DataFrame | None = None,
) -> None:
    """Write the chart as SVG, PNG or an HTML page that opens offline, by the suffix of `path`."""
    chart = themed(draw(statistics, verdict, sensitivity).properties(background="white", padding=16))
    chart.save(str(path), format=_format(path), **_OPTIONS[_format(path)])


def draw(
    statistics: TaskVectorStatistics, verdict: Advice, sensitivity: pd.DataFrame | None = None
) -> alt.ConcatChart:
    """Draw lengths as bars and, below them, a row of cells per pair, in the order of the groups.

    Where sensitivity was measured, a row of heat maps follows for each point.
    """
    parts = (*statistics.groups, statistics.whole)
    panels: list[Any] = [_lengths(vector_frame(parts))]
    if statistics.whole.pairs:
        frame = pair_frame(parts)
        cosine = "Cosine: −1 against each other (orange), 0 unrelated, 1 the same way (blue)"
        conflict = "Sign conflict weighted by magnitude: unrelated task vectors have 50%"
        panels += [
            _cells(frame, "cosine", cosine, ".2f", [ORANGE, WHITE, SKY], [-0.5, 0.0, 0.5]),
            _cells(frame, "conflict", conflict, ".0%", [SKY, WHITE, ORANGE], [0.25, 0.5, 0.75]),
        ]
    if sensitivity is not None:
        panels += _heat_maps(sensitivity)
    headline, _, cause = verdict.summary.replace("`", "").partition(": ")
    title = alt.TitleParams(
        headline,
        subtitle=textwrap.wrap(cause, width=100),
        fontSize=20,
        subtitleFontSize=14,
        offset=18,
    )
    chart: alt.ConcatChart = alt.concat(*panels, columns=1, spacing=24, title=title)
    return chart


def vector_frame(parts: tuple[PartStatistics, ...]) -> pd.DataFrame:
    """Return a row per part of the model and expert."""
    return pd.DataFrame(
        {"part": part.name, "expert": name, "length": vector.relative_norm, "redundancy": vector.redundancy}
        for part in parts
        for name, vector in part.experts.items()
    )


def pair_frame(parts: tuple[PartStatistics, ...]) -> pd.DataFrame:
    """Return a row per part of the model and pair of experts."""
    return pd.DataFrame(
        {
            "part": part.name,
            "pair": f"{pair.first} · {pair.second}",
            "cosine": pair.cosine,
            "conflict": pair.weighted_conflict,
        }
        for part in parts
        for pair in part.pairs
    )


def _format(path: Path) -> Format:
    return cast(Format, path.suffix.lower().removeprefix("."))


def _lengths(frame: pd.DataFrame) -> alt.Chart:
    experts = list(frame["expert"].unique())
    bars: alt.Chart = (
        alt.Chart(frame)
        .mark_bar()
        .encode(
            x=_across(frame),
            xOffset=alt.XOffset("expert:N", sort=experts, scale=alt.Scale(paddingOuter=0.3)),
            y=alt.Y("length:Q", title=None, axis=alt.Axis(format="~%", tickCount=5)),
            color=alt.Color("expert:N", title=None, scale=alt.Scale(domain=experts, range=EXPERTS)),
            tooltip=[
                "part:N",
                "expert:N",
                alt.Tooltip("length:Q", format=".2%"),
                alt.Tooltip("redundancy:Q", format=".0%"),
            ],
        )
        .properties(
            width=_WIDTH, height=170, title=_title("Length of each task vector, relative to the base")
        )
    )
    return bars


def _cells(
    frame: pd.DataFrame, column: str, title: str, figure: str, colours: list[str], domain: list[float]
) -> alt.LayerChart:
    """Draw a row per pair and a column per part, coloured by how far the value is from no relation."""
    pairs = list(frame["pair"].unique())
    encoded = alt.Chart(frame.dropna(subset=[column])).encode(
        x=_across(frame),
        y=alt.Y(
            "pair:N",
            title=None,
            scale=alt.Scale(domain=pairs),
            axis=alt.Axis(labelLimit=200, domain=False, ticks=False),
        ),
        tooltip=[
            "part:N",
            "pair:N",
            alt.Tooltip("cosine:Q", format=".3f"),
            alt.Tooltip("conflict:Q", title="weighted sign conflict", format=".1%"),
        ],
    )
    scale = alt.Scale(domain=domain, range=colours, clamp=True, interpolate="rgb")
    layers = [
        encoded.mark_rect(stroke="#DDDDDD").encode(color=alt.Color(f"{column}:Q", scale=scale, legend=None))
    ]
    if frame["part"].nunique() <= _MOST_LABELLED:
        text = encoded.mark_text(fontSize=12, color=INK)
        layers.append(text.encode(text=alt.Text(f"{column}:Q", format=figure)))
    height = max(34, 26 * len(pairs))
    return alt.LayerChart(layer=layers).properties(width=_WIDTH, height=height, title=_title(title))


def _heat_maps(sensitivity: pd.DataFrame) -> list[alt.ConcatChart]:
    """Draw the gains of single layers, a map for each score."""
    maps = []
    for point, layers in layer_gains(sensitivity).groupby("point", sort=False):
        width = _WIDTH // layers["score_name"].nunique() - _MARGIN
        title = alt.TitleParams(
            f"{TITLES[str(point)]}: what a little more of each expert does, layer by layer",
            subtitle="Grey: within two standard errors of zero. Diamond: helps one score, harms another.",
            frame="group",
            offset=14,
        )
        drawn = [each.properties(width=max(width, _MARGIN)) for each in heat_maps(layers)]
        maps.append(alt.concat(*drawn, title=title).resolve_scale(color="independent"))
    return maps


def _across(frame: pd.DataFrame) -> alt.X:
    parts = list(frame["part"].unique())
    few = len(parts) <= _MOST_LABELLED
    axis = alt.Axis(
        labelAngle=0 if few else -90, labelLimit=_WIDTH // len(parts) if few else 110, ticks=False
    )
    return alt.X("part:N", title=None, scale=alt.Scale(domain=parts, padding=0), axis=axis)


def _title(text: str) -> alt.TitleParams:
    return alt.TitleParams(text, frame="group")
