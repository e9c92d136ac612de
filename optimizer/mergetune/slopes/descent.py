"""Descent: a few steps to where slopes lead, and the points along the predicted front."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mergetune.engines.transformers_engine import TransformersEngine
from mergetune.errors import MergetuneError
from mergetune.evaluation.suite import SuiteConfig
from mergetune.merging.merger import Merger
from mergetune.results.roles import reference_name
from mergetune.results.selection import Scores
from mergetune.slopes.gradients import count_passes, slopes
from mergetune.slopes.losses import MAX_TOKENS, mean_losses
from mergetune.slopes.references import References
from mergetune.slopes.score_link import TINY, ScoreLink, fit_link
from mergetune.slopes.surrogate import SeenSlopes, SeenValues, Surrogate, minimized
from mergetune.space.recipe import MergeRecipe
from mergetune.space.search_space import SearchSpace, nearest_in
from mergetune.stats.gains import clear_gains, loss_rate

Params = dict[str, float]  # a point of the search space
Losses = Mapping[str, float]
Weights = Mapping[str, float]  # of the objectives

_CLEARLY = math.log(2)  # worse than the start on held-out items, which are few
_SURE = 0.05  # nats, ε below: losses of a guard that are smaller differ by little
_ROUGH = 1.0  # how far off log-odds are where no score tells them
_UNEVEN = 0.5  # how far off the log of a guard's loss over its reference's is on a few items


@dataclass(frozen=True)
class DescentConfig:
    """How far and how carefully to descend; nothing here depends on the models.

    A lambda's natural unit is 1, one whole expert: so one reach fits all.

    Attributes:
        full_evaluations: the most that it may cost, in evaluations of the search split; it settles how many
            items of each score a step looks at, and with few items how many steps there are.
        fewest: the fewest items of each score that a step looks at.
        most: the most.
        held_out: the most items of each score that tell whether a point is worse than the start, fewer where
            these would cost more than half of it all; never descended on.
        first_steps: steps with the objectives' own weights.
        next_steps: steps with each other weighting.
        reach: how far a step may change a coefficient.
        caution: standard deviations by which a loss that was not seen is taken to be worse than expected.
        emphasis: how many times more one objective counts than by its own weight, in its own weighting.
    """

    full_evaluations: float = 3.0
    fewest: int = 2
    most: int = 16
    held_out: int = 4
    first_steps: int = 3
    next_steps: int = 2
    reach: float = 0.5
    caution: float = 1.0
    emphasis: float = 10.0


@dataclass(frozen=True)
class MeasuredModel:
    """A model measured before: its recipe, and its scores on the search split."""

    recipe: MergeRecipe
    scores: Scores


@dataclass(frozen=True)
class Problem:
    """What a descent goes over.

    Attributes:
        engine: the model that candidates are loaded into.
        merger: the models that are merged.
        space: what may change, and within which ranges.
        references: what to say to items of the search split.
        suite: the suite's file.
        known: models measured before, by candidate name: the base, the experts, and merges; their losses tell
            what a loss is worth.
        scored: points of the space with the scores measured there.
        n_texts: the texts of all items of the search split: what one full evaluation costs, in forward passes
            of one text.
        max_tokens: the most tokens in one batch.
    """

    engine: TransformersEngine
    merger: Merger
    space: SearchSpace
    references: References
    suite: SuiteConfig
    known: Mapping[str, MeasuredModel]
    scored: Sequence[tuple[Params, Scores]]
    n_texts: int
    max_tokens: int = MAX_TOKENS


@dataclass(frozen=True)
class Point:
    """Where a descent came to, with the losses there on the held-out items."""

    params: Params
    losses: Losses


@dataclass(frozen=True)
class Descent:
    """Points that are not clearly worse than the start, each for its own weighting, and what they cost.

    Attributes:
        points: the points, that of the objectives' own weights first if it is among them.
        n_passes: the cost in forward passes of one text.
        full_evaluations: the cost in evaluations of the search split.
    """

    points: tuple[Point, ...]
    n_passes: int
    full_evaluations: float


def most_points(n_objectives: int) -> int:
    """Return how many points a descent finds at most: one for each weighting of the objectives."""
    return 1 + n_objectives if n_objectives > 1 else 1


def descend(
    problem: Problem,
    start: Params,
    config: DescentConfig = DescentConfig(),
    on_step: Callable[[int, int], None] = lambda _step, _of: None,
) -> Descent:
    """Follow the slopes from a point of the search space to points along the front.

    What is to fall is log(Σ wₖ oₖ + Σ eⱼ). oₖ are the odds that an objective's gain is not kept, and eⱼ a
    guard's excess, max(0, (Lⱼ + ε) / (L'ⱼ + ε) − 1) with L'ⱼ for what its reference loses on the same items,
    and ε = 0.05 nats: a smooth maximum, and so near to the rule by which a study recommends.

    A surrogate of log o for each objective knows it from the scores of points that were measured before, and
    its slope, at each step, from some items: log o = s log(L / h), a law learned from models whose losses and
    scores are known. Another one knows log((L + ε) / (L' + ε)) of each guard. The next step goes where they
    expect the least, within reach of the last and of the best one. The objectives' own weights come first,
    then by turns weightings that emphasize one objective; at the end every weighting has its point, wherever
    the surrogates expect it. Densities stay as at the start. What is not paid for is left out: the last steps
    first, which emphasize an objective.

    Args:
        problem: the models, the search space and the items.
        start: a point of the space.
        config: how far and how carefully.
        on_step: told after each step which one it was, of how many.

    Raises:
        MergetuneError: the method has no slopes, or a single step would cost more than `config` allows.
        TrialError: a weight, a loss or a slope became infinite or NaN.
    """
    return _DescentRun(problem, config, on_step).run(start)


class _Seen:
    """What is known of one score's value over the coefficients, and the surrogate that this teaches."""

    def __init__(self) -> None:
        self._values: list[tuple[Tensor, float, float]] = []
        self._slopes: list[tuple[Tensor, Tensor]] = []
        self._surrogate: Surrogate | None = None

    def add_value(self, point: Tensor, value: float, noise: float) -> None:
        self._values.append((point, value, noise))

    def add_slope(self, point: Tensor, slope: Tensor) -> None:
        self._slopes.append((point, slope))

    def learn(self) -> None:
        """Teach the surrogate all that was added."""
        points, values, noises = zip(*self._values, strict=True)
        self._surrogate = Surrogate(
            SeenValues(torch.stack(points), torch.tensor(values).double(), torch.tensor(noises).double()),
            SeenSlopes(*map(torch.stack, zip(*self._slopes, strict=True))),
            self._surrogate.hyperparameters if self._surrogate else None,
        )

    def posterior(self, point: Tensor, caution: float) -> Tensor:
        """Return the value at a point, cautiously."""
        assert self._surrogate is not None  # a step was taken
        return self._surrogate.upper(point, caution)


class _DescentRun:
    """One descent under way."""

    def __init__(self, problem: Problem, config: DescentConfig, on_step: Callable[[int, int], None]) -> None:
        self._problem, self._config, self._on_step = problem, config, on_step
        self._shares = problem.space.smooth_shares()
        self._keys = list(dict.fromkeys(share.key for share in self._shares))
        ranges = [problem.space.distributions[key] for key in self._keys]
        self._low = torch.tensor([each.low for each in ranges]).double()
        self._high = torch.tensor([each.high for each in ranges]).double()
        objectives, guards = problem.suite.objectives, problem.suite.guards
        with_references = problem.references.by_score
        self._objectives = [name for name in objectives if name in with_references]
        self._guards = [name for name in guards if name in with_references]
        self._seen = {name: _Seen() for name in (*self._objectives, *self._guards)}
        self._weightings = self._all_weightings()
        own, *others = self._weightings
        schedule = [own] * config.first_steps + others * config.next_steps
        plan = _plan(problem, config, len(schedule), len(self._weightings))
        self._schedule, self._held_out = schedule[: plan.n_steps], plan.held_out
        self._n_passes = 0
        self._links, self._held_out_allowed = self._learn()
        self._batches = itertools.cycle([(batch, self._allowed(batch)) for batch in plan.batches])

    def run(self, start: Params) -> Descent:
        begin = self._measured(start)
        self._recall(begin)
        at = self._point(start)
        visited: list[Tensor] = []
        for step, weights in enumerate(self._schedule, start=1):
            if visited:
                at = self._minimizer(
                    weights, [visited[-1], self._incumbent(visited, weights)], self._config.reach
                )
            self._look({**start, **self._named(at)}, at)
            visited.append(at)
            self._on_step(step, len(self._schedule))
        origin = {**start, **self._nearest(self._point(start))}
        kept: dict[str, Point] = {}
        for weights in self._weightings:
            least = self._minimizer(weights, [self._incumbent(visited, weights)])
            end = self._measured({**start, **self._nearest(least)})
            if (
                end.params != origin
                and self._held_out_value(end, weights) < self._held_out_value(begin, weights) + _CLEARLY
            ):
                kept[str(end.params)] = end
        return Descent(tuple(kept.values()), self._n_passes, self._n_passes / self._problem.n_texts)

    def _all_weightings(self) -> list[Weights]:
        """Return the objectives' own weights, and those that emphasize one of several."""
        own = {name: self._problem.suite.objectives[name].weight for name in self._objectives}
        others = self._objectives if len(self._objectives) > 1 else []
        return [own, *({**own, name: own[name] * self._config.emphasis} for name in others)]

    def _learn(self) -> tuple[dict[str, ScoreLink], Losses]:
        """Learn from models measured before what an objective's loss is worth, and what a guard may lose."""
        known = self._problem.known
        losses = {name: self._losses(each.recipe, self._held_out) for name, each in known.items()}
        links = {}
        for name in self._objectives:
            shares = [self._kept_share(name, each.scores) for each in known.values()]
            links[name] = fit_link([own[name] for own in losses.values()], shares)
        guards = self._problem.suite.guards
        return links, {name: losses[reference_name(guards[name])][name] for name in self._guards}

    def _kept_share(self, name: str, scores: Scores) -> float:
        """Return the share that scores keep of the gain between the worst and the best known.

        The less sure the gain is (see `gains`), the more of it is kept by all: there is little to lose.
        """
        sign = self._problem.suite.objectives[name].sign
        known = sorted(
            (each.scores[name] for each in self._problem.known.values()), key=lambda s: sign * s.value
        )
        gain = np.array([sign * (known[-1].value - known[0].value)])
        clear = clear_gains(np.array([math.hypot(known[0].stderr, known[-1].stderr)]), 1.0)
        lost = sign * (known[-1].value - scores[name].value) * loss_rate(gain, gain / clear, math.inf)
        return float(np.clip(1 - lost, 0, 1)[0])

    def _recall(self, begin: Point) -> None:
        """Learn from the scores of points measured before that differ from the start in nothing else."""
        fixed = {key: value for key, value in begin.params.items() if key not in self._keys}
        is_scored = any(params == begin.params for params, _ in self._problem.scored)
        for name in self._objectives:
            for params, scores in self._problem.scored:
                if fixed.items() <= params.items():
                    n_items, share = scores[name].n_items, self._kept_share(name, scores)
                    kept = (share * n_items + 0.5) / (n_items + 1)  # never none and never all
                    noise = ((n_items + 1) * kept * (1 - kept)) ** -0.5
                    self._seen[name].add_value(self._point(params), math.log(1 / kept - 1), noise)
            if not is_scored:
                log_odds = self._links[name].log_odds(begin.losses[name])
                self._seen[name].add_value(self._point(begin.params), log_odds, _ROUGH)

    def _allowed(self, items: References) -> Losses:
        """Return what each guard's reference loses on these items."""
        guards = self._problem.suite.guards
        allowed: dict[str, float] = {}
        for name in self._guards:
            reference = self._problem.known[reference_name(guards[name])]
            allowed |= self._losses(reference.recipe, items.only(name))
        return allowed

    def _look(self, params: Params, at: Tensor) -> None:
        """Learn from the losses and slopes at a point, on the next items."""
        recipe, (items, allowed) = self._problem.space.recipe(params), next(self._batches)
        found = slopes(
            self._problem.engine, self._problem.merger, recipe, items, max_tokens=self._problem.max_tokens
        )
        self._n_passes += sum(found.n_passes.values())
        table = found.by_group(recipe.groups)
        for name, seen in self._seen.items():
            loss = found.losses[name]
            own = table[table["score_name"] == name].set_index(["group", "parameter", "expert"])["slope"]
            slope = dict.fromkeys(self._keys, 0.0)
            for share in self._shares:
                slope[share.key] += share.weight * own.get((share.group, share.parameter, share.expert), 0.0)
            if name in allowed:
                seen.add_value(at, _excess(loss, allowed[name]), _UNEVEN)
                factor = 1 / (loss + _SURE)
            else:
                factor = self._links[name].log_odds_slope(loss)
            seen.add_slope(at, factor * torch.tensor(list(slope.values())).double())
            seen.learn()

    def _minimizer(self, weights: Weights, begins: Sequence[Tensor], reach: float = math.inf) -> Tensor:
        """Return where the least is expected, cautiously, within reach of one of these points."""

        def acquisition(at: Tensor) -> Tensor:
            return self._scalarized(self._posterior(at, self._config.caution), weights)

        found = [
            minimized(
                acquisition,
                begin,
                (begin - reach).clamp(min=self._low),
                (begin + reach).clamp(max=self._high),
            )
            for begin in begins
        ]
        return min(found, key=lambda each: each[0])[1]

    def _incumbent(self, points: Sequence[Tensor], weights: Weights) -> Tensor:
        """Return the point where the least is expected."""
        return min(points, key=lambda point: float(self._scalarized(self._posterior(point, 0.0), weights)))

    def _posterior(self, at: Tensor, caution: float) -> dict[str, Tensor]:
        return {name: seen.posterior(at, caution) for name, seen in self._seen.items()}

    def _held_out_value(self, end: Point, weights: Weights) -> float:
        """Return the scalarized objective at a point, on the held-out items."""
        values = {name: self._links[name].log_odds(end.losses[name]) for name in self._objectives}
        values |= {name: _excess(end.losses[name], self._held_out_allowed[name]) for name in self._guards}
        return float(self._scalarized({name: torch.tensor(value) for name, value in values.items()}, weights))

    def _scalarized(self, values: Mapping[str, Tensor], weights: Weights) -> Tensor:
        """Return the scalarized objective: the log of weighted odds and of what guards lose beyond theirs."""
        total = torch.tensor(TINY).double()
        for name, weight in weights.items():
            total = total + weight / sum(weights.values()) * values[name].exp()
        for name in self._guards:
            total = total + torch.expm1(values[name]).clamp(min=0)
        return total.log()

    def _point(self, params: Params) -> Tensor:
        return torch.tensor([params[key] for key in self._keys]).double()

    def _measured(self, params: Params) -> Point:
        return Point(params, self._losses(self._problem.space.recipe(params), self._held_out))

    def _named(self, values: Tensor) -> Params:
        return dict(zip(self._keys, values.tolist(), strict=True))

    def _nearest(self, values: Tensor) -> Params:
        """Return the point of the space that lies nearest."""
        distributions = self._problem.space.distributions
        return {key: nearest_in(distributions[key], value) for key, value in self._named(values).items()}

    def _losses(self, recipe: MergeRecipe, items: References) -> Losses:
        self._problem.engine.load(recipe)
        self._n_passes += items.n_texts
        return mean_losses(self._problem.engine.model, items, self._problem.max_tokens)


@dataclass(frozen=True)
class _Plan:
    """The held-out items, and how many steps there are over batches of the others, taken by turns."""

    held_out: References
    batches: list[References]
    n_steps: int


def _plan(problem: Problem, config: DescentConfig, n_steps: int, n_ends: int) -> _Plan:
    """Return the steps that are paid for, with as many items each as that allows.

    Raises:
        MergetuneError: not a single step is paid for.
    """
    n_measured = len(problem.known) + 1 + n_ends  # the known models, the start and the ends
    allowed = config.full_evaluations * problem.n_texts
    for n_held_out in range(config.held_out, 0, -1):
        held_out, rest = problem.references.parts(n_held_out)
        spent = n_measured * held_out.n_texts
        if spent <= allowed / 2:
            break
    fewer = [(config.fewest, count) for count in range(n_steps - 1, 0, -1)]
    for size, count in [*((size, n_steps) for size in range(config.most, config.fewest - 1, -1)), *fewer]:
        batches = rest.cut(size)[:count]
        cost = spent + _cost_of_steps(batches, count, problem)
        if cost <= allowed:
            return _Plan(held_out, batches, count)
    raise MergetuneError(
        f"Slopes may cost up to {config.full_evaluations:g} evaluations of the search split, but on so few "
        f"items the shortest descent costs {cost / problem.n_texts:.1f}. Give more items of each score, or "
        "search without slopes."
    )


def _cost_of_steps(batches: Sequence[References], n_steps: int, problem: Problem) -> int:
    """Return what steps cost, and the losses of the guards' references, in forward passes of one text."""
    of_slopes = [
        sum(count_passes(own, problem.max_tokens) for own in batch.by_score.values()) for batch in batches
    ]
    of_guards = sum(batch.only(name).n_texts for batch in batches for name in problem.suite.guards)
    return sum(of_slopes[i % len(of_slopes)] for i in range(n_steps)) + of_guards


def _excess(loss: float, allowed: float) -> float:
    """Return the log of a guard's loss over its reference's."""
    return math.log((loss + _SURE) / (allowed + _SURE))
