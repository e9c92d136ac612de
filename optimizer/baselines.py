"""Baselines: what a study measures first, so that every candidate has something to beat."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from optimizer.recipe import MergeRecipe, RecipeGroup, Source
from optimizer.search_space import SearchSpace
from optimizer.selection import BASE, expert_name

# Usual scaling factors of task arithmetic without a search (Ilharco et al. 2023; Yadav et al. 2023).
_USUAL_LAMBDAS = (0.5, 0.8, 1.0)
# TIES without a search keeps the top 20 % and scales by 1 (Yadav et al. 2023, section 4);
# DARE's usual drop rate is 0.9 for fine-tunes of this kind (Yu et al. 2024).
_USUAL_DENSITY = {"ties": 0.2, "dare_linear": 0.1, "dare_ties": 0.1}


@dataclass(frozen=True)
class Baseline:
    """A model measured before the search; `params` is its point in the space, None if outside."""

    name: str
    recipe: MergeRecipe
    params: dict[str, float] | None


def uniform_name(n_experts: int) -> str:
    """Return the candidate's name of the plain average."""
    return f"average-{1 / n_experts:.2g}"


def baselines(space: SearchSpace, base: Source, experts: Mapping[str, Source]) -> list[Baseline]:
    """List the base, each expert, the plain average, and the usual defaults of the space's method.

    Those which the space can express carry their point, and so teach the sampler.
    """
    zero = dict.fromkeys(experts, 0.0)
    found = [_model(BASE, zero, space, base, experts)]
    found += [_model(expert_name(name), {**zero, name: 1.0}, space, base, experts) for name in experts]
    share = 1 / len(experts)
    averages = {uniform_name(len(experts)): share}
    averages |= {f"average-{lam:.2g}": lam for lam in _USUAL_LAMBDAS}
    for name, lam in averages.items():
        recipe = _task_arithmetic(dict.fromkeys(experts, lam), base, experts)
        params = None
        if space.config.method == "task_arithmetic":
            params = space.constant(dict.fromkeys(experts, lam), density=1.0)
        found.append(Baseline(name, recipe, params))
    return found + _method_default(space, experts)


def _model(
    name: str,
    lambdas: dict[str, float],
    space: SearchSpace,
    base: Source,
    experts: Mapping[str, Source],
) -> Baseline:
    """The base or one expert, untouched: with density 1 each method that can express it gives it back."""
    params = space.constant(lambdas, density=1.0)
    return Baseline(name, _task_arithmetic(lambdas, base, experts), params)


def _method_default(space: SearchSpace, experts: Mapping[str, Source]) -> list[Baseline]:
    method = space.config.method
    if method not in _USUAL_DENSITY:
        return []
    params = space.constant(dict.fromkeys(experts, 1.0), density=_USUAL_DENSITY[method])
    return [] if params is None else [Baseline(f"{method}-default", space.recipe(params), params)]


def _task_arithmetic(lambdas: dict[str, float], base: Source, experts: Mapping[str, Source]) -> MergeRecipe:
    group = RecipeGroup.model_validate({"name": "all", "lambda": lambdas})
    return MergeRecipe(method="task_arithmetic", base=base, experts=dict(experts), groups=(group,))
