"""The warm start: points that the slopes of losses lead to, from which the search goes on."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from mergetune.errors import MergetuneError
from mergetune.machine import clock
from mergetune.machine.memory import in_smaller_batches
from mergetune.measuring.attempts import attempt
from mergetune.results import roles, selection
from mergetune.results.config import WarmStartConfig
from mergetune.results.roles import uniform_name
from mergetune.results.run_dir import Candidate, SpaceKind, WarmStart
from mergetune.slopes.descent import MeasuredModel, Params, Problem, descend
from mergetune.space.front_space import FrontSpace
from mergetune.space.search_space import SearchSpace, nearest_in
from mergetune.study.baselines import baselines
from mergetune.study.candidates import Candidates, Proposal
from mergetune.study.slopes import study_references

_WARM_START = "warm_start"  # names attempts

log = logging.getLogger("mergetune")


def check_warm_start(config: WarmStartConfig, fine: SearchSpace) -> None:
    """Raise `MergetuneError` if slopes are asked for, and the space to descend in has none."""
    if config.kind == "gradient" and not fine.smooth_shares():
        raise MergetuneError(f"`warm_start: gradient` cannot be done: {_no_slopes(fine)}")


@dataclass(frozen=True)
class Searched:
    """The space that a study searches, and where candidates lie in it that are points of another.

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


def start_search(
    candidates: Candidates, config: WarmStartConfig, space: SearchSpace, fine: SearchSpace, n_trials: int
) -> Searched:
    """Follow the slopes and measure where they lead, unless that was done; returns the space to search.

    With a finer grain that is the space around the points found.

    Args:
        candidates: where the baselines were measured.
        config: whether to follow slopes at all.
        space: the study's search space.
        fine: the space to descend in, of the grain that `config` names.
        n_trials: how many points may be measured.

    Raises:
        MergetuneError: it was asked for and cannot be done.
    """
    own = Searched(space, "search_space")
    found = candidates.run.warm_start()
    if found is None and n_trials == 0:
        return own
    if found is None:
        found = _follow_slopes(candidates, config, fine)
        candidates.run.write_warm_start(found)
    if not found.points:
        return own
    if config.grain == "search_space":
        _measure(candidates, own, found.points[:n_trials])
        return own
    around = FrontSpace(fine, found.points, space.groups, candidates.inputs.base.names)
    places = {name: around.place(params) for name, params in _points(candidates, fine).items()}
    inside = {name: place for name, place in places.items() if place is not None}
    searched = Searched(around, "front", inside)
    _measure(candidates, searched, [around.corner(number) for number in range(len(found.points))][:n_trials])
    return searched


def _measure(candidates: Candidates, searched: Searched, points: Sequence[Params]) -> None:
    for number, params in enumerate(points, start=1):
        recipe = searched.space.recipe(params)
        name = roles.slopes_name(number)
        candidates.measure(Proposal("slopes", name, recipe, params, searched.kind))


def _follow_slopes(candidates: Candidates, config: WarmStartConfig, space: SearchSpace) -> WarmStart:
    """Descend, or say why not."""
    if config.kind == "none":
        return WarmStart(reason="`warm_start: none`.")
    if not space.smooth_shares():
        candidates.progress.say(f"warm start: none; {_no_slopes(space)}")
        return WarmStart(reason=_no_slopes(space))
    began = clock.seconds()
    try:
        with attempt(candidates.run, _WARM_START):
            found = _descend(candidates, space)
    except Exception as error:  # transformers and torch have many ways to say that they cannot
        if candidates.pool.ends_all(error):
            raise
        if config.kind == "gradient":
            candidates.run.forget_attempts(_WARM_START)
            raise MergetuneError(
                f"`warm_start: gradient` cannot be done: {error}\nMend what is wrong and run the same "
                "command again, or take `warm_start: auto`, which goes on without, in a new run directory."
            ) from error
        log.exception("no warm start")
        found = WarmStart(reason=str(error))
    found = found.model_copy(update={"seconds": clock.seconds() - began})
    what = f"{len(found.points)} points by slopes" if found.points else "none"
    cost = f"{found.seconds:.1f} s"
    if found.full_evaluations:
        cost = f"the cost of {found.full_evaluations:.1f} full evaluations, {cost}"
    candidates.progress.say(f"warm start: {what} for {cost}{f'; {found.reason}' if found.reason else ''}")
    return found


def _no_slopes(space: SearchSpace) -> str:
    return f"`{space.config.method}` has no coefficient here that losses have a slope in."


def _descend(candidates: Candidates, space: SearchSpace) -> WarmStart:
    suite, n_items = candidates.evaluator.suite.config, candidates.evaluator.count("search")
    points = _points(candidates, space)
    start_name, start = _start(candidates, space, points)
    names = {roles.BASE, *map(roles.expert_name, candidates.inputs.expert_sources)}
    names |= {uniform_name(len(candidates.inputs.experts)), start_name}
    known = {
        candidate.name: MeasuredModel(candidate.recipe, candidates.scores[candidate.name])
        for candidate in candidates.all
        if candidate.name in names
    }
    with candidates.pool.transformers() as engine:
        references = study_references(candidates, engine)
        without = suite.objectives.keys() - references.by_score.keys()
        tasks = candidates.evaluator.tasks
        lacking = [reason for name, reason in references.missing.items() if tasks[name].score_name in without]
        if lacking:
            raise MergetuneError(" ".join(lacking))
        scored = [(params, candidates.scores[name]) for name, params in points.items()]
        n_texts = n_items - len(references.items) + references.n_texts
        problem = Problem(engine, candidates.inputs.merger, space, references, suite, known, scored, n_texts)
        found = in_smaller_batches(
            lambda n_tokens: descend(
                replace(problem, max_tokens=n_tokens),
                start,
                on_step=lambda step, of: candidates.progress.at_work(f"following slopes: {step} of {of}"),
            ),
            candidates.progress.say,
        )
    return WarmStart(
        points=tuple(point.params for point in found.points),
        reason=None
        if found.points
        else "Every point that the slopes led to was clearly worse than the start on items kept apart.",
        full_evaluations=found.full_evaluations,
    )


def _points(candidates: Candidates, space: SearchSpace) -> dict[str, Params]:
    """Return the baselines that were measured and are points of the space, by name."""
    inputs = candidates.inputs
    listed = baselines(space, inputs.base_source, inputs.expert_sources, inputs.norms)
    return {
        each.name: each.params
        for each in listed
        if each.params is not None and each.name in candidates.scores
    }


def _start(candidates: Candidates, space: SearchSpace, points: Mapping[str, Params]) -> tuple[str, Params]:
    """Return the best merge of these and its point; else the middle of all ranges."""
    anchors = {name: own for name, own in candidates.scores.items() if not roles.is_merge(name)}
    merges = {name: candidates.scores[name] for name in points if roles.is_merge(name)}
    scales = selection.scales_of(candidates.run, anchors | merges)
    best = selection.recommend(anchors | merges, candidates.evaluator.suite.config, scales)
    if best is not None:
        return best.name, points[best.name]
    middle = {key: (each.low + each.high) / 2 for key, each in space.distributions.items()}
    return "", {key: nearest_in(space.distributions[key], value) for key, value in middle.items()}
