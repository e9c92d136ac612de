"""Descent: steps along the slopes of what a merge loses, in as many coefficients as there are."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from mergetune.engines.transformers_engine import TransformersEngine
from mergetune.evaluation.suite import SuiteConfig
from mergetune.files.yaml_io import Strict
from mergetune.merging.merger import Merger
from mergetune.results.roles import reference_name
from mergetune.results.selection import Scores
from mergetune.slopes.gradients import Slopes, count_passes, slopes
from mergetune.slopes.losses import MAX_TOKENS, losses_by_task, mean_losses, mean_of_tasks
from mergetune.slopes.references import References
from mergetune.slopes.score_link import TINY, ScoreLink, fit_link
from mergetune.space.recipe import MergeRecipe
from mergetune.space.search_space import SearchSpace, Share, nearest_in
from mergetune.stats.gains import clear_gains, loss_rate

Params = dict[str, float]  # a point of the search space
Weights = Mapping[str, float]  # of the objectives

_RATE, _SLOWER = 0.1, 20  # of Adam: the rate falls as 1 / √(1 + steps / 20); a lambda's natural unit is 1
_N_ITEMS = 4  # of each score that a step looks at, at most
_FEWEST, _MOST = 5, 20  # steps from one checkpoint to the next
_AVERAGED = 5  # the last steps, whose mean a checkpoint is
_N_LEARNED = 8  # items of each objective that tell what its loss is worth
_N_GUARDED = 64  # items of each guard that are followed, at most
_SURE = 0.05  # nats, ε below: losses of a guard that are smaller differ by little


@dataclass(frozen=True)
class MeasuredModel:
    """A model measured before: its recipe, and its scores on the search split."""

    recipe: MergeRecipe
    scores: Scores


class Laws(Strict):
    """What losses are worth, learned from models measured before.

    Attributes:
        links: of each objective, from its loss to the odds that its gain is lost.
        allowed: of each guard, by task and item, what its reference loses there.
        n_passes: what learning them cost, in forward passes of one text.
    """

    links: dict[str, ScoreLink]
    allowed: dict[str, dict[str, dict[str, float]]]
    n_passes: int


class Trajectory(Strict):
    """A descent under way, as it is kept: where it is, and Adam's moments there.

    Attributes:
        weights: of the objectives, by name.
        params: a point of the search space.
        mean: of the slopes, in the order of `Problem.keys`; empty before the first step.
        square: the mean of their squares.
        n_steps: how many steps were taken.
    """

    weights: dict[str, float]
    params: Params
    mean: tuple[float, ...] = ()
    square: tuple[float, ...] = ()
    n_steps: int = 0


@dataclass(frozen=True)
class Checkpoint:
    """Where some steps led to.

    Attributes:
        trajectory: the descent, to go on from.
        params: a point of the search space: the mean over the last steps, which is less noisy than their end
            (Polyak and Juditsky 1992).
        n_passes: what the steps cost, in forward passes of one text.
    """

    trajectory: Trajectory
    params: Params
    n_passes: int


@dataclass(frozen=True)
class Problem:
    """What a descent goes over.

    Attributes:
        merger: the models that are merged.
        space: what may change, and within which ranges.
        references: what to say to items of the search split.
        suite: the suite's file.
        n_texts: the texts of all items of the search split: what one full evaluation costs, in forward passes
            of one text.
    """

    merger: Merger
    space: SearchSpace
    references: References
    suite: SuiteConfig
    n_texts: int

    @cached_property
    def objectives(self) -> list[str]:
        """The objectives that have references."""
        with_references = self.references.by_score
        return [name for name in self.suite.objectives if name in with_references]

    @cached_property
    def guards(self) -> list[str]:
        """The guards that have references."""
        with_references = self.references.by_score
        return [name for name in self.suite.guards if name in with_references]

    @cached_property
    def learned(self) -> References:
        """The items that tell what an objective's loss is worth."""
        return self.references.only(*self.objectives).sample(_N_LEARNED)

    @cached_property
    def guarded(self) -> References:
        """The items of guards that are followed."""
        return self.references.only(*self.guards).sample(_N_GUARDED)

    @cached_property
    def batches(self) -> list[References]:
        """The items of each step, by turns; of a small split, which is not to be run many times, fewer."""
        items = self.references.only(*self.objectives).joined(self.guarded)
        for n_items in range(_N_ITEMS, 0, -1):
            found = items.cut(n_items)
            if _FEWEST * _cost(found[0]) <= self.n_texts:
                break
        return found

    @property
    def n_steps(self) -> int:
        """How many steps lead to a checkpoint: neither few nor many, for about the cost of measuring it."""
        return min(max(round(self.n_texts / _cost(self.batches[0])), _FEWEST), _MOST)

    @cached_property
    def shares(self) -> list[Share]:
        """How the smooth coefficients of recipes are made of those that can change."""
        return self.space.smooth_shares()

    @cached_property
    def keys(self) -> list[str]:
        """The coefficients that can change and have slopes."""
        return list(dict.fromkeys(share.key for share in self.shares))

    @cached_property
    def ends(self) -> tuple[Tensor, Tensor]:
        """The least and the greatest values of these coefficients, (n_keys,) each."""
        ranges = [self.space.distributions[key] for key in self.keys]
        low, high = ([getattr(each, end) for each in ranges] for end in ("low", "high"))
        return torch.tensor(low, dtype=torch.float64), torch.tensor(high, dtype=torch.float64)

    def gradients(self, found: Slopes, recipe: MergeRecipe) -> dict[str, Tensor]:
        """Return the slopes of each score's loss in the coefficients, in the order of `keys`."""
        gradients = {}
        for name, own in found.by_group(recipe.groups).groupby("score_name"):
            places = zip(own["group"], own["parameter"], own["expert"], strict=True)
            known = dict(zip(places, own["slope"], strict=True))
            slope = dict.fromkeys(self.keys, 0.0)
            for share in self.shares:
                place = (share.group, share.parameter, share.expert)
                slope[share.key] += share.weight * known.get(place, 0.0)
            gradients[str(name)] = torch.tensor(list(slope.values()), dtype=torch.float64)
        return gradients

    def nearest(self, params: Mapping[str, float], values: Tensor) -> Params:
        """Return the point of the space that lies nearest where these coefficients have these values."""
        ranges = self.space.distributions
        moved = zip(self.keys, values.tolist(), strict=True)
        return {**params, **{key: nearest_in(ranges[key], value) for key, value in moved}}


def _cost(items: References) -> int:
    """Return what a step costs, in forward passes of one text."""
    return sum(count_passes(own, MAX_TOKENS) for own in items.by_score.values())


def learn_laws(
    engine: TransformersEngine,
    problem: Problem,
    known: Mapping[str, MeasuredModel],
    max_tokens: int = MAX_TOKENS,
) -> Laws:
    """Learn from models measured before what losses are worth.

    Args:
        engine: the model that they are loaded into.
        problem: the items.
        known: the models, by candidate name: the base, the experts, and merges.
        max_tokens: the most tokens in one batch.

    Raises:
        TrialError: a weight or a loss became infinite or NaN.
    """
    losses: list[dict[str, float]] = []
    allowed: dict[str, dict[str, dict[str, float]]] = {}
    n_passes = 0
    for name, model in known.items():
        engine.load(model.recipe)
        losses.append(mean_losses(engine.model, problem.learned, max_tokens))
        referred = [each for each in problem.guards if reference_name(problem.suite.guards[each]) == name]
        items = problem.guarded.only(*referred)
        allowed |= losses_by_task(engine.model, items, max_tokens)
        n_passes += problem.learned.n_texts + items.n_texts
    links = {
        name: fit_link([own[name] for own in losses], _kept_shares(name, problem.suite, known))
        for name in problem.objectives
    }
    return Laws(links=links, allowed=allowed, n_passes=n_passes)


def _kept_shares(name: str, suite: SuiteConfig, known: Mapping[str, MeasuredModel]) -> list[float]:
    """Return the share that each model keeps of the gain between the worst and the best known.

    The less sure the gain is (see `gains`), the more of it is kept by all: there is little to lose.
    """
    sign, scores = suite.objectives[name].sign, [each.scores[name] for each in known.values()]
    worst, *_, best = sorted(scores, key=lambda score: sign * score.value)
    gain = np.array([sign * (best.value - worst.value)])
    clear = clear_gains(np.array([math.hypot(worst.stderr, best.stderr)]), 1.0)
    rate = loss_rate(gain, gain / clear, math.inf)[0]
    return [float(np.clip(1 - sign * (best.value - score.value) * rate, 0, 1)) for score in scores]


def take_steps(
    engine: TransformersEngine,
    problem: Problem,
    laws: Laws,
    trajectory: Trajectory,
    n_steps: int,
    on_step: Callable[[int], None] = lambda _step: None,
    max_tokens: int = MAX_TOKENS,
) -> Checkpoint:
    """Go on along the slopes.

    What is to fall is log(Σ wₖ oₖ + Σ eⱼ). oₖ are the odds that an objective's gain is not kept, by its law
    of the loss, and eⱼ a guard's excess, max(0, (Lⱼ + ε) / (L'ⱼ + ε) − 1) with L'ⱼ for what its reference
    loses on the same items, and ε = 0.05 nats: a smooth maximum, and so near to the rule by which a study
    recommends. Each step takes some items of every score and moves all coefficients by Adam (Kingma and Ba
    2015), within their ranges. Densities stay.

    Args:
        engine: the model that candidates are loaded into.
        problem: the models, the search space and the items.
        laws: what losses are worth.
        trajectory: where the descent is.
        n_steps: how many steps to take.
        on_step: told which step is being taken, from 1.
        max_tokens: the most tokens in one batch.

    Raises:
        MergetuneError: the method has no slopes.
        TrialError: a weight, a loss or a slope became infinite or NaN.
    """
    begin = [trajectory.params[key] for key in problem.keys]
    point = torch.tensor(begin, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([point])
    if trajectory.n_steps:
        adam.state[point] = {
            "step": torch.tensor(float(trajectory.n_steps)),
            "exp_avg": torch.tensor(trajectory.mean, dtype=torch.float64),
            "exp_avg_sq": torch.tensor(trajectory.square, dtype=torch.float64),
        }
    n_passes, visited = 0, []
    for step in range(1, n_steps + 1):
        on_step(step)
        n_before = trajectory.n_steps + step - 1
        items = problem.batches[n_before % len(problem.batches)]
        moved = zip(problem.keys, point.tolist(), strict=True)
        recipe = problem.space.recipe({**trajectory.params, **dict(moved)})
        found = slopes(engine, problem.merger, recipe, items, max_tokens=max_tokens)
        n_passes += sum(found.n_passes.values())
        point.grad = _gradient(problem, laws, trajectory.weights, found, items, recipe)
        adam.param_groups[0]["lr"] = _RATE / math.sqrt(1 + n_before / _SLOWER)
        adam.step()
        with torch.no_grad():
            point.clamp_(*problem.ends)
        visited.append(point.detach().clone())
    moments = adam.state[point]
    end = trajectory.model_copy(
        update={
            "params": {**trajectory.params, **dict(zip(problem.keys, point.tolist(), strict=True))},
            "mean": tuple(moments["exp_avg"].tolist()),
            "square": tuple(moments["exp_avg_sq"].tolist()),
            "n_steps": trajectory.n_steps + n_steps,
        }
    )
    mean = torch.stack(visited[-_AVERAGED:]).mean(0)
    return Checkpoint(end, problem.nearest(trajectory.params, mean), n_passes)


def _gradient(
    problem: Problem, laws: Laws, weights: Weights, found: Slopes, items: References, recipe: MergeRecipe
) -> Tensor:
    """Return the slope of what is to fall, in the coefficients."""
    total, slope = TINY, torch.zeros(len(problem.keys), dtype=torch.float64)
    gradients = problem.gradients(found, recipe)
    for name, weight in weights.items():
        loss, link = found.losses[name], laws.links[name]
        odds = weight / sum(weights.values()) * math.exp(link.log_odds(loss))
        total += odds
        slope += odds * link.log_odds_slope(loss) * gradients[name]
    for name in problem.guards:
        allowed = _allowed(laws.allowed[name], items.only(name)) + _SURE
        excess = (found.losses[name] + _SURE) / allowed - 1
        if excess > 0:
            total += excess
            slope += gradients[name] / allowed
    return slope / total


def _allowed(losses: Mapping[str, Mapping[str, float]], items: References) -> float:
    """Return what a guard's reference loses on these items."""
    by_task: dict[str, dict[str, float]] = {}
    for each in items.items:
        by_task.setdefault(each.task, {})[each.item] = losses[each.task][each.item]
    return mean_of_tasks(by_task.values())


def emphasized(own: Weights, name: str, factor: float = 10.0) -> dict[str, float]:
    """Return weights with one objective that counts so many times more."""
    return {**own, name: own[name] * factor}
