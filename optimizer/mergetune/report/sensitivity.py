"""Sensitivity for the report: gains by layer, conflicts and what they say, gathered from a measurement."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import pandas as pd

from mergetune.analysis.conflict_words import HOW_TO_READ, TITLES, Finding, evidence, findings
from mergetune.analysis.conflicts import Conflict, conflicts, layer_gains
from mergetune.slopes.sensitivity import AVERAGE, BASE, RECOMMENDED
from mergetune.space.recipe import LayerGroup

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
    """What the report says of sensitivity: the points, what a gain is, and how many items it rests on."""

    points: tuple[PointSensitivity, ...]
    how_to_read: str
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
    return Sensitivity(points, HOW_TO_READ, evidence(frame))


def _point(point: str, layers: pd.DataFrame, found: list[Conflict]) -> PointSensitivity:
    own = layers[layers["point"] == point]
    return PointSensitivity(point, TITLES[point], own, tuple(found), tuple(findings(point, found)))
