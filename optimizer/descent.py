"""Descent: a few steps along the slopes, from one weighting of the objectives to the next."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from optimizer import pareto
from optimizer.engines.transformers_engine import TransformersEngine
from optimizer.errors import MergetuneError
from optimizer.gradients import slopes
from optimizer.losses import mean_losses
from optimizer.merging.merger import Merger
from optimizer.recipe import MergeRecipe, RecipeGroup
from optimizer.references import References
from optimizer.suite import SuiteConfig

Coefficients = dict[tuple[str, str], float]  # lambda by layer group and expert
Losses = Mapping[str, float]

_TINY = 1e-6  # nats; a loss below is none


@dataclass(frozen=True)
class DescentConfig:
    """How far and how carefully to descend; nothing here depends on the models.

    A lambda's natural unit is 1, one whole expert, and Adam's steps are as long as its rate whatever
    the slopes' scale is: so one rate fits all. It falls linearly to zero over the steps.

    Attributes:
        n_items: items of each objective and guard that are looked at in all.
        apart: the share of them that chooses among the points and is never descended on.
        n_step: items of each objective and guard in one step.
        first_steps: steps with the objectives' own weights.
        next_steps: steps that lead from there to each other weighting.
        rate: the first step's length.
        emphasis: how many times more one objective counts than by its own weight, in its own weighting.
        low: the smallest lambda.
        high: the largest lambda.
    """

    n_items: int = 32
    apart: float = 0.25
    n_step: int = 6
    first_steps: int = 12
    next_steps: int = 5
    rate: float = 0.2
    emphasis: float = 4.0
    low: float = 0.0
    high: float = 2.0


@dataclass(frozen=True)
class Point:
    """Where a descent came to: a recipe, with its losses on the items that were kept apart."""

    recipe: MergeRecipe
    losses: Losses
    weights: Mapping[str, float]

    @property
    def coefficients(self) -> Coefficients:
        """The lambdas by layer group and expert."""
        return coefficients(self.recipe)


@dataclass(frozen=True)
class Descent:
    """Points that no other one betters in every objective's loss, and what they cost.

    Attributes:
        points: the points, that of the objectives' own weights first if it is among them.
        n_passes: the cost in forward passes of one item; divided by a split's items it is in full
            evaluations.
        history: the losses on the items of each step.
    """

    points: tuple[Point, ...]
    n_passes: int
    history: tuple[Losses, ...] = field(repr=False, default=())

    def full_evaluations(self, n_items: int) -> float:
        """The cost in evaluations of this many items."""
        return self.n_passes / n_items


def coefficients(recipe: MergeRecipe) -> Coefficients:
    """Return a recipe's lambdas by layer group and expert."""
    return {
        (group.name, expert): value
        for group in recipe.groups
        for expert, value in group.per_expert("lambda").items()
    }


def at(recipe: MergeRecipe, lambdas: Mapping[tuple[str, str], float]) -> MergeRecipe:
    """Return a recipe with these lambdas, and all else as it is."""
    groups = [
        RecipeGroup.model_validate(
            {
                **group.model_dump(exclude_none=True),
                "lambda": {e: lambdas[group.name, e] for e in group.per_expert("lambda")},
            }
        )
        for group in recipe.groups
    ]
    return recipe.model_copy(update={"groups": tuple(groups)})


def descend(
    engine: TransformersEngine,
    merger: Merger,
    start: MergeRecipe,
    references: References,
    suite: SuiteConfig,
    config: DescentConfig | None = None,
) -> Descent:
    """Follow the slopes from a recipe to points along the front; its layer groups are the grain.

    What falls is Σ wₖ log(Lₖ + L*ₖ) over the objectives, L* being the best expert's loss: halving a
    loss counts the same whatever its scale, up to about what the expert itself can do. A guard counts,
    with weight 1, as log(L / L') as far as it is above L', what its reference loses on the same items.
    The objectives' own weights come first; from there one stretch leads to each weighting that
    emphasizes one objective.

    Raises:
        MergetuneError: the method has no lambda for each expert.
        TrialError: a weight became infinite or NaN.
    """
    config = config or DescentConfig()
    if not all(isinstance(group.coefficients.get("lambda"), dict) for group in start.groups):
        raise MergetuneError(f"Descent needs a lambda for each expert, but `{start.method}` has none.")
    return _Walk(engine, merger, start, references, suite, config).walk()


class _Walk:
    """One descent under way."""

    def __init__(
        self,
        engine: TransformersEngine,
        merger: Merger,
        start: MergeRecipe,
        references: References,
        suite: SuiteConfig,
        config: DescentConfig,
    ) -> None:
        self._engine, self._merger, self._start = engine, merger, start
        self._suite, self._config = suite, config
        self.n_passes = 0
        self._history: list[Losses] = []
        self._apart, training = references.sample(config.n_items).parts(config.apart)
        batches = _cut(training, config.n_step)
        best = self._best_losses(batches[0])
        self._batches = itertools.cycle([(batch, self._floors(batch, best)) for batch in batches])
        self._apart_floors = self._floors(self._apart, best)

    def walk(self) -> Descent:
        objectives = [name for name in self._suite.objectives if name in self._apart_floors]
        own = {name: self._suite.objectives[name].weight for name in objectives}
        first = self._stretch(coefficients(self._start), own, self._config.first_steps)
        points = [first]
        for name in objectives if len(objectives) > 1 else []:
            weights = {**own, name: own[name] * self._config.emphasis}
            points.append(self._stretch(first.coefficients, weights, self._config.next_steps))
        costs = np.array([[-point.losses[name] for name in objectives] for point in points])
        kept = tuple(points[i] for i in sorted(pareto.front(costs)))
        return Descent(kept, self.n_passes, tuple(self._history))

    def _stretch(self, begin: Coefficients, weights: Mapping[str, float], n_steps: int) -> Point:
        """Take some steps with one weighting; of their end and their middle the better one counts."""
        total = sum(weights.values())
        shares = {name: weight / total for name, weight in weights.items()}
        keys = list(begin)
        values = torch.tensor([begin[key] for key in keys], dtype=torch.float64)
        adam = torch.optim.Adam([values.requires_grad_()], lr=self._config.rate, betas=(0.8, 0.95))
        points = []
        for step in range(n_steps):
            adam.param_groups[0]["lr"] = self._config.rate * (1 - step / n_steps)
            values.grad = self._slope(dict(zip(keys, values.tolist(), strict=True)), shares)
            adam.step()
            with torch.no_grad():
                values.clamp_(self._config.low, self._config.high)
            if step + 1 in (math.ceil(n_steps / 2), n_steps):
                points.append(self._measure(dict(zip(keys, values.tolist(), strict=True)), shares))
        return min(points, key=lambda point: _height(point.losses, self._apart_floors, shares))

    def _slope(self, lambdas: Coefficients, shares: Mapping[str, float]) -> Tensor:
        """Return the slope of what falls, on the next items."""
        recipe, (items, floors) = at(self._start, lambdas), next(self._batches)
        found = slopes(self._engine, self._merger, recipe, items)
        self.n_passes += found.n_passes
        self._history.append(found.losses)
        factors = _factors(found.losses, floors, shares)
        table = found.by_group(recipe.groups)
        total = dict.fromkeys(lambdas, 0.0)
        for row in table[table["parameter"] == "lambda"].to_dict("records"):
            total[row["group"], row["expert"]] += factors[row["score_name"]] * row["slope"]
        return torch.tensor(list(total.values()), dtype=torch.float64)

    def _measure(self, lambdas: Coefficients, shares: Mapping[str, float]) -> Point:
        recipe = at(self._start, lambdas)
        return Point(recipe, self._losses(recipe, self._apart), shares)

    def _losses(self, recipe: MergeRecipe, items: References) -> Losses:
        self._engine.load(recipe)
        self.n_passes += len(items.items)
        return mean_losses(self._engine.model, items)

    def _best_losses(self, items: References) -> Losses:
        """Return the best expert's loss of each objective."""
        items = _only(items, set(self._suite.objectives))
        alone = [self._losses(self._expert(expert), items) for expert in self._start.experts]
        return {name: min(losses[name] for losses in alone) for name in items.by_score}

    def _floors(self, items: References, best: Losses) -> Losses:
        """Return these, and what each guard's reference loses on these items."""
        floors = dict(best)
        for name, guard in self._suite.guards.items():
            own = _only(items, {name})
            if own.items:
                floors |= self._losses(self._expert(guard.reference), own)
        return {name: max(floor, _TINY) for name, floor in floors.items()}

    def _expert(self, name: str) -> MergeRecipe:
        """Return the recipe of an expert alone; of any other name, of the base."""
        return at(self._start, {key: float(key[1] == name) for key in coefficients(self._start)})


def _factors(losses: Losses, floors: Losses, shares: Mapping[str, float]) -> dict[str, float]:
    """Return the derivative of what falls with respect to each loss."""
    factors = {}
    for name, loss in losses.items():
        if name in shares:
            factors[name] = shares[name] / (loss + floors[name])
        else:
            factors[name] = 1 / loss if loss > floors[name] else 0.0
    return factors


def _height(losses: Losses, floors: Losses, shares: Mapping[str, float]) -> float:
    """Return what falls."""
    total = 0.0
    for name, loss in losses.items():
        if name in shares:
            total += shares[name] * math.log(loss + floors[name])
        else:
            total += math.log(max(loss / floors[name], 1.0))
    return total


def _only(references: References, names: set[str]) -> References:
    return replace(references, items=tuple(each for each in references.items if each.score_name in names))


def _cut(references: References, n_items: int) -> list[References]:
    """Cut references into batches with this many items of each score; who has fewer begins anew."""
    own = list(references.by_score.values())
    begins = range(0, max(map(len, own)), n_items)
    return [
        replace(
            references,
            items=tuple(
                each[i % len(each)] for each in own for i in range(begin, begin + min(n_items, len(each)))
            ),
        )
        for begin in begins
    ]
