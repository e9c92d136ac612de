"""Search spaces: from the coefficients a study may choose to Optuna's distributions and to recipes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from optuna.distributions import BaseDistribution, FloatDistribution

from optimizer.errors import MergetuneError
from optimizer.recipe import METHODS, LayerGroup, MergeRecipe, RecipeGroup, Source, count_layers
from optimizer.search_space_config import (
    DEFAULTS,
    Coefficient,
    Range,
    Ranges,
    SearchSpaceConfig,
    layer_groups,
)

_AVERAGES = ("linear", "slerp")  # methods that average whole weights, and so never give the base
_DECIMALS = {"lambda": 12, "density": 2, "t": 12}  # interpolated densities stay on the merger's grid


@dataclass(frozen=True)
class _Slot:
    """One coefficient of one expert in one scope: a layer group, or an anchor.

    A slot that does not matter touches no tensor: it is not searched, and its value is 1.
    """

    parameter: str
    expert: str
    key: str  # Optuna's name
    coefficient: Coefficient
    matters: bool

    @property
    def range(self) -> Range | None:
        """The interval to search; None where there is nothing to search."""
        return self.coefficient if self.matters and isinstance(self.coefficient, Range) else None

    def value(self, params: Mapping[str, float]) -> float:
        if not self.matters:
            return 1.0
        return params[self.key] if isinstance(self.coefficient, Range) else self.coefficient

    def holds(self, value: float) -> bool:
        if isinstance(self.coefficient, Range):
            return self.coefficient.low <= value <= self.coefficient.high
        return self.coefficient == value


class SearchSpace:
    """A search space bound to a model's tensors and experts: Optuna's distributions, and recipes.

    Args:
        config: the file's content.
        base: the base model, as recipes name it.
        experts: the experts by name, as recipes name them.
        changed: the tensors that each expert changes; coefficients that touch none are not searched.
        tensor_names: the base's tensors; each must fall into exactly one layer group.
        seed: seed of DARE's masks, the same in all recipes.

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
        self.distributions: dict[str, BaseDistribution] = {
            slot.key: FloatDistribution(slot.range.low, slot.range.high, step=slot.range.step)
            for slots in self._slots.values()
            for slot in slots
            if slot.range is not None
        }
        try:
            self.recipe(
                {key: d.high for key, d in self.distributions.items() if isinstance(d, FloatDistribution)}
            )
        except ValueError as error:
            raise MergetuneError(f"The search space does not fit these models: {error}") from error

    def recipe(self, params: Mapping[str, float]) -> MergeRecipe:
        """Return the recipe at a point of the space; `params` as Optuna's `trial.params`."""
        return MergeRecipe(
            method=self.config.method,
            base=self._base,
            experts=self._experts,
            groups=tuple(self._recipe_group(group, params) for group in self.groups),
            seed=self._seed,
        )

    def constant(self, lambdas: Mapping[str, float], density: float) -> dict[str, float] | None:
        """Return the point with these coefficients in every layer group; None if it lies outside.

        For SLERP, `t` is the second expert's share of the lambdas.
        """
        total = sum(lambdas.values())
        if self.config.method in _AVERAGES and total == 0:
            return None
        wanted = {"density": density}
        if self.config.method == "slerp":
            wanted["t"] = list(lambdas.values())[1] / total
        params: dict[str, float] = {}
        for slot in (slot for slots in self._slots.values() for slot in slots if slot.matters):
            value = lambdas[slot.expert] if slot.parameter == "lambda" else wanted[slot.parameter]
            if not slot.holds(value) or params.get(slot.key, value) != value:
                return None
            if slot.range is not None:
                params[slot.key] = value
        return params

    def _make_slots(self, changed: Mapping[str, Collection[str]]) -> dict[str, list[_Slot]]:
        """Return the slots of each scope."""
        scopes: dict[str, Ranges] = {name: Ranges() for weights in self._weights.values() for name in weights}
        scopes |= {group.name: group for group in self.config.groups if group.name in scopes}
        return {
            name: [
                self._slot(name, scope, parameter, expert, self._touches(name, expert, changed))
                for parameter in METHODS[self.config.method].parameters
                for expert in (list(self._experts)[:1] if parameter == "t" else self._experts)
            ]
            for name, scope in scopes.items()
        }

    def _slot(self, scope: str, own: Ranges, parameter: str, expert: str, matters: bool) -> _Slot:
        given = (own.get(parameter), self.config.get(parameter), DEFAULTS[parameter])
        coefficient = next(found for found in given if found is not None)
        shared = isinstance(coefficient, Range) and coefficient.shared
        key = f"{parameter}.{scope}" if shared else f"{parameter}.{scope}.{expert}"
        return _Slot(parameter, expert, key, coefficient, matters)

    def _touches(self, scope: str, expert: str, changed: Mapping[str, Collection[str]]) -> bool:
        """Say whether an expert's coefficient in a scope has an effect on any tensor."""
        experts = list(changed) if self.config.method in _AVERAGES else [expert]
        groups = [group for group in self.groups if scope in self._weights[group.name]]
        return any(group.takes(name) for group in groups for each in experts for name in changed[each])

    def _recipe_group(self, group: LayerGroup, params: Mapping[str, float]) -> RecipeGroup:
        values: dict[str, dict[str, float]] = {"lambda": {}, "density": {}, "t": {}}
        for scope, weight in self._weights[group.name].items():
            for slot in self._slots[scope]:
                own = values[slot.parameter]
                total = own.get(slot.expert, 0.0) + weight * slot.value(params)
                own[slot.expert] = round(total, _DECIMALS[slot.parameter])
        position = next(iter(values.pop("t").values()), None)
        fields = {**group.model_dump(exclude_none=True), **values, "t": position}
        return RecipeGroup.model_validate(fields)


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
