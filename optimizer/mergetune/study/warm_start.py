"""The warm start: points that the slopes of losses lead to, from which the sampler goes on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pydantic import Field

from mergetune.errors import MergetuneError
from mergetune.files.yaml_io import Strict
from mergetune.machine import clock
from mergetune.machine.memory import in_smaller_batches
from mergetune.measuring.attempts import attempt
from mergetune.results import roles, selection
from mergetune.results.config import WarmStartConfig
from mergetune.results.roles import uniform_name
from mergetune.results.run_dir import Candidate, SpaceKind, WarmStart, readable
from mergetune.slopes.descent import (
    Checkpoint,
    Laws,
    MeasuredModel,
    Params,
    Problem,
    Trajectory,
    emphasized,
    learn_laws,
    take_steps,
)
from mergetune.space.front_space import FrontSpace
from mergetune.space.search_space import SearchSpace, nearest_in
from mergetune.study.baselines import baselines
from mergetune.study.candidates import Candidates, Proposal
from mergetune.study.slopes import study_references

if TYPE_CHECKING:
    from mergetune.engines.transformers_engine import TransformersEngine

_WARM_START = "warm_start"  # names attempts
_OWN = ""  # the trajectory of the objectives' own weights; others are named after the objective emphasized
_PATIENCE = 4  # checkpoints without a better merge that end it
_N_EMPHASIZED = 2  # checkpoints of each other trajectory

log = logging.getLogger("mergetune")


class _Checkpoint(Strict):
    """A point that steps led to, by its candidate's name; `n_passes` of one text it took to get there."""

    name: str
    trajectory: str
    params: Params
    n_passes: int


class _Record(WarmStart):
    """What the run directory keeps of a warm start: also what the descent goes on from."""

    laws: Laws | None = None
    start: Params = Field(default_factory=dict)
    trajectories: dict[str, Trajectory] = Field(default_factory=dict)
    checkpoints: tuple[_Checkpoint, ...] = ()


def check_warm_start(config: WarmStartConfig, fine: SearchSpace) -> None:
    """Raise `MergetuneError` if slopes are asked for, and the space to descend in has none."""
    if config.kind == "gradient" and not fine.smooth_shares():
        raise MergetuneError(f"`warm_start: gradient` cannot be done: {_no_slopes(fine)}")


@dataclass(frozen=True)
class Searched:
    """The space that a sampler searches, and where candidates lie in it that are points of another.

    Attributes:
        space: the study's own, or the one around the points of the warm start.
        kind: which of the two.
        places: points of the space, by the name of a candidate whose own is of another space.
    """

    space: SearchSpace | FrontSpace
    kind: SpaceKind
    places: Mapping[str, Params] = field(default_factory=dict)

    def point(self, candidate: Candidate) -> Params | None:
        """Return where a candidate lies in the space; None where it does not."""
        return candidate.params if candidate.space == self.kind else self.places.get(candidate.name)


class WarmStarter:
    """Follows the slopes for as long as that leads to better merges, and measures where they lead.

    The descent of the objectives' own weights begins at the best of the baselines. When some checkpoints in
    a row brought no better merge, a few steps emphasize each objective by turns, for the ends of the front.
    All of it is kept in the run directory after every checkpoint.

    Args:
        candidates: where the baselines were measured.
        config: whether to follow slopes at all.
        space: the study's search space.
        fine: the space to descend in, of the grain that `config` names.
        why_spent: says why no more is to be measured; nothing as long as there is a budget.
    """

    def __init__(
        self,
        candidates: Candidates,
        config: WarmStartConfig,
        space: SearchSpace,
        fine: SearchSpace,
        why_spent: Callable[[], str],
    ) -> None:
        self._candidates, self._config, self._why_spent = candidates, config, why_spent
        self._space, self._fine = space, fine
        self._is_own = fine.config == space.config
        self._problem: Problem | None = None
        self._done: set[str] = set()  # checkpoints that need not be measured any more
        with readable(candidates.run.path / "warm_start.json"):
            self._record = _Record.model_validate(candidates.run.warm_start_record() or {})

    def run(self) -> Searched:
        """Go on with the descent until it ends; returns the space that a sampler searches from there.

        Raises:
            MergetuneError: it was asked for and cannot be done.
        """
        self._measure()  # what was lost, too
        while not self._record.is_over and not self._why_spent():
            name = self._next()
            if name is None:
                self._end()
            else:
                self._follow(name)
                if self._record.reason is not None:
                    self._end()
            self._measure()
        return self._searched()

    def _searched(self) -> Searched:
        points, inputs = self._record.points, self._candidates.inputs
        if not points or self._is_own:
            return Searched(self._space, "search_space")
        around = FrontSpace(self._fine, points, self._space, inputs.base.names)
        listed = {name: around.place(params) for name, params in self._baselines().items()}
        places = {name: place for name, place in listed.items() if place is not None}
        places |= {name: around.corner(name) for name in points}
        return Searched(around, "front", places)

    def _measure(self) -> None:
        """Measure the checkpoints that are not yet, as far as the budget goes."""
        self._candidates.measure_all(self._unmeasured())

    def _unmeasured(self) -> Iterator[Proposal]:
        for each in self._record.checkpoints:
            if each.name in self._done:
                continue
            params = each.params if self._is_own else None
            proposal = Proposal("slopes", each.name, self._fine.recipe(each.params), params)
            if self._candidates.known(proposal) is None and self._candidates.twin(proposal) is None:
                if self._why_spent():
                    return
                yield proposal
            self._done.add(each.name)

    def _next(self) -> str | None:
        """Return the trajectory to go on with; None where there is nothing more to gain."""
        if not self._record.checkpoints:
            return _OWN if self._can_begin() else None
        taken = [each.trajectory for each in self._record.checkpoints]
        names = [each.name for each in self._record.checkpoints]
        best = self._candidates.best
        n_since = taken[names.index(best) + 1 if best in names else 0 :].count(_OWN)
        if n_since < _PATIENCE:
            return _OWN
        objectives = list(self._record.trajectories[_OWN].weights)
        others = objectives if len(objectives) > 1 else []
        return next((name for name in others if taken.count(name) < _N_EMPHASIZED), None)

    def _can_begin(self) -> bool:
        if self._config.kind == "none":
            self._keep(reason="`warm_start: none`.")
        elif not self._fine.smooth_shares():
            self._candidates.progress.say(f"warm start: none; {_no_slopes(self._fine)}")
            self._keep(reason=_no_slopes(self._fine))
        return self._record.reason is None

    def _follow(self, name: str) -> None:
        """Take steps on one trajectory, or say why not."""
        candidates, began = self._candidates, clock.seconds()
        try:
            with attempt(candidates.run, _WARM_START):
                found = self._steps(name)
        except Exception as error:  # transformers and torch have many ways to say that they cannot
            if candidates.pool.ends_all(error):
                raise
            if self._config.kind == "gradient" and not self._record.checkpoints:
                candidates.run.forget_attempts(_WARM_START)
                raise MergetuneError(
                    f"`warm_start: gradient` cannot be done: {error}\nMend what is wrong and run the same "
                    "command again, or take `warm_start: auto`, which goes on without, in a new run "
                    "directory."
                ) from error
            log.exception("no warm start")
            candidates.progress.say(f"warm start: ended; {error}")
            found = {"reason": str(error)}
        self._keep(**found, seconds=self._record.seconds + clock.seconds() - began)

    def _steps(self, name: str) -> dict[str, object]:
        """Take the steps to the next checkpoints of a trajectory; returns what is new in the record."""
        candidates, record = self._candidates, self._record
        n_checkpoints = candidates.pool.n_at_once
        with candidates.pool.transformers() as engine:
            problem = self._problem = self._problem or self._make_problem(engine)
            laws, start, n_passes = record.laws, record.start, 0
            if laws is None:
                known, start = self._known()
                laws = in_smaller_batches(
                    lambda n_tokens: learn_laws(engine, problem, known, n_tokens), candidates.progress.say
                )
                n_passes = laws.n_passes
            trajectory = record.trajectories.get(name) or self._begin(name, start)
            found = list(record.checkpoints)
            for _ in range(n_checkpoints):
                candidate = roles.slopes_name(len(found) + 1)
                checkpoint = self._checkpoint(engine, problem, laws, trajectory, candidate)
                trajectory, n_passes = checkpoint.trajectory, n_passes + checkpoint.n_passes
                found.append(
                    _Checkpoint(name=candidate, trajectory=name, params=checkpoint.params, n_passes=n_passes)
                )
                n_passes = 0
        return {
            "laws": laws,
            "start": start,
            "trajectories": {**record.trajectories, name: trajectory},
            "checkpoints": tuple(found),
            "full_evaluations": sum(each.n_passes for each in found) / problem.n_texts,
        }

    def _checkpoint(
        self, engine: TransformersEngine, problem: Problem, laws: Laws, trajectory: Trajectory, name: str
    ) -> Checkpoint:
        progress, n_steps = self._candidates.progress, problem.n_steps

        def on_step(step: int) -> None:
            progress.at_work(f"following slopes to {name}: step {step} of {n_steps}")

        return in_smaller_batches(
            lambda n_tokens: take_steps(engine, problem, laws, trajectory, n_steps, on_step, n_tokens),
            progress.say,
        )

    def _begin(self, name: str, start: Params) -> Trajectory:
        """Return a trajectory's beginning: that of the own weights, or where these have led to."""
        suite = self._candidates.evaluator.suite.config
        if name == _OWN:
            assert self._problem is not None
            weights = {each: suite.objectives[each].weight for each in self._problem.objectives}
            return Trajectory(weights=weights, params=start)
        own = self._record.trajectories[_OWN]
        return own.model_copy(update={"weights": emphasized(own.weights, name)})

    def _end(self) -> None:
        """Settle which points a sampler searches around: the best, and the last of each other trajectory."""
        checkpoints = self._record.checkpoints
        if not checkpoints:
            return
        of_own = [each for each in checkpoints if each.trajectory == _OWN]
        best = self._candidates.best
        origin = next((each for each in checkpoints if each.name == best), of_own[-1])
        last = {each.trajectory: each for each in checkpoints if each.trajectory != _OWN}
        self._keep(points={each.name: each.params for each in (origin, *last.values())})
        self._candidates.progress.say(
            f"warm start: {len(checkpoints)} points by slopes for the cost of "
            f"{self._record.full_evaluations:.1f} full evaluations, {self._record.seconds:.1f} s"
        )

    def _keep(self, **changes: object) -> None:
        self._record = self._record.model_copy(update=changes)
        self._candidates.run.write_warm_start(self._record)

    def _make_problem(self, engine: TransformersEngine) -> Problem:
        candidates = self._candidates
        suite, n_items = candidates.evaluator.suite.config, candidates.evaluator.count("search")
        references = study_references(candidates, engine)
        without = suite.objectives.keys() - references.by_score.keys()
        tasks = candidates.evaluator.tasks
        lacking = [reason for name, reason in references.missing.items() if tasks[name].score_name in without]
        if lacking:
            raise MergetuneError(" ".join(lacking))
        n_texts = n_items - len(references.items) + references.n_texts
        return Problem(candidates.inputs.merger, self._fine, references, suite, n_texts)

    def _known(self) -> tuple[dict[str, MeasuredModel], Params]:
        """Return the models whose scores tell what losses are worth, and where the descent starts."""
        candidates, inputs = self._candidates, self._candidates.inputs
        start_name, start = _start(candidates, self._fine, self._baselines())
        names = {roles.BASE, *map(roles.expert_name, inputs.expert_sources)}
        names |= {uniform_name(len(inputs.experts)), start_name}
        known = {
            candidate.name: MeasuredModel(candidate.recipe, candidates.scores[candidate.name])
            for candidate in candidates.all
            if candidate.name in names
        }
        return known, start

    def _baselines(self) -> dict[str, Params]:
        """Return the baselines that were measured and are points of the space descended in, by name."""
        inputs, scores = self._candidates.inputs, self._candidates.scores
        listed = baselines(self._fine, inputs.base_source, inputs.expert_sources, inputs.norms)
        return {each.name: each.params for each in listed if each.params is not None and each.name in scores}


def _no_slopes(space: SearchSpace) -> str:
    return f"`{space.config.method}` has no coefficient here that losses have a slope in."


def _start(candidates: Candidates, space: SearchSpace, points: Mapping[str, Params]) -> tuple[str, Params]:
    """Return the best merge of these and its point; else the middle of all ranges."""
    anchors = {name: own for name, own in candidates.scores.items() if not roles.is_merge(name)}
    merges = {name: candidates.scores[name] for name in points if roles.is_merge(name)}
    best = selection.best_merge(anchors | merges, candidates.evaluator.suite.config, candidates.scales)
    if best is not None:
        return best, points[best]
    middle = {key: (each.low + each.high) / 2 for key, each in space.distributions.items()}
    return "", {key: nearest_in(space.distributions[key], value) for key, value in middle.items()}
