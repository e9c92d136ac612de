"""Search spaces: which coefficients a study may choose, in which layer groups, in which range."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from optuna.distributions import BaseDistribution, FloatDistribution
from pydantic import Field, model_validator

from optimizer.errors import MergetuneError
from optimizer.recipe import (
    METHODS,
    LayerGroup,
    MergeRecipe,
    MethodName,
    RecipeGroup,
    Role,
    Source,
    assign_groups,
    count_layers,
)
from optimizer.yaml_io import Strict, read_yaml


class Range(Strict):
    """An interval of a coefficient; `shared` gives all experts one value, `step` makes it a grid."""

    low: float
    high: float
    step: float | None = Field(None, gt=0)
    shared: bool = False

    @model_validator(mode="after")
    def _is_interval(self) -> Range:
        if self.low > self.high:
            raise ValueError(f"`low <= high` must hold (low={self.low}, high={self.high})")
        return self


Coefficient = Range | float  # a number is held fixed

_DEFAULTS: dict[str, Range] = {
    "lambda": Range(low=0.0, high=2.0),
    "density": Range(low=0.1, high=1.0, step=0.01),
    "t": Range(low=0.0, high=1.0, shared=True),
}

_DECIMALS = {
    "lambda": 12,
    "density": 2,
    "t": 12,
}  # interpolated densities stay on the merger's grid


class Ranges(Strict):
    """The ranges of the coefficients; where one is absent, the wider scope's holds, at last the default."""

    lambda_: Coefficient | None = Field(None, alias="lambda")
    density: Coefficient | None = None
    t: Coefficient | None = None

    def get(self, parameter: str) -> Coefficient | None:
        """Return the range given for `lambda`, `density` or `t`."""
        value: Coefficient | None = getattr(self, "lambda_" if parameter == "lambda" else parameter)
        return value


class SpaceGroup(Ranges):
    """A layer group of a search space: selectors (as in a recipe, with `depth` as well) and ranges.

    `depth` is a half-open interval of the relative depth in [0, 1]: layer i of n stands at (i + ½)/n.
    """

    name: str
    depth: tuple[float, float] | None = None
    layers: tuple[int, int] | None = None
    roles: tuple[Role, ...] | None = None
    match: str | None = None

    @model_validator(mode="after")
    def _has_one_depth(self) -> SpaceGroup:
        if self.depth is not None and self.layers is not None:
            raise ValueError(f"group `{self.name}` must have `depth` or `layers`, not both")
        if self.depth is not None and not 0 <= self.depth[0] < self.depth[1] <= 1:
            raise ValueError(f"0 <= depth[0] < depth[1] <= 1 must hold in group `{self.name}`")
        return self

    def resolve(self, n_layers: int) -> LayerGroup | None:
        """Return the layer group for a model of `n_layers`; None where no layer stands in `depth`."""
        layers = self.layers
        if self.depth is not None:
            low, high = self.depth
            inside = [i for i in range(n_layers) if low <= (i + 0.5) / n_layers < high]
            if not inside:
                return None
            layers = (inside[0], inside[-1])
        return LayerGroup(name=self.name, layers=layers, roles=self.roles, match=self.match)


class SearchSpaceConfig(Ranges):
    """The file of a search space: a method, and either layer groups or anchors over depth.

    With `anchors: n`, each coefficient is given at n points equally spaced over the layers and
    interpolated linearly between them; tensors before the layers take the first anchor's value,
    those after them (final norm, head) the last one's.
    """

    description: str
    method: MethodName
    groups: tuple[SpaceGroup, ...] = ()
    anchors: int | None = Field(None, ge=2)

    @model_validator(mode="after")
    def _has_groups(self) -> SearchSpaceConfig:
        if bool(self.groups) == bool(self.anchors):
            raise ValueError("a search space must have either `groups` or `anchors`")
        names = [group.name for group in self.groups]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"layer groups must have distinct names; given twice: {', '.join(twice)}")
        for scope in (self, *self.groups):
            if isinstance(scope.density, Range) and scope.density.low < 0.01:
                raise ValueError(f"0.01 <= density.low must hold (low={scope.density.low})")
            for parameter in _DEFAULTS:
                if scope.get(parameter) is not None and parameter not in METHODS[self.method].parameters:
                    raise ValueError(f"`{self.method}` has no `{parameter}`")
        return self


class SearchSpace:
    """A search space bound to a model's tensors and experts: Optuna's distributions, and recipes.

    Args:
        config: the file's content.
        base: the base model, as recipes name it.
        experts: the experts by name, as recipes name them.
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
        tensor_names: Sequence[str],
        seed: int = 0,
    ) -> None:
        self.config = config
        self._base, self._experts, self._seed = base, dict(experts), seed
        self.groups = layer_groups(config, tensor_names)
        if config.anchors is not None:
            points = [f"anchor{i}" for i in range(config.anchors)]
            self._scopes = {point: _Scope(point, config) for point in points}
            self._weights = _anchor_weights(points, count_layers(tensor_names))
        else:
            self._scopes = {group.name: _Scope(group.name, config, group) for group in config.groups}
            self._weights = {group.name: {group.name: 1.0} for group in self.groups}
        used = {scope for weights in self._weights.values() for scope in weights}
        self._scopes = {name: scope for name, scope in self._scopes.items() if name in used}
        self.distributions = self._distributions()
        try:
            self.recipe(self._midpoint())
        except ValueError as error:
            raise MergetuneError(f"The search space does not fit these models: {error}") from error

    def recipe(self, params: Mapping[str, float]) -> MergeRecipe:
        """Return the recipe at a point of the space; `params` as Optuna's `trial.params`."""
        groups = [self._recipe_group(group, params) for group in self.groups]
        return MergeRecipe(
            method=self.config.method,
            base=self._base,
            experts=self._experts,
            groups=tuple(groups),
            seed=self._seed,
        )

    def constant(self, lambdas: Mapping[str, float], density: float) -> dict[str, float] | None:
        """Return the point with these coefficients in every layer group; None if it lies outside.

        For SLERP, `t` is the second expert's share of the lambdas.
        """
        wanted, total = {"density": density}, sum(lambdas.values())
        if self.config.method in ("linear", "slerp") and total == 0:
            return None  # an average of the experts is never the base
        if self.config.method == "slerp":
            wanted["t"] = list(lambdas.values())[1] / total
        params: dict[str, float] = {}
        for scope in self._scopes.values():
            for parameter, expert, key, coefficient in scope.slots(list(self._experts)):
                value = lambdas[expert] if parameter == "lambda" else wanted[parameter]
                if not _holds(coefficient, value) or params.get(key, value) != value:
                    return None
                if isinstance(coefficient, Range):
                    params[key] = value
        return params

    def _distributions(self) -> dict[str, BaseDistribution]:
        return {
            key: FloatDistribution(coefficient.low, coefficient.high, step=coefficient.step)
            for scope in self._scopes.values()
            for _, _, key, coefficient in scope.slots(list(self._experts))
            if isinstance(coefficient, Range)
        }

    def _midpoint(self) -> dict[str, float]:
        return {
            key: (distribution.low + distribution.high) / 2
            for key, distribution in self.distributions.items()
            if isinstance(distribution, FloatDistribution)
        }

    def _recipe_group(self, group: LayerGroup, params: Mapping[str, float]) -> RecipeGroup:
        values: dict[str, dict[str, float]] = {"lambda": {}, "density": {}, "t": {}}
        for scope, weight in self._weights[group.name].items():
            for parameter, expert, key, coefficient in self._scopes[scope].slots(list(self._experts)):
                value = params[key] if isinstance(coefficient, Range) else coefficient
                total = values[parameter].get(expert, 0.0) + weight * value
                values[parameter][expert] = round(total, _DECIMALS[parameter])
        t = values.pop("t")
        fields = {
            **group.model_dump(exclude_none=True),
            **values,
            "t": next(iter(t.values()), None),
        }
        return RecipeGroup.model_validate(fields)


class _Scope:
    """One set of coefficients: that of a layer group, or that of an anchor."""

    def __init__(self, name: str, config: SearchSpaceConfig, group: Ranges | None = None) -> None:
        self.name = name
        self._coefficients = {
            parameter: _first(
                group.get(parameter) if group else None, config.get(parameter), _DEFAULTS[parameter]
            )
            for parameter in METHODS[config.method].parameters
        }

    def slots(self, experts: Sequence[str]) -> list[tuple[str, str, str, Coefficient]]:
        """List (parameter, expert, Optuna's name, coefficient) of every value this scope holds."""
        return [
            (parameter, expert, self._key(parameter, expert, coefficient), coefficient)
            for parameter, coefficient in self._coefficients.items()
            for expert in (experts[:1] if parameter == "t" else experts)
        ]

    def _key(self, parameter: str, expert: str, coefficient: Coefficient) -> str:
        if isinstance(coefficient, Range) and coefficient.shared:
            return f"{parameter}.{self.name}"
        return f"{parameter}.{self.name}.{expert}"


def read_search_space(path: Path) -> SearchSpaceConfig:
    """Read a search space from YAML; raises `MergetuneError` as `read_yaml` does."""
    return read_yaml(path, SearchSpaceConfig)


def layer_groups(config: SearchSpaceConfig, tensor_names: Sequence[str]) -> list[LayerGroup]:
    """Return the layer groups of a search space for a model with these tensors.

    Raises:
        MergetuneError: a tensor falls into no group or several, or the model has no layers to
            interpolate over.
    """
    n_layers = count_layers(tensor_names)
    if config.anchors is not None:
        groups = _anchor_groups(n_layers)
    else:
        resolved = [group.resolve(n_layers) for group in config.groups]
        groups = [group for group in resolved if group is not None]
    assign_groups(groups, tensor_names)
    return groups


def _first(*coefficients: Coefficient | None) -> Coefficient:
    return next(coefficient for coefficient in coefficients if coefficient is not None)


def _holds(coefficient: Coefficient, value: float) -> bool:
    if isinstance(coefficient, Range):
        return coefficient.low <= value <= coefficient.high
    return coefficient == value


def _anchor_groups(n_layers: int) -> list[LayerGroup]:
    """One group per layer, one before the layers and one after them."""
    if n_layers == 0:
        raise MergetuneError("`anchors` needs a model with numbered layers. Use `groups` instead.")
    layers = [LayerGroup(name=f"layer{i}", layers=(i, i)) for i in range(n_layers)]
    outside = r"^(?!(?:.*\.)?\d+\.)"  # no numbered part in the name
    return [
        LayerGroup(name="before", roles=("embeddings",), match=outside),
        *layers,
        LayerGroup(name="after", roles=("attention", "mlp", "norms", "head"), match=outside),
    ]


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
