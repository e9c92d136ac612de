"""Descent: a few steps along the slopes, from one weighting of the objectives to the next."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from optimizer import pareto
from optimizer.engines.transformers_engine import TransformersEngine
from optimizer.gradients import PASSES, slopes
from optimizer.losses import mean_losses
from optimizer.merging.merger import Merger
from optimizer.recipe import MergeRecipe
from optimizer.references import References
from optimizer.score_link import TINY, ScoreLink, fit_link
from optimizer.search_space import SearchSpace, nearest_in
from optimizer.selection import Scores, reference_name
from optimizer.suite import SuiteConfig

Params = dict[str, float]  # a point of the search space
Losses = Mapping[str, float]

_NEW = 0.3  # of the newest step in the running mean of a loss


@dataclass(frozen=True)
class DescentConfig:
    """How far and how carefully to descend; nothing here depends on the models.

    A lambda's natural unit is 1, one whole expert, and Adam's steps are as long as its rate whatever
    the slopes' scale is: so one rate fits all. It falls linearly to zero over the steps.

    Attributes:
        full_evaluations: the cost to aim at, in evaluations of the search split; it settles how many items
            of each score a step looks at.
        fewest: but not fewer than this many.
        most: nor more.
        apart: items of each score that choose among the points and are never descended on.
        first_steps: steps with the objectives' own weights.
        next_steps: steps that lead from there to each other weighting.
        rate: the first step's length.
        emphasis: how many times more one objective counts than by its own weight, in its own weighting.
    """

    full_evaluations: float = 4.0
    fewest: int = 2
    most: int = 16
    apart: int = 4
    first_steps: int = 8
    next_steps: int = 3
    rate: float = 0.2
    emphasis: float = 4.0


@dataclass(frozen=True)
class Known:
    """A model measured before: its recipe, and its scores on the search split."""

    recipe: MergeRecipe
    scores: Scores


@dataclass(frozen=True)
class Ground:
    """What a descent goes over.

    Attributes:
        engine: the model that candidates are loaded into.
        merger: the models that are merged.
        space: what may change, and within which ranges.
        references: what to say to items of the search split.
        suite: the suite's file.
        known: models measured before, by candidate name: the base, the experts, and merges.
        n_items: the items of the search split, one full evaluation.
    """

    engine: TransformersEngine
    merger: Merger
    space: SearchSpace
    references: References
    suite: SuiteConfig
    known: Mapping[str, Known]
    n_items: int


@dataclass(frozen=True)
class Point:
    """Where a descent came to, with the losses there on the items that were kept apart."""

    params: Params
    losses: Losses


@dataclass(frozen=True)
class Descent:
    """Points that no other one betters in every objective's loss, nor the start, and what they cost.

    Attributes:
        points: the points, that of the objectives' own weights first if it is among them.
        n_passes: the cost in forward passes of one item; divided by a split's items it is in full
            evaluations.
        links: what each objective's loss was taken to be worth.
    """

    points: tuple[Point, ...]
    n_passes: int
    links: Mapping[str, ScoreLink]


def descend(
    ground: Ground,
    start: Params,
    config: DescentConfig = DescentConfig(),
    on_step: Callable[[int, int], None] = lambda _step, _of: None,
) -> Descent:
    """Follow the slopes from a point of the search space to points along the front.

    What falls is log(Σ wₖ oₖ + Σ eⱼ). oₖ = (Lₖ / hₖ)^sₖ are the odds of failure that an objective's loss
    lets one expect, learned from the losses and scores of models measured before: a smooth maximum, and so
    near to the rule by which a study recommends. eⱼ = max(0, Lⱼ − L'ⱼ) / L̄'ⱼ is a guard's excess, L'ⱼ being
    what its reference loses on the same items and L̄'ⱼ what it loses on those kept apart. The objectives'
    own weights come first; from there one stretch leads to each weighting that emphasizes one objective.
    Densities stay as at the start.

    Args:
        ground: the models, the search space and the items.
        start: a point of the space.
        config: how far and how carefully.
        on_step: told after each step which one it was, of how many.

    Raises:
        MergetuneError: the method has no slopes.
        TrialError: a weight became infinite or NaN.
    """
    return _Walk(ground, config, on_step).walk(start)


class _Walk:
    """One descent under way."""

    def __init__(self, ground: Ground, config: DescentConfig, on_step: Callable[[int, int], None]) -> None:
        self._ground, self._config, self._on_step = ground, config, on_step
        self._shares = ground.space.smooth_shares()
        self._keys = list(dict.fromkeys(share.key for share in self._shares))
        self._apart, rest = ground.references.parts(config.apart)
        self._objectives = [name for name in ground.suite.objectives if name in rest.by_score]
        self._others = self._objectives if len(self._objectives) > 1 else []
        self._n_steps = config.first_steps + len(self._others) * config.next_steps
        self._n_done = self._n_passes = 0
        self._links, self._scales = self._learn()
        batches = rest.cut(self._step_size(rest))[: self._n_steps]
        self._batches = itertools.cycle([(batch, self._allowed(batch)) for batch in batches])

    def walk(self, start: Params) -> Descent:
        weights = {name: self._ground.suite.objectives[name].weight for name in self._objectives}
        begin = self._measured(start)
        points = [first := self._stretch(begin, weights, self._config.first_steps)]
        for name in self._others:
            own = {**weights, name: weights[name] * self._config.emphasis}
            points.append(self._stretch(first, own, self._config.next_steps))
        every = [*points, begin]
        gains = np.array([[-point.losses[name] for name in self._objectives] for point in every])
        kept = {str(every[i].params): every[i] for i in sorted(pareto.front(gains))}
        kept.pop(str(begin.params), None)  # measured before
        return Descent(tuple(kept.values()), self._n_passes, self._links)

    def _step_size(self, items: References) -> int:
        """Return how many items of each score a step may look at, for what is left to spend."""
        to_come = (2 + len(self._others)) * len(self._apart.items)
        left = self._config.full_evaluations * self._ground.n_items - self._n_passes - to_come
        passes_of_one = PASSES * len(items.by_score) + len(self._scales)  # and the guards' references
        n_items = round(left / (self._n_steps * passes_of_one))
        return min(max(n_items, self._config.fewest), self._config.most)

    def _learn(self) -> tuple[dict[str, ScoreLink], dict[str, float]]:
        """Learn from models measured before what an objective's loss is worth, and how large a guard's is."""
        known, suite = self._ground.known, self._ground.suite
        losses = {name: self._losses(each.recipe, self._apart) for name, each in known.items()}
        links = {}
        for name in self._objectives:
            values = np.array(
                [suite.objectives[name].sign * each.scores[name].value for each in known.values()]
            )
            gain = float(np.ptp(values))
            shares = (values - values.min()) / gain if gain else np.ones_like(values)
            links[name] = fit_link([own[name] for own in losses.values()], shares.tolist())
        scales = {
            name: max(losses[reference_name(guard)][name], TINY)
            for name, guard in suite.guards.items()
            if name in self._apart.by_score
        }
        return links, scales

    def _allowed(self, items: References) -> Losses:
        """Return what each guard's reference loses on these items."""
        guards = self._ground.suite.guards
        allowed: dict[str, float] = {}
        for name in self._scales:
            reference = self._ground.known[reference_name(guards[name])]
            allowed |= self._losses(reference.recipe, items.only(name))
        return allowed

    def _stretch(self, begin: Point, weights: Mapping[str, float], n_steps: int) -> Point:
        """Take some steps with one weighting."""
        ranges = [self._ground.space.distributions[key] for key in self._keys]
        low, high = (torch.tensor([getattr(each, end) for each in ranges]) for end in ("low", "high"))
        values = torch.tensor([begin.params[key] for key in self._keys], requires_grad=True)
        adam = torch.optim.Adam([values], betas=(0.8, 0.95))
        level = dict(begin.losses)
        for step in range(n_steps):
            adam.param_groups[0]["lr"] = self._config.rate * (1 - step / n_steps)
            values.grad = self._slope({**begin.params, **self._named(values)}, weights, level)
            adam.step()
            with torch.no_grad():
                values.copy_(values.clamp(low, high))
            self._n_done += 1
            self._on_step(self._n_done, self._n_steps)
        return self._measured({**begin.params, **self._named(values)})

    def _measured(self, params: Params) -> Point:
        space = self._ground.space
        params = {key: nearest_in(space.distributions[key], value) for key, value in params.items()}
        return Point(params, self._losses(space.recipe(params), self._apart))

    def _named(self, values: Tensor) -> Params:
        return dict(zip(self._keys, values.tolist(), strict=True))

    def _slope(self, params: Params, weights: Mapping[str, float], level: dict[str, float]) -> Tensor:
        """Return the slope of what falls, on the next items: (n_coefficients,).

        The few items of a step say little of how large a loss is; `level`, its running mean, does.
        """
        recipe, (items, allowed) = self._ground.space.recipe(params), next(self._batches)
        found = slopes(self._ground.engine, self._ground.merger, recipe, items)
        self._n_passes += found.n_passes
        for name, loss in found.losses.items():
            level[name] += _NEW * (loss - level[name])
        excess = {name: found.losses[name] - most for name, most in allowed.items()}
        factors = self._factors(level, weights, excess)
        table = found.by_group(recipe.groups)
        falls = table["slope"] * table["score_name"].map(factors)
        by_place = falls.groupby([table["group"], table["parameter"], table["expert"]]).sum().to_dict()
        total = dict.fromkeys(self._keys, 0.0)
        for share in self._shares:
            place = (share.group, share.parameter, share.expert)
            total[share.key] += share.weight * by_place.get(place, 0.0)
        return torch.tensor(list(total.values()))

    def _factors(self, level: Losses, weights: Mapping[str, float], excess: Losses) -> dict[str, float]:
        """Return the derivative of what falls with respect to each loss."""
        total, own = TINY, {}
        for name, weight in weights.items():
            share = weight / sum(weights.values())
            total += share * self._links[name].odds(level[name])
            own[name] = share * self._links[name].odds_slope(level[name])
        for name, scale in self._scales.items():
            total += max(excess[name], 0) / scale
            own[name] = 1 / scale if excess[name] > 0 else 0.0
        return {name: slope / total for name, slope in own.items()}

    def _losses(self, recipe: MergeRecipe, items: References) -> Losses:
        self._ground.engine.load(recipe)
        self._n_passes += len(items.items)
        return mean_losses(self._ground.engine.model, items)
