"""The heat maps of sensitivity: what raising each coefficient gains, layer by layer.

Coloured is only what lies beyond two standard errors, from a tint that is seen even where it is small.
"""

from __future__ import annotations

import altair as alt
import pandas as pd

from mergetune.analysis.conflict_words import with_error
from mergetune.theme import HARMS, HARMS_A_LITTLE, HELPS, HELPS_A_LITTLE, INK, PALE, WHITE

_ROWS = (5, 24)  # pixels of a layer's row, at least and at most
_HEIGHT = 370  # unless the rows would become too low or too high
_FEW = 14  # layers that all have their numbers; of more, every fifth has


def heat_maps(layers: pd.DataFrame) -> list[alt.LayerChart]:
    """Draw a heat map for each score at one point: a row per layer, a column per expert.

    Args:
        layers: of `layer_gains`, of one point.
    """
    return [_heat_map(str(name), rows) for name, rows in layers.groupby("score_name", sort=False)]


def _heat_map(score: str, rows: pd.DataFrame) -> alt.LayerChart:
    order = list(rows["layer"].unique())
    shown = rows.assign(
        text=[with_error(gain, error) for gain, error in zip(rows["gain"], rows["stderr"], strict=True)]
    )
    most = float(rows["gain"].abs().max()) or 1.0
    low, high = (pixels * len(order) for pixels in _ROWS)
    encoded = alt.Chart(shown).encode(
        x=alt.X(
            "coefficient:N",
            title=None,
            sort=list(rows["coefficient"].unique()),
            axis=alt.Axis(orient="top", labelAngle=0, domain=False, ticks=False, labelFontWeight=600),
        ),
        y=alt.Y(
            "layer:N",
            title="layer",
            sort=order,
            axis=alt.Axis(values=_labelled(order), domain=False, ticks=False),
        ),
        tooltip=[
            alt.Tooltip("layer:N"),
            alt.Tooltip("coefficient:N"),
            alt.Tooltip("text:N", title="gain, nats per unit"),
            alt.Tooltip("opposed:N", title="conflicts with"),
        ],
    )
    cells = encoded.mark_rect(stroke=WHITE, strokeWidth=0.5).encode(
        color=alt.condition("datum.is_clear", _colour(most), alt.value(PALE))
    )
    dots = (
        encoded.transform_filter("datum.opposed != ''").mark_point(shape="diamond", filled=True, size=26)
    ).encode(color=alt.value(INK))
    height = min(max(_HEIGHT, low), high)
    title = alt.TitleParams(score, frame="group")  # above the cells, not above the names beside them
    return alt.LayerChart(layer=[cells, dots]).properties(height=height, title=title)


def _colour(most: float) -> alt.Color:
    little = most / 1000
    return alt.Color(
        "gain:Q",
        title=None,
        scale=alt.Scale(
            domain=[-most, -little, little, most],
            range=[HARMS, HARMS_A_LITTLE, HELPS_A_LITTLE, HELPS],
            interpolate="rgb",
        ),
        legend=alt.Legend(
            orient="bottom",
            gradientLength=160,
            gradientThickness=10,
            values=[-most, most],
            format="+.2~g",
        ),
    )


def _labelled(layers: list[str]) -> list[str]:
    """Return the layers whose names the axis shows; the first one may be what is outside them."""
    if len(layers) <= _FEW:
        return layers
    return [layers[0], *(name for name in layers[2:] if int(name) % 5 == 0)]
