"""Search spaces: from the coefficients a study may choose to Optuna's distributions and to recipes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from optuna.distributions import FloatDistribution
from pydantic import ValidationError

from mergetune.errors import MergetuneError, TrialError
from mergetune.space.coordinates import Coordinate
from mergetune.space.method_table import METHODS, SMOOTH, Parameter
from mergetune.space.recipe import LayerGroup, MergeRecipe, RecipeGroup, Source, count_layers
from mergetune.space.search_space_config import (
    Coefficient,
    Range,
    Ranges,
    SearchSpaceConfig,
    default_range,
    layer_groups,
)

_ON_THE_GRID = ("density", "select_topk")  # interpolated between anchors, they stay on the merger's grid


@dataclass(frozen=True)
class _Slot:
    """One coefficient in one scope: a layer group, or an anchor; `expert` is None if it is one for all.

    A slot that does not matter touches no tensor: it is not searched, and its value is `idle`.
    """

    parameter: str
    expert: str | None
    coordinate: Coordinate
    coefficient: Coefficient
    matters: bool
    idle: float

    @property
    def key(self) -> str:
        """The coordinate's name."""
        return self.coordinate.key

    @property
    def range(self) -> Range | None:
        """The interval to search; None where there is nothing to search."""
        return self.coefficient if self.matters and isinstance(self.coefficient, Range) else None

    def value(self, params: Mapping[str, float]) -> float:
        if not self.matters:
            return self.idle
        return params[self.key] if isinstance(self.coefficient, Range) else self.coefficient

    @property
    def fixed(self) -> float | None:
        """The number held where there is nothing to search, else None."""
        return None if isinstance(self.coefficient, Range) else self.coefficient

    def holds(self, value: float) -> bool:
        if isinstance(self.coefficient, Range):
            low, step = self.coefficient.low, self.coefficient.step
            is_on_grid = step is None or abs(round((value - low) / step) * step + low - value) < 1e-9
            return is_on_grid and low <= value <= self.coefficient.high
        return self.coefficient == value


@dataclass(frozen=True)
class Share:
    """How much of a searched coefficient a layer group's is made of; `expert` is empty if it is for all."""

    key: str
    group: str
    parameter: str
    expert: str
    weight: float


class SearchSpace:
    """A search space bound to a model's tensors and experts: Optuna's distributions, and recipes.

    Args:
        config: the file's content.
        base: the base model, as recipes name it.
        experts: the experts by name, as recipes name them.
        changed: the tensors that each expert changes; coefficients that touch none are not searched.
        tensor_names: the base's tensors; each must fall into exactly one layer group.
        seed: seed of the random masks, the same in all recipes.

    Raises:
        MergetuneError: a tensor falls into no group or several, or the method does not take this
            number of experts.
    """

    def __init__(
        self,
        config: SearchSpaceConfig,
        base: Source,
        experts: Mapping[str, Source],
        changed: Mapping[str, Collection[str]],
        tensor_names: Sequence[str],
        seed: int = 0,
    ) -> None:
        self.config = config
        self.groups = layer_groups(config, tensor_names)
        self._base, self._experts, self._seed = base, dict(experts), seed
        self._weights = _scope_weights(config, self.groups, count_layers(tensor_names))
        self._slots = self._make_slots(changed)
        free = [(slot, slot.range) for slots in self._slots.values() for slot in slots]
        self.coordinates = {slot.key: slot.coordinate for slot, own in free if own is not None}
        self.distributions: dict[str, FloatDistribution] = {
            slot.key: FloatDistribution(own.low, own.high, step=own.step)
            for slot, own in free
            if own is not None
        }
        try:
            self.recipe({key: each.high for key, each in self.distributions.items()})
        except TrialError as error:
            raise MergetuneError(f"The search space does not fit these models: {error}") from error

    def recipe(self, params: Mapping[str, float]) -> MergeRecipe:
        """Return the recipe at a point of the space; `params` as Optuna's `trial.params`.

        Raises:
            TrialError: the method cannot merge there, e.g. shares that sum to zero.
        """
        try:
            return MergeRecipe(
                method=self.config.method,
                base=self._base,
                experts=self._experts,
                groups=tuple(self._recipe_group(group, params) for group in self.groups),
                options=self.config.options,
                seed=self._seed,
            )
        except ValidationError as error:
            reasons = [detail["msg"].removeprefix("Value error, ") for detail in error.errors()]
            raise TrialError("; ".join(reasons)) from error

    def constant(self, lambdas: Mapping[str, float], density: float) -> dict[str, float] | None:
        """Return the point with these coefficients in every layer group; None if it lies outside.

        For SLERP, `t` is the second expert's share of the lambdas.
        """
        wanted = {"density": density, **self._shares(lambdas)}
        params: dict[str, float] = {}
        for slot in (slot for slots in self._slots.values() for slot in slots if slot.matters):
            value = lambdas[slot.expert] if slot.parameter == "lambda" and slot.expert else None
            value = wanted.get(slot.parameter, slot.fixed) if value is None else value
            if value is None or not slot.holds(value) or params.get(slot.key, value) != value:
                return None
            if slot.range is not None:
                params[slot.key] = value
        try:
            self.recipe(params)
        except TrialError:  # an average of whole experts cannot give the base
            return None
        return params

    def smooth_shares(self) -> list[Share]:
        """Return how the recipe's smooth coefficients are made of those that can change: a linear map."""
        return [
            Share(slot.key, group, slot.parameter, slot.expert or "", weight)
            for group, weights in self._weights.items()
            for scope, weight in weights.items()
            for slot in self._slots[scope]
            if slot.parameter in SMOOTH and slot.range is not None
            if not self.distributions[slot.key].single()
        ]

    def _shares(self, lambdas: Mapping[str, float]) -> dict[str, float]:
        """Return the positions between two experts that lambdas stand for: the second one's share of them."""
        total = sum(lambdas.values())
        positions = [each.name for each in METHODS[self.config.method].parameters if each.is_position]
        return {name: list(lambdas.values())[1] / total for name in positions if total != 0}

    def _make_slots(self, changed: Mapping[str, Collection[str]]) -> dict[str, list[_Slot]]:
        """Return the slots of each scope."""
        scopes: dict[str, Ranges] = {name: Ranges() for weights in self._weights.values() for name in weights}
        scopes |= {group.name: group for group in self.config.groups if group.name in scopes}
        return {
            name: [
                self._slot(name, scope, parameter, expert, self._touches(name, expert, changed))
                for parameter in METHODS[self.config.method].parameters
                for expert in (self._experts if parameter.is_per_expert else [None])
            ]
            for name, scope in scopes.items()
        }

    def _slot(
        self, scope: str, own: Ranges, parameter: Parameter, expert: str | None, matters: bool
    ) -> _Slot:
        name = parameter.name
        given = (own.ranges.get(name), self.config.ranges.get(name), default_range(parameter))
        coefficient = next(found for found in given if found is not None)
        shared = expert is None or (isinstance(coefficient, Range) and coefficient.shared)
        coordinate = Coordinate(parameter=name, group=scope, expert="" if shared else expert or "")
        low = coefficient.low if isinstance(coefficient, Range) else coefficient
        return _Slot(
            name, expert, coordinate, coefficient, matters, idle=1.0 if 1.0 in parameter.valid else low
        )

    def _touches(self, scope: str, expert: str | None, changed: Mapping[str, Collection[str]]) -> bool:
        """Say whether a coefficient in a scope has an effect on any tensor."""
        is_alone = expert is not None and not METHODS[self.config.method].is_joint
        experts = [expert] if is_alone and expert is not None else list(changed)
        groups = [group for group in self.groups if scope in self._weights[group.name]]
        return any(group.takes(name) for group in groups for each in experts for name in changed[each])

    def _recipe_group(self, group: LayerGroup, params: Mapping[str, float]) -> RecipeGroup:
        found: dict[str, dict[str | None, float]] = {}
        for scope, weight in self._weights[group.name].items():
            for slot in self._slots[scope]:
                own = found.setdefault(slot.parameter, {})
                total = own.get(slot.expert, 0.0) + weight * slot.value(params)
                own[slot.expert] = total
        if len(self._weights[group.name]) > 1:  # interpolated between anchors
            found = {name: _rounded(name, own) for name, own in found.items()}
        coefficients = {name: own.get(None, own) for name, own in found.items()}
        return RecipeGroup.model_validate({**group.model_dump(exclude_none=True), **coefficients})


def nearest_in(distribution: FloatDistribution, value: float) -> float:
    """Return the value of a distribution that lies nearest: on its grid, or to six digits."""
    low, step = distribution.low, distribution.step
    value = round(value, 6) if step is None else round(low + round((value - low) / step) * step, 12)
    return min(max(value, low), distribution.high)


def _rounded(parameter: str, values: Mapping[str | None, float]) -> dict[str | None, float]:
    if parameter in _ON_THE_GRID:
        return {expert: max(0.01, round(value, 2)) for expert, value in values.items()}
    return {expert: round(value, 12) for expert, value in values.items()}


def _scope_weights(
    config: SearchSpaceConfig, groups: Sequence[LayerGroup], n_layers: int
) -> dict[str, dict[str, float]]:
    """Return the scopes of each group with their weights: itself, or the anchors around it."""
    if config.anchors is None:
        return {group.name: {group.name: 1.0} for group in groups}
    return _anchor_weights([f"anchor{i}" for i in range(config.anchors)], n_layers)


def _anchor_weights(points: Sequence[str], n_layers: int) -> dict[str, dict[str, float]]:
    """Return, for each group, the weights of the anchors in its piecewise-linear interpolation."""
    weights = {"before": {points[0]: 1.0}, "after": {points[-1]: 1.0}}
    for layer in range(n_layers):
        position = layer / max(n_layers - 1, 1) * (len(points) - 1)
        left = min(int(position), len(points) - 2)
        share = position - left
        both = {points[left]: 1.0 - share, points[left + 1]: share}
        weights[f"layer{layer}"] = {point: weight for point, weight in both.items() if weight > 0}
    return weights
