"""Model soups: averages of fine-tunes of one base, uniform or greedy (Wortsman et al. 2022)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import NamedTuple

import pandas as pd
from rich.console import Console

from mergetune.errors import MergetuneError
from mergetune.evaluation.evaluate import Evaluator, Measurement
from mergetune.evaluation.suite import Split, SuiteConfig
from mergetune.measuring.progress import Progress
from mergetune.merging.inputs import Inputs
from mergetune.results import selection
from mergetune.results.roles import BASE, average_name, expert_name, role_of
from mergetune.results.run_dir import Candidate, RunDir, log_to
from mergetune.results.selection import Scales, Scores
from mergetune.space.recipe import MergeRecipe
from mergetune.space.search_space import SearchSpace
from mergetune.study import baselines
from mergetune.study.candidates import Candidates, Proposal, write_facts
from mergetune.study.export import write_merged
from mergetune.study.soup_plan import SoupPlan


class Standing(NamedTuple):
    """How good a model is; greater is better, and the guards come before the gain.

    Attributes:
        allowance: 0 where every guard is kept, else minus the most by which one is broken, in the units of
            `selection.guard_units`.
        gain: what it is worth in all objectives together.
    """

    allowance: float
    gain: float


def standing(
    scores: Scores, references: Mapping[str, Scores], suite: SuiteConfig, scales: Scales
) -> Standing:
    """Rank a model by its guards, then by the weighted mean of its objectives.

    What is averaged is the share kept of the best expert's gain over the base, as in
    `selection.retained_gains`, so that objectives on different scales count alike; where no base was
    measured, the scores themselves, signed so that greater is better. A mean counts every
    objective's gain, so that a soup can grow one skill at a time; the worst loss, by which one merge
    is recommended, stays the same until the last skill is in.

    Args:
        scores: the model's.
        references: the scores of the experts and, if it was measured, of the base, by candidate name.
        suite: the suite's file.
        scales: of the experts and the base, as measured.
    """
    objectives = suite.objectives
    if BASE in references:
        gains = selection.retained_gains(references, scores, suite, scales)
    else:
        gains = {name: objective.sign * scores[name].value for name, objective in objectives.items()}
    total = sum(objective.weight for objective in objectives.values())
    gain = sum(objective.weight * gains[name] for name, objective in objectives.items()) / total
    excess = max([0.0, *selection.relative_violations(scores, references, suite).values()])
    return Standing(-excess, gain)


@dataclass(frozen=True)
class Attempt:
    """A soup that was tried: its ingredients, the last of them new, and whether that was kept."""

    members: tuple[str, ...]
    standing: Standing
    is_kept: bool


@dataclass(frozen=True)
class Soup:
    """A greedy soup: its ingredients in the order added, and all that was tried."""

    members: tuple[str, ...]
    standing: Standing
    attempts: tuple[Attempt, ...]


def greedy_soup(standings: Mapping[str, Standing], measure: Callable[[tuple[str, ...]], Standing]) -> Soup:
    """Choose a soup's ingredients greedily (Wortsman et al. 2022, algorithm 1).

    From the best ingredient down, each is added and kept if the soup does not get worse: so the soup
    is never worse than the best ingredient on the items measured.

    Args:
        standings: of each ingredient alone, by name.
        measure: gives the standing of the average of some ingredients.
    """
    first, *rest = sorted(standings, key=lambda name: standings[name], reverse=True)
    members: tuple[str, ...] = (first,)
    best = standings[first]
    attempts = []
    for name in rest:
        tried = (*members, name)
        found = measure(tried)
        attempts.append(Attempt(tried, found, found >= best))
        if attempts[-1].is_kept:
            members, best = tried, found
    return Soup(members, best, tuple(attempts))


def measure_greedy_soup(candidates: Candidates, space: SearchSpace, inputs: Inputs) -> str:
    """Measure what the greedy soup of a study's experts takes; returns the soup's candidate name.

    The base, the experts and the plain average must have been measured. With one or two experts they
    decide, and nothing more is measured.
    """
    experts, suite = inputs.expert_sources, candidates.evaluator.suite.config
    scales = selection.scales_of(candidates.run, [BASE, *map(expert_name, experts)])

    def measure(members: tuple[str, ...]) -> Standing:
        tried = baselines.soup(members, space, inputs.base_source, experts)
        candidates.measure(Proposal(tried.role, tried.name, tried.recipe, tried.params))
        return standing(candidates.scores[tried.name], candidates.scores, suite, scales)

    alone = {
        name: standing(candidates.scores[expert_name(name)], candidates.scores, suite, scales)
        for name in experts
    }
    return average_name(greedy_soup(alone, measure).members, list(experts))


@dataclass(frozen=True)
class SoupRow:
    """A model measured for a greedy soup; `is_kept` is None where that was no question."""

    label: str
    scores: Scores
    standing: Standing
    is_kept: bool | None


@dataclass(frozen=True)
class SoupResult:
    """A greedy soup with the scores of all that was measured for it, by candidate name."""

    soup: Soup
    scores: Mapping[str, Scores]
    rows: tuple[SoupRow, ...]


def make_soup(plan: SoupPlan, run: RunDir, console: Console) -> SoupResult | None:
    """Write a soup as a model directory; a greedy one's measurements are kept in `run`.

    Raises:
        MergetuneError: something the user has to mend; what was measured stays on disk.
    """
    with Progress(console) as progress:
        inputs = plan.open_inputs(progress.at_work)
    if plan.study is None:
        for warning in inputs.warnings:
            console.print(f"warning: {warning}", highlight=False, markup=False)
        write_merged(plan.out, soup_recipe(list(plan.models), inputs), inputs)
        return None
    evaluator = Evaluator(plan.study.suite)
    study = replace(plan.study, suite=evaluator.suite)
    with (
        run.claim(study.record(inputs, evaluator.rules)),
        log_to(run.path / "run.log"),
        Progress(console) as progress,
    ):
        write_facts(run, inputs, evaluator)
        for warning in inputs.warnings:
            progress.say(f"warning: {warning}")
        with closing(Candidates(study.config.engine, inputs, evaluator, run, progress)) as candidates:
            try:
                result = _choose(plan, candidates, inputs)
                _confirm(plan, candidates, result.soup)
            except KeyboardInterrupt:
                progress.say("Interrupted; run the same command to go on.")
                raise
    _write(plan, inputs, run, result)
    return result


def soup_recipe(members: Sequence[str], inputs: Inputs) -> MergeRecipe:
    """Return the recipe of the average of some ingredients, in the order that they were opened in."""
    sources = {name: source for name, source in inputs.expert_sources.items() if name in members}
    shares = dict.fromkeys(sources, 1.0)
    return MergeRecipe.of_one_group("linear", inputs.base_source, sources, {"lambda": shares})


def _choose(plan: SoupPlan, candidates: Candidates, inputs: Inputs) -> SoupResult:
    """Measure the base, if there is one, and each ingredient; then build the greedy soup."""
    names, suite = list(plan.models), candidates.evaluator.suite.config
    frames: dict[str, pd.DataFrame] = {}
    if plan.base is not None:
        recipe = MergeRecipe.of_base(inputs.base_source, inputs.expert_sources)
        frames[BASE] = _measure(candidates, BASE, recipe, plan.splits)
    for name in names:
        alone_as = expert_name(name)
        frames[alone_as] = _measure(candidates, alone_as, soup_recipe([name], inputs), plan.splits)
    scores: dict[str, Scores] = {name: Measurement(frame, 0.0).scores() for name, frame in frames.items()}
    scales = Scales.of_frames(frames, suite)

    def measure(members: tuple[str, ...]) -> Standing:
        name = average_name(members, names)
        found = _measure(candidates, name, soup_recipe(members, inputs), plan.splits)
        scores[name] = Measurement(found, 0.0).scores()
        return standing(scores[name], scores, suite, scales)

    alone = {name: standing(scores[expert_name(name)], scores, suite, scales) for name in names}
    soup = greedy_soup(alone, measure)
    rows = list(_rows(soup, alone, scores))
    if BASE in scores:
        rows.insert(0, SoupRow(BASE, scores[BASE], standing(scores[BASE], scores, suite, scales), None))
    return SoupResult(soup, scores, tuple(rows))


def _rows(soup: Soup, alone: Mapping[str, Standing], scores: Mapping[str, Scores]) -> Iterator[SoupRow]:
    """Yield the ingredients from the best down, then the soups tried."""
    first = soup.members[0]
    for name in [first, *(attempt.members[-1] for attempt in soup.attempts)]:
        yield SoupRow(name, scores[expert_name(name)], alone[name], True if name == first else None)
    for attempt in soup.attempts:
        own = scores[average_name(attempt.members, list(alone))]
        yield SoupRow(" + ".join(attempt.members), own, attempt.standing, attempt.is_kept)


def _measure(candidates: Candidates, name: str, recipe: MergeRecipe, splits: Sequence[Split]) -> pd.DataFrame:
    """Score a candidate on these splits together, item by item, where that was not done before."""
    candidates.progress.at_work(f"{name} …")
    if "search" in splits:
        candidates.measure(Proposal(role_of(name), name, recipe))
    if "holdout" in splits:
        candidate = candidates.run.candidate(name)
        if candidate is None:
            candidate = Candidate(name=name, number=len(candidates.all), role=role_of(name), recipe=recipe)
        if reason := candidates.confirm(candidate):
            candidates.run.forget_attempts(f"holdout.{name}")
            raise MergetuneError(
                f"`{name}` cannot be measured: {reason}\n{candidates.run.path / 'run.log'} has more. Mend "
                "what is wrong and run the same command again; what was measured is kept."
            )
    frames = [candidates.run.measurement(name, split) for split in splits]
    return pd.concat([frame for frame in frames if frame is not None], ignore_index=True)


def _confirm(plan: SoupPlan, candidates: Candidates, soup: Soup) -> None:
    """Measure the soup, its best ingredient and the base on items that it was not chosen on."""
    if "holdout" in plan.splits or candidates.evaluator.count("holdout") == 0:
        return
    best, chosen = (average_name(members, list(plan.models)) for members in (soup.members[:1], soup.members))
    found = (candidates.run.candidate(name) for name in dict.fromkeys([BASE, best, chosen]))
    candidates.confirm_all(each for each in found if each is not None)


def _write(plan: SoupPlan, inputs: Inputs, run: RunDir, result: SoupResult) -> None:
    """Write the soup; its card names what it is made of, and its scores on items it was not chosen on."""
    members = result.soup.members
    name = average_name(members, list(plan.models))
    kept = tuple(expert for expert in inputs.experts if expert.name in members)
    confirmed = None if "holdout" in plan.splits else run.scores(name, "holdout")
    write_merged(
        plan.out,
        soup_recipe(members, inputs),
        replace(inputs, experts=kept),
        confirmed or result.scores[name],
    )
