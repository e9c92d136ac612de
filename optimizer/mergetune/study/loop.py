"""The study: baselines first, then ask, merge, evaluate, tell; resumable at every step."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Sequence
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import optuna
from optuna.trial import Trial
from rich.console import Console

from mergetune.engines.engine import EngineKind
from mergetune.errors import MergetuneError, TrialError
from mergetune.evaluation.evaluate import Evaluator
from mergetune.evaluation.leakage import leakage_warnings
from mergetune.evaluation.suite import Direction
from mergetune.files.library import use_cache
from mergetune.machine.interrupts import Interrupts
from mergetune.measuring.progress import Progress, study_line
from mergetune.merging.inputs import Inputs
from mergetune.merging.native import why_slow
from mergetune.report import write_report
from mergetune.results import roles, selection
from mergetune.results.flat_objectives import flat_objectives
from mergetune.results.roles import uniform_name
from mergetune.results.run_dir import Candidate, HoldoutUse, RunDir, log_to
from mergetune.results.selection import Recommendation
from mergetune.slopes.descent import most_points
from mergetune.space.front_space import FrontSpace
from mergetune.space.search_space import SearchSpace
from mergetune.space.search_space_config import SearchSpaceConfig, finer
from mergetune.study.baselines import baselines
from mergetune.study.bench import Bench, write_facts
from mergetune.study.export import write_merged
from mergetune.study.plan import Plan
from mergetune.study.search import (
    CANDIDATE,
    REFUSED,
    Known,
    catch_up,
    make_sampler,
    n_startup,
    open_search,
    refused,
    tell,
    try_sampler,
)
from mergetune.study.soup import measure_greedy_soup
from mergetune.study.warm_start import Searched, check_warm_start, start_search

log = logging.getLogger("mergetune")


def run_study(
    study_file: Path,
    out: Path,
    console: Console,
    engine: EngineKind | None = None,
    cache: Path | None = None,
) -> Path:
    """Run a study, or go on with the one in `out`; returns the report's path.

    `engine` takes the place of the study file's `engine.kind`, and `cache` that of its `cache`.

    Raises:
        MergetuneError: something the user has to mend; what was measured stays on disk.
        KeyboardInterrupt: after a report of what is there was written.
    """
    plan = Plan.read(study_file, engine)
    use_cache(cache or plan.cache, partial(console.print, highlight=False, markup=False))
    with Progress(console) as progress:
        progress.say(f"opening {plan.config.base} and {len(plan.config.experts)} experts")
        return _run(plan, plan.open_inputs(out, progress.at_work), RunDir(out), progress)


def _run(plan: Plan, inputs: Inputs, run: RunDir, progress: Progress) -> Path:
    space = _bound(plan.space, inputs, plan.config.seed)
    finer_space = finer(plan.space, plan.config.warm_start.grain, inputs.base.names)
    fine = _bound(finer_space, inputs, plan.config.seed)
    progress.at_work("reading the suite's items")
    evaluator = Evaluator(plan.suite)
    plan = replace(plan, suite=evaluator.suite)
    _check_search(plan, space, fine, inputs)
    leaks = leakage_warnings(evaluator, plan.training_texts())
    with (
        run.claim(plan.record(inputs, evaluator.rules)),
        log_to(run.path / "run.log"),
        Interrupts() as interrupts,
    ):
        write_facts(run, inputs, evaluator, leaks)
        slow = [reason] if (reason := why_slow()) else []
        for warning in (*run.set_aside_broken(), *inputs.warnings, *leaks, *slow):
            progress.say(f"warning: {warning}")
        bench = Bench(plan.config.engine, inputs, evaluator, run, progress, lambda: interrupts.requested)
        with closing(bench):
            try:
                for baseline in baselines(space, inputs.base_source, inputs.expert_sources, inputs.norms):
                    bench.measure("baseline", baseline.name, baseline.recipe, baseline.params)
                bench.measure_broken()
                _check_objectives(plan, bench)
                soup = measure_greedy_soup(bench, space, inputs)
                bench.measure_noise()
                n_trials = plan.config.budget.trials if run.spent_s() < _hours_s(plan) else 0
                searched = start_search(bench, plan.config.warm_start, space, fine, n_trials)
                _search(plan, searched, bench, interrupts)
                choice = selection.choose(run)
                finalists = choice.finalists(plan.config.finalists) if choice else ()
                unsearched = selection.best_baseline(run, choice) if choice else None
                _confirm(bench, finalists, {uniform_name(len(inputs.experts)), soup, unsearched})
                if plan.config.warm_start.kind != "none" and choice and choice.recommendation:
                    _take_slopes(bench, choice.recommendation)
            except BaseException as error:
                if not interrupts.requested:
                    raise
                progress.say(
                    f"Interrupted; run the same command to go on. Report so far: {write_report(run)}"
                )
                raise KeyboardInterrupt from error
        report = write_report(run)
        _write_best(bench, choice.recommendation if choice else None)
    return report


def _bound(config: SearchSpaceConfig, inputs: Inputs, seed: int) -> SearchSpace:
    return SearchSpace(
        config, inputs.base_source, inputs.expert_sources, inputs.changed, inputs.base.names, seed=seed
    )


def _check_search(plan: Plan, space: SearchSpace, fine: SearchSpace, inputs: Inputs) -> None:
    """Raise `MergetuneError` now where the warm start or the sampler could only fail later."""
    warm_start, directions = plan.config.warm_start, _directions(plan)
    check_warm_start(warm_start, fine)
    try_sampler(plan.config.sampler, directions, space.distributions)
    if warm_start.kind != "none" and warm_start.grain != "search_space" and fine.smooth_shares():
        points = [dict.fromkeys(fine.distributions, 0.0)] * most_points(len(directions))
        around = FrontSpace(fine, points, space.groups, inputs.base.names)
        try_sampler(plan.config.sampler, directions, around.distributions)


def _check_objectives(plan: Plan, bench: Bench) -> None:
    """Raise `MergetuneError` where a search would be wasted, unless the study file allows that."""
    found = flat_objectives(bench.run, bench.scores, list(plan.config.experts))
    if not found:
        return
    text = "A search cannot improve these objectives:\n" + "\n".join(found)
    if plan.config.allow_flat_objectives or plan.config.budget.trials == 0:
        bench.progress.say(f"warning: {text}")
        return
    raise MergetuneError(
        f"{text}\nIf the items show that the suite is wrong (the scorer, the form of the answers, the "
        "prompts), mend it and take a new run directory. If they are right, no merge of these experts can "
        "gain there: make it a guard or leave it out, or say `allow_flat_objectives: true` in the study file "
        f"and run again. Report so far: {write_report(bench.run)}"
    )


def _directions(plan: Plan) -> list[Direction]:
    return [objective.better for objective in plan.suite.config.objectives.values()]


def _search(plan: Plan, searched: Searched, bench: Bench, interrupts: Interrupts) -> None:
    """Ask, merge, evaluate, tell, until the budget is spent."""
    run, space, n_allowed = bench.run, searched.space, plan.config.budget.trials
    known = _known(searched, bench)
    seed = plan.config.seed + len(bench.candidates)
    sampler = make_sampler(plan.config.sampler, len(space.distributions), seed)
    storage = run.path / "study.db"
    search = open_search(storage, _directions(plan), sampler)
    names, spent_s = _trial_names(bench.candidates, refused(search)), run.spent_s()
    n_allowed = n_allowed if space.distributions else min(n_allowed, 1)  # nothing to search: one says it all
    first = _last_number(names) + 1
    due = range(first, first + max(n_allowed - len(names), 0))
    if due and spent_s < _hours_s(plan):  # else the space may be another than that of the trials to come
        search = catch_up(search, storage, known, space.distributions, bench.outcome(None))
        _enqueue_design(search, plan, space, known)
    started, seconds_per_trial = time.monotonic(), None
    for number in due:
        interrupts.check()
        if number > first:
            seconds_per_trial = (time.monotonic() - started) / (number - first)
        if spent_s >= _hours_s(plan):
            bench.progress.say(f"The budget of {plan.config.budget.hours} hours is spent.")
            break
        n_front = len(selection.front(bench.scores, bench.evaluator.suite.config))
        bench.progress.at_work(study_line(number, due[-1], seconds_per_trial, n_front))
        trial = search.ask(dict(space.distributions))
        candidate = _measure(bench, searched, trial, roles.trial_name(number))
        if candidate is not None:
            spent_s += candidate.cost.total_s
        if not tell(search, trial, bench.outcome(candidate)):
            bench.progress.say("The sampler has proposed every point that there is.")
            break


def _enqueue_design(
    search: optuna.Study, plan: Plan, space: SearchSpace | FrontSpace, known: Sequence[Known]
) -> None:
    """Where the search goes on around the points of a warm start, begin near them and not at random."""
    if isinstance(space, SearchSpace):
        return
    n_given = sum(roles.trial_number(each.name) is None for each in known)
    n_missing = n_startup(plan.config.sampler, len(space.distributions)) - n_given
    for params in space.design(max(n_missing, 0), plan.config.seed):
        search.enqueue_trial(params, skip_if_exists=True)  # a study that goes on has some of them


def _known(searched: Searched, bench: Bench) -> list[Known]:
    """Return the candidates that are points of the searched space, with what became of them."""
    points = {candidate.name: searched.point(candidate) for candidate in bench.candidates}
    return [
        Known(candidate.name, point, bench.outcome(candidate))
        for candidate in bench.candidates
        if (point := points[candidate.name]) is not None
    ]


def _measure(bench: Bench, searched: Searched, trial: Trial, name: str) -> Candidate | None:
    """Measure a trial's point; None where it has no recipe, such as where shares sum to 0."""
    trial.set_user_attr(CANDIDATE, name)
    try:
        recipe = searched.space.recipe(trial.params)
    except TrialError as error:
        bench.progress.say(f"{name} failed: {error}")
        trial.set_user_attr(REFUSED, str(error))
        return None
    return bench.measure("trial", name, recipe, trial.params, searched.kind)


def _trial_names(known: Sequence[Candidate], refused: Collection[str]) -> list[str]:
    """Return the names of the trials, those that have no recipe among them."""
    return [*(candidate.name for candidate in known if candidate.kind == "trial"), *refused]


def _last_number(names: Sequence[str]) -> int:
    """Return the number of the last trial, which may be greater than how many there are."""
    return max([len(names), *filter(None, map(roles.trial_number, names))])


def _hours_s(plan: Plan) -> float:
    """Return the seconds that may go into what `RunDir.spent_s` counts."""
    return plan.config.budget.hours * 3600


def _confirm(bench: Bench, finalists: tuple[str, ...], averages: Collection[str | None]) -> None:
    """Measure the finalists on the holdout split, with what they are compared to.

    They are written down before any is measured there.
    """
    if bench.evaluator.count("holdout") == 0:
        return
    uses = bench.run.holdout_uses()
    if finalists and (not uses or uses[-1].finalists != finalists):
        if uses:
            bench.progress.say(
                f"warning: the holdout split is used again (use {len(uses) + 1}): whoever has seen "
                "the earlier numbers can no longer choose without them."
            )
        now = datetime.now(UTC).replace(microsecond=0)
        use = HoldoutUse(at=now, finalists=finalists, n_candidates=len(bench.scores))
        bench.run.add_holdout_use(use)
    compared = [name for name in bench.scores if name == roles.BASE or roles.is_expert(name)]
    names = {*compared, *averages, *finalists}
    for candidate in bench.candidates:
        if candidate.name in names and candidate.state == "complete":
            bench.confirm(candidate)


def _take_slopes(bench: Bench, chosen: Recommendation) -> None:
    """Take the slopes at the recommended merge and at what it is compared to, where that can be done."""
    candidate = bench.run.candidate(chosen.name)
    assert candidate is not None  # measured before
    try:
        bench.measure_sensitivity(candidate.recipe)
    except Exception as error:  # whatever it is, the report and the merged model are still to come
        if bench.ends_study(error):
            raise
        log.exception("no sensitivity")
        bench.progress.say(f"no sensitivity: {error}")


def _write_best(bench: Bench, chosen: Recommendation | None) -> None:
    """Write the recommended merge as a model directory."""
    candidate = bench.run.candidate(chosen.name) if chosen else None
    if chosen is None or candidate is None:
        return
    bench.progress.at_work("writing the merged model …")
    results = bench.run.scores(chosen.name, "holdout") or bench.scores[chosen.name]
    write_merged(bench.run.path / "best", candidate.recipe, bench.inputs, results)
    bench.progress.say(f"Recommended: {chosen.name}. {chosen.reason}")
