"""Baselines: what a study measures first, so that every candidate has something to beat."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from mergetune.results.roles import (
    BASE,
    EQUALIZED,
    Role,
    average_name,
    expert_name,
    role_of,
    scaled_average_name,
    uniform_name,
)
from mergetune.space.method_table import METHODS
from mergetune.space.recipe import MergeRecipe, Source
from mergetune.space.search_space import SearchSpace

# Usual scaling factors of task arithmetic without a search (Ilharco et al. 2023; Yadav et al. 2023).
_USUAL_LAMBDAS = (0.5, 0.8, 1.0)


@dataclass(frozen=True)
class Baseline:
    """A model measured before the search; `params` is its point in the space, None if outside."""

    name: str
    recipe: MergeRecipe
    params: dict[str, float] | None

    @property
    def role(self) -> Role:
        """See `Candidate.role`."""
        return role_of(self.name)


def baselines(
    space: SearchSpace, base: Source, experts: Mapping[str, Source], norms: Mapping[str, float]
) -> list[Baseline]:
    """List the base, each expert, averages, and the usual defaults of the space's method.

    Beside the plain average and the usual lambdas there is the norm-equalized average, each lambda the
    inverse of its task vector's norm, their sum 1. Those which the space can express carry their point,
    and so teach the sampler.

    Args:
        space: the search space.
        base: the base.
        experts: the experts by name.
        norms: of the experts' task vectors, over all tensors.
    """
    zero, share = dict.fromkeys(experts, 0.0), 1 / len(experts)
    models = {BASE: zero} | {expert_name(name): {**zero, name: 1.0} for name in experts}
    averages = {uniform_name(len(experts)): share} | {scaled_average_name(lam): lam for lam in _USUAL_LAMBDAS}
    # With density 1 each method that can express an untouched model gives it back.
    found = [
        Baseline(name, _task_arithmetic(lambdas, base, experts), space.constant(lambdas, density=1.0))
        for name, lambdas in models.items()
    ]
    averages_of = {name: dict.fromkeys(experts, lam) for name, lam in averages.items()}
    if len(experts) > 1:
        averages_of[EQUALIZED] = equalized(norms)
    found += [_average(name, lambdas, space, base, experts) for name, lambdas in averages_of.items()]
    return found + _method_default(space, experts)


def equalized(norms: Mapping[str, float]) -> dict[str, float]:
    """Return lambdas inverse to the task vectors' norms, their sum 1; an expert without changes gets 0."""
    inverses = {name: 1 / norm if norm > 0 else 0.0 for name, norm in norms.items()}
    total = sum(inverses.values())
    return {name: inverse / (total or 1.0) for name, inverse in inverses.items()}


def soup(
    members: Collection[str], space: SearchSpace, base: Source, experts: Mapping[str, Source]
) -> Baseline:
    """Return the average of some of the experts, with equal shares."""
    shares = {name: 1 / len(members) if name in members else 0.0 for name in experts}
    return _average(average_name(members, list(experts)), shares, space, base, experts)


def _average(
    name: str,
    lambdas: dict[str, float],
    space: SearchSpace,
    base: Source,
    experts: Mapping[str, Source],
) -> Baseline:
    """A sum of task vectors: a point of the space where that is what the space searches."""
    recipe = _task_arithmetic(lambdas, base, experts)
    is_inside = space.config.method == recipe.method
    return Baseline(name, recipe, space.constant(lambdas, density=1.0) if is_inside else None)


def _method_default(space: SearchSpace, experts: Mapping[str, Source]) -> list[Baseline]:
    method = space.config.method
    density = METHODS[method].usual_density
    if density is None:
        return []
    params = space.constant(dict.fromkeys(experts, 1.0), density=density)
    return [] if params is None else [Baseline(f"{method}-default", space.recipe(params), params)]


def _task_arithmetic(lambdas: dict[str, float], base: Source, experts: Mapping[str, Source]) -> MergeRecipe:
    return MergeRecipe.of_one_group("task_arithmetic", base, experts, {"lambda": lambdas})
