"""Fronts and hypervolume of candidates with several objectives, each to be maximized."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]  # (n_candidates, n_objectives), greater is better


def dominates(first: Sequence[float], second: Sequence[float]) -> bool:
    """Say whether `first` is at least as good in every objective and better in one."""
    pairs = list(zip(first, second, strict=True))
    return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)


def front(points: Points) -> list[int]:
    """Return the indices of the points that no other dominates (equal points are all kept)."""
    return [i for i, point in enumerate(points) if not any(dominates(other, point) for other in points)]


def hypervolume(points: Points, reference: Sequence[float]) -> float:
    """Return the volume dominated by `points` above `reference` (Zitzler & Thiele 1998).

    Points that are not above the reference in every objective add nothing. Exact, by slicing the
    last objective; the cost grows fast beyond four objectives.
    """
    above = np.asarray([point for point in points if (point > reference).all()], dtype=np.float64)
    if len(above) == 0:
        return 0.0
    return _volume(above[front(above)] - np.asarray(reference))


def _volume(points: Points) -> float:
    """Volume of the union of the boxes between the origin and each point."""
    if points.shape[1] == 1:
        return float(points.max())
    ordered = points[np.argsort(-points[:, -1])]  # the last objective falls from slice to slice
    total = 0.0
    for i, point in enumerate(ordered):
        floor = ordered[i + 1, -1] if i + 1 < len(ordered) else 0.0
        if point[-1] > floor:
            total += (point[-1] - floor) * _volume(ordered[: i + 1, :-1])
    return total
