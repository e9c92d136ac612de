"""Sensitivity for the report: gains by layer, conflicts and what they say, gathered from a measurement."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import pandas as pd

from optimizer.analysis.conflict_words import TITLES, Finding, evidence, findings
from optimizer.analysis.conflicts import CLEAR, Conflict, conflicts
from optimizer.recipe import LayerGroup
from optimizer.sensitivity import AVERAGE, BASE, RECOMMENDED, single_layers, slopes_by_group

_ORDER = (RECOMMENDED, AVERAGE, BASE)  # what the reader cares for most comes first


@dataclass(frozen=True)
class PointSensitivity:
    """How the scores move with the coefficients at one point.

    Attributes:
        point: its name.
        title: its name in words.
        layers: see `layer_gains`.
        conflicts: the pairs of scores, by layer group.
        findings: what the conflicts say.
    """

    point: str
    title: str
    layers: pd.DataFrame
    conflicts: tuple[Conflict, ...]
    findings: tuple[Finding, ...]


@dataclass(frozen=True)
class Sensitivity:
    """What the report says of sensitivity: the points, and how many items it rests on."""

    points: tuple[PointSensitivity, ...]
    evidence: str


def sensitivity(frame: pd.DataFrame | None, groups: Iterable[LayerGroup]) -> Sensitivity | None:
    """Gather the section; None where no sensitivity was measured.

    Args:
        frame: of `measure_sensitivity`.
        groups: the layer groups that conflicts are told by.
    """
    if frame is None or frame.empty:
        return None
    layers, found = layer_gains(frame), conflicts(frame, groups)
    points = tuple(
        _point(point, layers, [each for each in found if each.point == point])
        for point in _ORDER
        if (frame["point"] == point).any()
    )
    return Sensitivity(points, evidence(frame))


def layer_gains(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the gains of single layers: a row per point, score, layer and coefficient.

    Columns: point, score_name, layer (`outside` for all that lies outside them), coefficient (the
    expert, or the parameter that is one for all), gain and stderr in nats per unit, is_clear: whether
    it lies beyond two standard errors, and opposed: the other scores that the coefficient clearly pulls
    the other way, in words.
    """
    layers = single_layers(frame["tensor"].unique())
    rows = slopes_by_group(frame, layers)
    opposed: dict[tuple[str, str, str, str], list[str]] = {}
    for each in conflicts(frame, layers):
        one, two = each.first.score_name, each.second.score_name
        for place in each.places:
            for own, other in ((one, two), (two, one)):
                opposed.setdefault((each.point, own, place.group, place.expert), []).append(other)
    keys = rows[["point", "score_name", "group", "expert"]].itertuples(index=False, name=None)
    return pd.DataFrame(
        {
            "point": rows["point"],
            "score_name": rows["score_name"],
            "layer": rows["group"],
            "coefficient": rows["expert"].where(rows["expert"] != "", rows["parameter"]),
            "gain": -rows["slope"],
            "stderr": rows["stderr"],
            "is_clear": rows["slope"].abs() > CLEAR * rows["stderr"],
            "opposed": [", ".join(opposed.get(key, [])) for key in keys],
        }
    )


def _point(point: str, layers: pd.DataFrame, found: list[Conflict]) -> PointSensitivity:
    own = layers[layers["point"] == point]
    return PointSensitivity(point, TITLES[point], own, tuple(found), tuple(findings(point, found)))
