"""Coordinates of a search space: what a point's numbers stand for, as data beside their names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mergetune.files.yaml_io import Strict

if TYPE_CHECKING:
    from optuna.distributions import FloatDistribution


class Coordinate(Strict):
    """What one number of a point moves.

    Attributes:
        parameter: a coefficient by its name in `METHODS`; `times` for a factor of those that slopes led to,
            `toward` for how far a point lies on the way to one that they led to.
        group: the layer group or anchor; empty for `toward`.
        expert: whose coefficient it is; empty where it is one for all.
        point: the candidate that `toward` leads to.
        low, high, step: its range and, where it lies on a grid, the grid's step; in runs of earlier versions
            the range is missing.
    """

    parameter: str
    group: str = ""
    expert: str = ""
    point: str | None = None
    low: float | None = None
    high: float | None = None
    step: float | None = None

    @property
    def key(self) -> str:
        """The number's name in Optuna and in a candidate's `params`."""
        return ".".join(filter(None, (self.parameter, self.group, self.expert, self.point)))


def with_ranges(
    coordinates: Mapping[str, Coordinate], distributions: Mapping[str, FloatDistribution]
) -> dict[str, Coordinate]:
    """Return the coordinates of a space with their ranges, by their names."""
    ranges = {key: (each.low, each.high, each.step) for key, each in distributions.items()}
    return {
        key: each.model_copy(update=dict(zip(("low", "high", "step"), ranges[key], strict=True)))
        for key, each in coordinates.items()
    }
