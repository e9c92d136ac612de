"""The heat maps of sensitivity say what the figures say."""

from __future__ import annotations

import re

import pandas as pd
import pytest
import vl_convert

from mergetune.analysis.conflicts import layer_gains
from mergetune.analysis.heat_maps import heat_maps
from mergetune.theme import PALE, themed
from synthetic_run import sensitivity_frame


@pytest.fixture(scope="module")
def layers() -> pd.DataFrame:
    return layer_gains(sensitivity_frame({"average": 1.0}))


def _colours(rows: pd.DataFrame) -> list[tuple[int, ...]]:
    """Draw one score's map; return the colour of each cell, in the rows' order."""
    (chart,) = heat_maps(rows)
    svg = vl_convert.vegalite_to_svg(themed(chart).to_dict())
    found = re.findall(r'<path aria-label="coefficient: [^>]* fill="([^"]*)" stroke="#FFFFFF"', svg)
    assert len(found) == len(rows)
    return [_rgb(colour) for colour in found]


def _rgb(colour: str) -> tuple[int, ...]:
    if colour.startswith("#"):
        return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return tuple(map(int, re.findall(r"\d+", colour)))


def test_a_cell_is_coloured_where_its_gain_is_clear_however_small(layers: pd.DataFrame) -> None:
    for _, rows in layers.groupby("score_name", sort=False):
        colours = _colours(rows)
        is_pale = [colour == _rgb(PALE) for colour in colours]
        assert is_pale == [not clear for clear in rows["is_clear"]]
        for (red, green, _), gain, pale in zip(colours, rows["gain"], is_pale, strict=True):
            assert pale or (green > red) == (gain > 0)  # green helps, purple harms
    assert layers["is_clear"].any()
    assert not layers["is_clear"].all()


def test_no_diamond_stands_on_a_cell_without_colour(layers: pd.DataFrame) -> None:
    marked = layers[layers["opposed"] != ""]
    assert len(marked)
    assert marked["is_clear"].all()
