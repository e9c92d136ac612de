"""The search space around a descent's front: few coefficients that move many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from optuna.distributions import FloatDistribution
from scipy.stats import qmc

from mergetune.space.coordinates import Coordinate
from mergetune.space.recipe import LayerGroup, MergeRecipe, assign_groups
from mergetune.space.search_space import SearchSpace, nearest_in

_TIMES = (0.5, 1.5)  # range of the multipliers


class FrontSpace:
    """Points of a fine search space, mixed, and multiplied in coarse layer groups.

    The first point is the origin. For each other one `toward.N` ∈ [0, 1] leads to it, the ways added up;
    then `times.GROUP.EXPERT` multiplies the smooth coefficients of a coarse layer group. All other
    coefficients are the origin's.

    Args:
        fine: the space of the points, each of whose layer groups lies within a coarse one.
        points: points of it, the origin first.
        coarse: layer groups that take each tensor once.
        tensor_names: the base's tensors.
    """

    def __init__(
        self,
        fine: SearchSpace,
        points: Sequence[Mapping[str, float]],
        coarse: Sequence[LayerGroup],
        tensor_names: Sequence[str],
    ) -> None:
        self._fine, self._origin, self._others = fine, points[0], points[1:]
        multipliers = _multipliers(fine, coarse, tensor_names)
        self._multipliers = {key: each.key for key, each in multipliers.items()}
        self._towards = [Coordinate(parameter="toward", point=i) for i in range(1, len(points))]
        self.coordinates = {each.key: each for each in (*self._towards, *multipliers.values())}
        self.distributions: dict[str, FloatDistribution] = {
            key: FloatDistribution(*((0, 1) if each.parameter == "toward" else _TIMES))
            for key, each in self.coordinates.items()
        }

    def recipe(self, params: Mapping[str, float]) -> MergeRecipe:
        """Return the recipe at a point of the space; see `SearchSpace.recipe`."""
        return self._fine.recipe(self._fine_point(params))

    def corner(self, number: int) -> dict[str, float]:
        """Return where a point of the descent lies: 0 is the origin."""
        towards = {each.key: float(each.point == number) for each in self._towards}
        return {**towards, **dict.fromkeys(self._multipliers.values(), 1.0)}

    def design(self, n_points: int, seed: int) -> list[dict[str, float]]:
        """Return points that fill the space near the corners evenly: mixtures of them, moderately multiplied.

        A mixture's shares sum to 1, and the multipliers stay in the middle half of their ranges: a scrambled
        Sobol sequence (Owen 1998), whose first coordinates, sorted, cut [0, 1] into the shares.
        """
        n_others, (low, high) = len(self._others), _TIMES
        sobol = qmc.Sobol(len(self.distributions), seed=seed)
        found = []
        for row in sobol.random_base2(max(n_points - 1, 0).bit_length())[:n_points]:
            shares = np.diff(np.sort(row[:n_others]), prepend=0.0)
            factors = 1 + (high - low) / 2 * (row[n_others:] - 0.5)
            found.append(dict(zip(self.distributions, [*shares.tolist(), *factors.tolist()], strict=True)))
        return found

    def place(self, fine_point: Mapping[str, float]) -> dict[str, float] | None:
        """Return where a point of the fine space lies in this one, exactly: at a corner, multiplied.

        None where it lies at none. Nothing between the corners is looked at.
        """
        for number in range(1 + len(self._others)):
            corner = self.corner(number)
            params = corner | self._factors(self._fine_point(corner), fine_point)
            ranges = self.distributions.items()
            is_inside = all(each.low <= params[key] <= each.high for key, each in ranges)
            if is_inside and self._fine_point(params) == fine_point:
                return params
        return None

    def _fine_point(self, params: Mapping[str, float]) -> dict[str, float]:
        found = dict(self._origin)
        for toward, other in zip(self._towards, self._others, strict=True):
            for key, value in other.items():
                found[key] += params[toward.key] * (value - self._origin[key])
        for key, multiplier in self._multipliers.items():
            found[key] *= params[multiplier]
        return {key: nearest_in(self._fine.distributions[key], value) for key, value in found.items()}

    def _factors(self, begin: Mapping[str, float], end: Mapping[str, float]) -> dict[str, float]:
        """Return what each multiplier would have to be to lead from one point to another."""
        factors: dict[str, float] = {}
        for key in sorted(self._multipliers, key=lambda key: -abs(begin[key])):  # the most exact ones first
            if begin[key] != 0:
                factors.setdefault(self._multipliers[key], end[key] / begin[key])
        return factors


def _multipliers(
    fine: SearchSpace, coarse: Sequence[LayerGroup], tensor_names: Sequence[str]
) -> dict[str, Coordinate]:
    """Return each smooth coefficient's multiplier: that of the coarse group that its layer group is in."""
    coarse_of, fine_of = assign_groups(coarse, tensor_names), assign_groups(fine.groups, tensor_names)
    place = {group.name: coarse_of[name].name for name, group in fine_of.items()}
    experts: dict[str, set[str]] = {}
    places: dict[str, str] = {}
    for share in fine.smooth_shares():
        experts.setdefault(share.key, set()).add(share.expert)
        places.setdefault(share.key, place[share.group])
    return {
        key: Coordinate(parameter="times", group=places[key], expert=_only(own))
        for key, own in experts.items()
    }


def _only(experts: set[str]) -> str:
    """Return the expert that a coefficient is for; nothing where it is for several."""
    return next(iter(experts)) if len(experts) == 1 else ""
