"""Coordinates of a search space: what a point's numbers stand for, as data beside their names."""

from __future__ import annotations

from mergetune.files.yaml_io import Strict


class Coordinate(Strict):
    """What one number of a point moves.

    Attributes:
        parameter: a coefficient by its name in `METHODS`; `times` for a factor of those that slopes led to,
            `toward` for how far a point lies on the way to one that they led to.
        group: the layer group or anchor; empty for `toward`.
        expert: whose coefficient it is; empty where it is one for all.
        point: the candidate that `toward` leads to.
    """

    parameter: str
    group: str = ""
    expert: str = ""
    point: str | None = None

    @property
    def key(self) -> str:
        """The number's name in Optuna and in a candidate's `params`."""
        return ".".join(filter(None, (self.parameter, self.group, self.expert, self.point)))
