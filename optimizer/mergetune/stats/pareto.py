"""Fronts and hypervolume of candidates with several objectives, each to be maximized."""

from __future__ import annotations

from collections.abc import Sequence

import moocore
import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]  # (n_candidates, n_objectives), greater is better


def on_front(points: Points) -> NDArray[np.bool_]:
    """Say of each point whether no other dominates it, (n_candidates,); equal points are all kept."""
    if len(points) == 0:
        return np.zeros(0, dtype=bool)
    return np.asarray(moocore.is_nondominated(points, maximise=True, keep_weakly=True), dtype=bool)


def front(points: Points) -> list[int]:
    """Return the indices of the points that no other dominates (equal points are all kept)."""
    return [int(i) for i in np.flatnonzero(on_front(points))]


def hypervolume(points: Points, reference: Sequence[float]) -> float:
    """Return the volume dominated by `points` above `reference` (Zitzler & Thiele 1998).

    Points that are not above the reference in every objective add nothing. Exact, by moocore: n points
    take O(n log n) for up to three objectives, O(n²) for four, and O(nᵐ⁻²) at worst for m beyond.
    """
    above = points[(points > np.asarray(reference)).all(axis=1)]
    if len(above) == 0:
        return 0.0
    # In many objectives, moocore is slower with dominated points than the front takes to find.
    return float(moocore.hypervolume(above[on_front(above)], ref=reference, maximise=True))


def growing_hypervolumes(points: Points, reference: Sequence[float]) -> NDArray[np.float64]:
    """Return the hypervolume of the first i + 1 points, for each i: (n_candidates,).

    A point adds its own box less what the boxes of those before it cover of that (While, Bradstreet & Barone
    2012, IEEE Trans. Evol. Comput. 16:86, "exclusive hypervolume"), so that nothing is measured anew.
    """
    floor, added = np.asarray(reference), np.zeros(len(points))
    for i, point in enumerate(points):
        if (point > floor).all():
            added[i] = (point - floor).prod() - hypervolume(np.minimum(points[:i], point), reference)
    return np.maximum(added, 0.0).cumsum()  # rounding takes no volume away
