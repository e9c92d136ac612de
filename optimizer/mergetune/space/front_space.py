"""The search space around a descent's front: few coefficients that move many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from optuna.distributions import FloatDistribution
from scipy.stats import qmc

from mergetune.space.coordinates import Coordinate
from mergetune.space.method_table import SMOOTH
from mergetune.space.recipe import MergeRecipe, assign_groups
from mergetune.space.search_space import SearchSpace, nearest_in

_TIMES = (0.5, 1.5)  # range of the multipliers


class FrontSpace:
    """Points of a fine search space, mixed, and multiplied in coarse layer groups.

    The first point is the origin. For each other one `toward.NAME` ∈ [0, 1] leads to it, the ways added up;
    then `times.GROUP.EXPERT` multiplies the smooth coefficients of a coarse layer group. Coefficients without
    slopes, such as densities, are those of the coarse space.

    Args:
        fine: the space of the points, each of whose layer groups lies within a coarse one.
        points: points of it by name, the origin first; they differ in smooth coefficients alone.
        coarse: the same in coarser layer groups.
        tensor_names: the base's tensors.
    """

    def __init__(
        self,
        fine: SearchSpace,
        points: Mapping[str, Mapping[str, float]],
        coarse: SearchSpace,
        tensor_names: Sequence[str],
    ) -> None:
        self._fine, self._points = fine, points
        origin, *others = points
        self._origin = points[origin]
        place = _coarse_groups(fine, coarse, tensor_names)
        multipliers = _multipliers(fine, place)
        held = _held(fine, place)
        self._multipliers = {key: each.key for key, each in multipliers.items()}
        self._held = {key: each.key for key, each in held.items()}
        self._towards = [Coordinate(parameter="toward", point=name) for name in others]
        every = (*self._towards, *multipliers.values(), *held.values())
        self.coordinates = {each.key: each for each in every}
        self.distributions: dict[str, FloatDistribution] = {
            **{each.key: FloatDistribution(0, 1) for each in self._towards},
            **{key: FloatDistribution(*_TIMES) for key in self._multipliers.values()},
            **{key: coarse.distributions[key] for key in self._held.values()},
        }

    def recipe(self, params: Mapping[str, float]) -> MergeRecipe:
        """Return the recipe at a point of the space; see `SearchSpace.recipe`."""
        return self._fine.recipe(self._fine_point(params))

    def corner(self, name: str) -> dict[str, float]:
        """Return where one of the points lies."""
        towards = {each.key: float(each.point == name) for each in self._towards}
        held = {place: self._origin[key] for key, place in self._held.items()}
        return {**towards, **dict.fromkeys(self._multipliers.values(), 1.0), **held}

    def design(self, n_points: int, seed: int) -> list[dict[str, float]]:
        """Return points that fill the space near the corners evenly: mixtures of them, moderately changed.

        A mixture's shares sum to 1, and everything else goes at most half of the way from the corners to the
        ends of its range: a scrambled Sobol sequence (Owen 1998), whose first coordinates, sorted, cut [0, 1]
        into the shares.
        """
        n_others, sobol = len(self._towards), qmc.Sobol(len(self.distributions), seed=seed)
        middles = list(self.corner(next(iter(self._points))).items())[n_others:]
        found = []
        for row in sobol.random_base2(max(n_points - 1, 0).bit_length())[:n_points]:
            params = dict(zip(self.distributions, row.tolist(), strict=True))
            shares = np.diff(np.sort(row[:n_others]), prepend=0.0)
            params |= {each.key: float(share) for each, share in zip(self._towards, shares, strict=True)}
            for key, middle in middles:
                ends = self.distributions[key]
                drawn = ends.low + params[key] * (ends.high - ends.low)
                params[key] = nearest_in(ends, (middle + drawn) / 2)
            found.append(params)
        return found

    def place(self, fine_point: Mapping[str, float]) -> dict[str, float] | None:
        """Return where a point of the fine space lies in this one, exactly: at a corner, multiplied.

        None where it lies at none. Nothing between the corners is looked at.
        """
        for name in self._points:
            corner = self.corner(name)
            held = {place: fine_point[key] for key, place in self._held.items()}
            params = corner | self._factors(self._fine_point(corner), fine_point) | held
            ranges = self.distributions.items()
            is_inside = all(each.low <= params[key] <= each.high for key, each in ranges)
            if is_inside and self._fine_point(params) == fine_point:
                return params
        return None

    def _fine_point(self, params: Mapping[str, float]) -> dict[str, float]:
        found = dict(self._origin)
        for toward in self._towards:
            assert toward.point is not None  # see above
            for key, value in self._points[toward.point].items():
                found[key] += params[toward.key] * (value - self._origin[key])
        for key, multiplier in self._multipliers.items():
            found[key] *= params[multiplier]
        found |= {key: params[place] for key, place in self._held.items()}
        return {key: nearest_in(self._fine.distributions[key], value) for key, value in found.items()}

    def _factors(self, begin: Mapping[str, float], end: Mapping[str, float]) -> dict[str, float]:
        """Return what each multiplier would have to be to lead from one point to another."""
        factors: dict[str, float] = {}
        for key in sorted(self._multipliers, key=lambda key: -abs(begin[key])):  # the most exact ones first
            if begin[key] != 0:
                factors.setdefault(self._multipliers[key], end[key] / begin[key])
        return factors


def _coarse_groups(fine: SearchSpace, coarse: SearchSpace, tensor_names: Sequence[str]) -> dict[str, str]:
    """Return the name of the coarse layer group that each fine one lies in."""
    coarse_of, fine_of = (assign_groups(each.groups, tensor_names) for each in (coarse, fine))
    return {group.name: coarse_of[name].name for name, group in fine_of.items()}


def _multipliers(fine: SearchSpace, place: Mapping[str, str]) -> dict[str, Coordinate]:
    """Return each smooth coefficient's multiplier: that of the coarse group that its layer group is in."""
    experts: dict[str, set[str]] = {}
    places: dict[str, str] = {}
    for share in fine.smooth_shares():
        experts.setdefault(share.key, set()).add(share.expert)
        places.setdefault(share.key, place[share.group])
    return {
        key: Coordinate(parameter="times", group=places[key], expert=_only(own))
        for key, own in experts.items()
    }


def _held(fine: SearchSpace, place: Mapping[str, str]) -> dict[str, Coordinate]:
    """Return for each coefficient without a slope the one of the coarse group that it follows."""
    return {
        key: each.model_copy(update={"group": place[each.group]})
        for key, each in fine.coordinates.items()
        if each.parameter not in SMOOTH
    }


def _only(experts: set[str]) -> str:
    """Return the expert that a coefficient is for; nothing where it is for several."""
    return next(iter(experts)) if len(experts) == 1 else ""
