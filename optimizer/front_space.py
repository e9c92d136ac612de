"""The search space around a descent's front: few coefficients that move many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from optuna.distributions import FloatDistribution

from optimizer.recipe import LayerGroup, MergeRecipe, assign_groups
from optimizer.search_space import SearchSpace, nearest_in

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
        self._multipliers = _multipliers(fine, coarse, tensor_names)
        self.distributions: dict[str, FloatDistribution] = {
            **{f"toward.{i}": FloatDistribution(0, 1) for i in range(1, len(points))},
            **{key: FloatDistribution(*_TIMES) for key in dict.fromkeys(self._multipliers.values())},
        }

    def recipe(self, params: Mapping[str, float]) -> MergeRecipe:
        """Return the recipe at a point of the space; see `SearchSpace.recipe`."""
        found = dict(self._origin)
        for i, other in enumerate(self._others, start=1):
            for key, value in other.items():
                found[key] += params[f"toward.{i}"] * (value - self._origin[key])
        for key, multiplier in self._multipliers.items():
            found[key] *= params[multiplier]
        return self._fine.recipe(
            {key: nearest_in(self._fine.distributions[key], value) for key, value in found.items()}
        )

    def corner(self, number: int) -> dict[str, float]:
        """Return where a point of the descent lies: 0 is the origin."""
        towards = {f"toward.{i}": float(i == number) for i in range(1, len(self._others) + 1)}
        return {**towards, **dict.fromkeys(self._multipliers.values(), 1.0)}


def _multipliers(
    fine: SearchSpace, coarse: Sequence[LayerGroup], tensor_names: Sequence[str]
) -> dict[str, str]:
    """Return each smooth coefficient's multiplier: that of the coarse group that its layer group is in."""
    coarse_of, fine_of = assign_groups(coarse, tensor_names), assign_groups(fine.groups, tensor_names)
    place = {group.name: coarse_of[name].name for name, group in fine_of.items()}
    experts: dict[str, set[str]] = {}
    places: dict[str, str] = {}
    for share in fine.smooth_shares():
        experts.setdefault(share.key, set()).add(share.expert)
        places.setdefault(share.key, place[share.group])
    return {key: ".".join(filter(None, ("times", places[key], _only(own)))) for key, own in experts.items()}


def _only(experts: set[str]) -> str:
    """Return the expert that a coefficient is for; nothing where it is for several."""
    return next(iter(experts)) if len(experts) == 1 else ""
