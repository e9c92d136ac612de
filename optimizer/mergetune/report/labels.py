"""Where to write labels beside points so that they cover neither each other nor the points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

_CHARACTER, _LINE = 7.0, 15.0  # pixels of a character's width and of a line's height, at size 12
_FAR = 16


@dataclass(frozen=True)
class Spot:
    """A place for a label around its point: offsets in pixels (y down) and the text's alignment."""

    dx: float
    dy: float
    align: Literal["left", "right"]

    @property
    def is_far(self) -> bool:
        """Say whether a line should lead from the point to the label."""
        return abs(self.dy) > _FAR


@dataclass(frozen=True)
class Label:
    """A text to write at a point, in pixels (y down)."""

    text: str
    x: float
    y: float


Box = tuple[float, float, float, float]  # left, top, right, bottom

_SIDES: tuple[tuple[int, Literal["left", "right"]], ...] = ((1, "left"), (-1, "right"))
SPOTS = tuple(
    Spot(side * reach, height, align)
    for reach, heights in ((12, (0, -14, 14)), (4, (-20, 20)), (14, (-34, 34)), (40, (-48, 48)))
    for height in heights
    for side, align in _SIDES
)


def place_labels(
    labels: Sequence[Label],
    marks: Sequence[tuple[float, float]],
    line: Sequence[tuple[float, float]],
    size: tuple[int, int],
) -> list[Spot]:
    """Choose a spot for every label, one after the other: that which covers least, near ones first.

    Args:
        labels: what is to be written.
        marks: the middle of every mark that should stay visible, in pixels.
        line: the points that a step line joins, each step down (or up) first, then across.
        size: of the chart; what sticks out counts as covered.
    """
    taken: list[Box] = [(x - 7, y - 7, x + 7, y + 7) for x, y in marks]
    for (x0, y0), (x1, y1) in pairwise(line):
        taken.append((x0 - 2, min(y0, y1), x0 + 2, max(y0, y1)))
        taken.append((min(x0, x1), y1 - 2, max(x0, x1), y1 + 2))
    chosen = []
    for label in labels:
        spot = min(SPOTS, key=lambda s: _cost(label, s, taken, size))
        chosen.append(spot)
        taken.append(_box(label, spot))
    return chosen


def _box(label: Label, spot: Spot) -> Box:
    length = _CHARACTER * len(label.text)
    left = label.x + spot.dx - (length if spot.align == "right" else 0)
    middle = label.y + spot.dy
    return (left, middle - _LINE / 2, left + length, middle + _LINE / 2)


def _cost(label: Label, spot: Spot, taken: Sequence[Box], size: tuple[int, int]) -> float:
    """Return the area that a label covers or that sticks out of the chart, and a little for its distance."""
    box = left, top, right, bottom = _box(label, spot)
    outside = (right - left) * (bottom - top) - _overlap(box, (0, 0, *size))
    covered = sum(_overlap(box, other) for other in taken)
    return 10 * outside + covered + 0.5 * (abs(spot.dx) + abs(spot.dy))


def _overlap(one: Box, other: Box) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(width, 0.0) * max(height, 0.0)
