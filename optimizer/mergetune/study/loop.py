"""The study: baselines first, then ask, merge, evaluate, tell; resumable at every step."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import Trial, TrialState
from rich.console import Console

from mergetune.engines.engine import UNCHANGED, EngineChanges
from mergetune.errors import MergetuneError, TrialError
from mergetune.evaluation.evaluate import Evaluator
from mergetune.evaluation.leakage import leakage_warnings
from mergetune.evaluation.suite import Direction
from mergetune.files.library import use_cache
from mergetune.machine.interrupts import Interrupts
from mergetune.measuring.progress import Progress, StudyLine
from mergetune.merging.as_adapter import check_adapter
from mergetune.merging.inputs import Inputs
from mergetune.merging.native import why_slow
from mergetune.report import write_report
from mergetune.results import roles, selection
from mergetune.results.flat_objectives import flat_objectives
from mergetune.results.roles import uniform_name
from mergetune.results.run import Run
from mergetune.results.run_dir import Candidate, HoldoutUse, RunDir, log_to
from mergetune.results.selection import Recommendation
from mergetune.space.coordinates import with_ranges
from mergetune.space.front_space import FrontSpace
from mergetune.space.method_table import full_options
from mergetune.space.search_space import SearchSpace
from mergetune.space.search_space_config import SearchSpaceConfig, finer
from mergetune.study.baselines import baselines
from mergetune.study.candidates import Candidates, Proposal, write_facts
from mergetune.study.export import write_merged
from mergetune.study.forms import deploy_quantized, export_adapter
from mergetune.study.noise import measure_noise
from mergetune.study.plan import Plan
from mergetune.study.search import (
    CANDIDATE,
    REFUSED,
    REPEATED,
    Observation,
    Outcome,
    catch_up,
    make_sampler,
    n_startup,
    open_search,
    outcome,
    random_point,
    refused,
    tell,
    try_sampler,
)
from mergetune.study.slopes import take_slopes
from mergetune.study.soup import measure_greedy_soup
from mergetune.study.warm_start import Searched, WarmStarter, check_warm_start
from mergetune.study.watching.seen import Ended
from mergetune.study.watching.watchers import Watchers, make_watchers
from mergetune.weights.quantized import check_quantizer

# So often a sampler is asked for a point that was not measured before, and so often one is drawn at random.
_N_ASKED, _N_DRAWN = 5, 100
_SEARCH = "search.json"
_N_FLAT = 10  # points with the same scores say that no score depends on the coefficients


def run_study(
    study_file: Path,
    out: Path,
    console: Console,
    engine: EngineChanges = UNCHANGED,
    cache: Path | None = None,
) -> Path:
    """Run a study, or go on with the one in `out`; returns the report's path.

    `engine` takes the place of options in the study file, and `cache` that of its `cache`.

    Raises:
        MergetuneError: something the user has to mend; what was measured stays on disk.
        KeyboardInterrupt: after a report of what is there was written.
    """
    plan = Plan.read(study_file, engine)
    use_cache(cache or plan.cache, partial(console.print, highlight=False, markup=False))
    with Progress(console) as progress:
        progress.say(f"opening {plan.config.base} and {len(plan.config.experts)} experts")
        with closing(Watchers(make_watchers(plan, RunDir(out)), progress.say)) as watchers:
            report = _run(plan, plan.open_inputs(out, progress.at_work), RunDir(out), progress, watchers)
            progress.at_work("telling those who watch …")
            watchers.finished(Ended(report, Run(out)))
    return report


def _run(plan: Plan, inputs: Inputs, run: RunDir, progress: Progress, watchers: Watchers) -> Path:
    progress.at_work("reading the suite's items")
    evaluator = Evaluator(plan.suite)
    plan = replace(plan, suite=evaluator.suite)
    space, fine = open_spaces(plan, inputs)
    leaks = leakage_warnings(evaluator, plan.training_texts())
    with (
        run.claim(plan.record(inputs, evaluator.rules)),
        log_to(run.path / "run.log"),
        Interrupts() as interrupts,
    ):
        write_facts(run, inputs, evaluator, leaks)
        _write_coordinates(run, space)
        for line in plan.suite.read_as.values():
            progress.say(line)
        slow = [reason] if (reason := why_slow()) else []
        for warning in (*run.set_aside_broken(), *inputs.warnings, *evaluator.warnings, *leaks, *slow):
            progress.say(f"warning: {warning}")
        watchers.connect(run.candidates())
        candidates = Candidates(
            plan.config.engine,
            inputs,
            evaluator,
            run,
            progress,
            lambda: interrupts.requested,
            plan.config.elimination,
            watchers,
        )
        with closing(candidates):
            try:
                candidates.measure_all(
                    Proposal(each.role, each.name, each.recipe, each.params)
                    for each in baselines(space, inputs.base_source, inputs.expert_sources, inputs.norms)
                )
                candidates.measure_broken()
                _check_objectives(plan, inputs, candidates)
                soup = measure_greedy_soup(candidates, space, inputs)
                measure_noise(candidates)
                searched = _follow_slopes(plan, candidates, space, fine)
                _write_coordinates(run, searched.space)
                _search(plan, searched, candidates, interrupts)
                choice = selection.choose(run)
                suite = plan.suite.config
                finalists = choice.finalists(plan.config.finalists, suite) if choice else ()
                unsearched = selection.best_baseline(run, choice) if choice else None
                _confirm(candidates, finalists, {uniform_name(len(inputs.experts)), soup, unsearched})
                if plan.config.warm_start.kind != "none" and choice and choice.recommendation:
                    chosen = run.candidate(choice.recommendation.name)
                    assert chosen is not None  # measured before
                    take_slopes(candidates, chosen.recipe)
            except BaseException as error:
                if not interrupts.requested:
                    raise
                progress.say(
                    f"Interrupted; run the same command to go on. Report so far: {write_report(run)}"
                )
                raise KeyboardInterrupt from error
        chosen = run.candidate(choice.recommendation.name) if choice and choice.recommendation else None
        if plan.config.export and chosen:
            export_adapter(candidates, chosen, plan.config.export.adapter.rank)
        report = write_report(run)
        _write_best(candidates, choice.recommendation if choice else None)
        if plan.deploy and chosen:
            deploy_quantized(candidates, chosen, plan.deploy)
            report = write_report(run)
    return report


def open_spaces(plan: Plan, inputs: Inputs) -> tuple[SearchSpace, SearchSpace]:
    """Return the search space of a study, and the one that slopes are followed in.

    Args:
        plan: the study, of its suite as the evaluator has settled it.
        inputs: what is merged.

    Raises:
        MergetuneError: a space does not fit the models, or the warm start, the sampler, the export of an
            adapter or the quantizing could only fail later.
    """
    if plan.config.export is not None:
        options = full_options(plan.space.method, plan.space.options or {})
        check_adapter(inputs, plan.space.method, options, plan.config.export.adapter.rank)

    if plan.deploy is not None:
        check_quantizer(plan.deploy.quantize, plan.deploy.python, inputs.base)

    def bound(config: SearchSpaceConfig) -> SearchSpace:
        sources, names = (inputs.base_source, inputs.expert_sources), inputs.base.names
        return SearchSpace(config, *sources, inputs.changed, names, seed=plan.config.seed)

    warm_start, directions = plan.config.warm_start, _directions(plan)
    space, fine = bound(plan.space), bound(finer(plan.space, warm_start.grain, inputs.base.names))
    check_warm_start(warm_start, fine)
    try_sampler(plan.config.sampler, directions, space.distributions)
    if warm_start.kind != "none" and fine.config != space.config and fine.smooth_shares():
        low = {key: each.low for key, each in fine.distributions.items()}
        points = {roles.slopes_name(number): low for number in range(1 + len(directions))}
        around = FrontSpace(fine, points, space, inputs.base.names)
        try_sampler(plan.config.sampler, directions, around.distributions)
    return space, fine


def _write_coordinates(run: RunDir, space: SearchSpace | FrontSpace) -> None:
    """Write down what the numbers of a space's points stand for, beside what is known of another space."""
    ranged = with_ranges(space.coordinates, space.distributions)
    run.write_coordinates({**run.coordinates(), **ranged})


def _follow_slopes(plan: Plan, candidates: Candidates, space: SearchSpace, fine: SearchSpace) -> Searched:
    """Follow slopes as long as that pays; returns the space that the sampler searches."""

    def why_spent() -> str:
        n_begun = sum(not each.is_baseline for each in candidates.all) + candidates.n_under_way
        if n_begun >= plan.config.budget.trials:
            return "all trials were done"
        return _why_spent(plan, candidates)

    return WarmStarter(candidates, plan.config.warm_start, space, fine, why_spent).run()


def _check_objectives(plan: Plan, inputs: Inputs, candidates: Candidates) -> None:
    """Raise `MergetuneError` where a search would be wasted, unless the study file allows that.

    Experts that equal the base are there to be scaled, and no model measured so far can be better.
    """
    if not any(inputs.norms.values()):
        return
    found = flat_objectives(candidates.run, candidates.scores, list(plan.config.experts))
    if not found:
        return
    text = "A search cannot improve these objectives:\n" + "\n".join(found)
    if plan.config.allow_flat_objectives or plan.config.budget.trials == 0:
        candidates.progress.say(f"warning: {text}")
        return
    raise MergetuneError(
        f"{text}\nIf the items show that the suite is wrong (the scorer, the form of the answers, the "
        "prompts), mend it and take a new run directory. If they are right, no merge of these experts can "
        "gain there: make it a guard or leave it out, or say `allow_flat_objectives: true` in the study file "
        f"and run again. Report so far: {write_report(candidates.run)}"
    )


def _outcome(candidates: Candidates, candidate: Candidate | None) -> Outcome:
    own = None if candidate is None else candidates.told(candidate.name)
    return outcome(own, candidates.scores, candidates.evaluator.suite.config)


def _directions(plan: Plan) -> list[Direction]:
    return [objective.better for objective in plan.suite.config.objectives.values()]


def _search(plan: Plan, searched: Searched, candidates: Candidates, interrupts: Interrupts) -> None:
    """Ask, merge, evaluate, tell, until the budget is spent."""
    run, space, n_allowed = candidates.run, searched.space, plan.config.budget.trials
    known = _known(searched, candidates)
    seed = plan.config.seed + len(candidates.all)
    sampler = make_sampler(plan.config.sampler, len(space.distributions), seed)
    storage = run.path / "study.journal"
    search = open_search(storage, _directions(plan), sampler, list(plan.suite.config.objectives))
    names = _trial_names(candidates.all, refused(search))
    n_allowed = n_allowed if space.distributions else min(n_allowed, 1)  # no free coefficient: one suffices
    first = _last_number(names) + 1
    due = deque(range(first, first + max(n_allowed - len(names), 0)))
    if due and not _why_spent(plan, candidates):  # else the space may be another than theirs
        search = catch_up(search, storage, known, space.distributions, _outcome(candidates, None))
        _enqueue_design(search, plan, space, known)
    line = StudyLine(first, len(due))
    asked: dict[str, Trial] = {}  # by the candidate's name
    ended = "all trials were done"
    run.write_json(_SEARCH, {"ended": ""})
    while due or asked:
        interrupts.check()
        if due and (reason := _why_spent(plan, candidates) or _why_flat(searched, candidates)):
            ended = reason
            due.clear()
        candidate: Candidate | None = None
        if due and candidates.pool.has_room and not (asked and candidates.pool.has_news):
            number = due.popleft()
            n_front = len(selection.front(candidates.scores, candidates.evaluator.suite.config))
            candidates.progress.at_work(line.text(number, n_front))
            name = roles.trial_name(number)
            found = _next_trial(search, searched, candidates, asked, name, seed)
            if found is None:
                ended = "all that the sampler proposed was measured before"
                due.clear()
                continue
            trial, proposal = found
            if proposal is not None and (candidate := candidates.known(proposal)) is None:
                candidates.propose(proposal)
                asked[proposal.name] = trial
                continue
        elif asked:
            candidate = candidates.next()
            trial = asked.pop(candidate.name)
        else:
            break
        if not tell(search, trial, _outcome(candidates, candidate)):
            ended = "the sampler had proposed every point that there is"
            due.clear()
    if n_allowed:
        candidates.progress.say(f"The search ended when {ended}.")
        run.write_json(_SEARCH, {"ended": ended})


def _why_spent(plan: Plan, candidates: Candidates) -> str:
    """Say which part of the budget is spent or reached, trials apart; nothing where none is."""
    budget, suite = plan.config.budget, candidates.evaluator.suite.config
    if candidates.spent_s >= budget.hours * 3600:
        return f"the budget of {budget.hours:g} hours was spent"
    if candidates.n_since_best >= budget.patience:
        return f"{budget.patience} candidates in a row had brought no better merge"
    if budget.items is not None:
        n_items = sum(candidate.cost.n_items for candidate in candidates.all)
        if n_items >= budget.items:
            return f"{n_items} items were measured, of {budget.items} in the budget"
    if budget.target:
        merges = {name: scores for name, scores in candidates.scores.items() if roles.is_merge(name)}
        for name, scores in merges.items():
            kept = selection.keeps_guards(scores, candidates.scores, suite)
            if kept and selection.reaches(scores, budget.target, suite):
                return f"`{name}` reached the target"
    return ""


def _next_trial(
    search: optuna.Study,
    searched: Searched,
    candidates: Candidates,
    asked: Collection[str],
    name: str,
    seed: int,
) -> tuple[Trial, Proposal | None] | None:
    """Ask for a trial whose recipe was not measured before; None where there is no other.

    The sampler is told what a known recipe is worth, and asked for another. Where it goes on proposing what
    is known, points drawn at random take its place. A trial without a proposal is of a point that has no
    recipe.
    """
    distributions: dict[str, BaseDistribution] = dict(searched.space.distributions)
    for n_left in reversed(range(_N_ASKED + _N_DRAWN)):
        trial = search.ask(distributions)
        proposal = _proposal(candidates, searched, trial, name)
        if proposal is None or (twin := candidates.twin(proposal)) is None:
            trial.set_user_attr(CANDIDATE, name)
            return trial, proposal
        trial.set_user_attr(REPEATED, twin)
        if twin in asked:  # what it is worth is not known yet
            search.tell(trial, state=TrialState.FAIL)
        elif not tell(search, trial, _outcome(candidates, candidates.run.candidate(twin))):
            return None
        if 0 < n_left <= _N_DRAWN:
            search.enqueue_trial(random_point(distributions, seed + trial.number + 1))
    return None


def _why_flat(searched: Searched, candidates: Candidates) -> str:
    """Say that many points of the space have all the same scores; nothing where they have not."""
    names = [each.name for each in candidates.all if searched.point(each) is not None]
    scores = [candidates.scores[name] for name in names if name in candidates.scores]
    values = ([score.value for score in own.values()] for own in scores)
    first = next(values, None)
    is_flat = len(scores) >= _N_FLAT and all(own == first for own in values)
    return "no score was seen to depend on the coefficients" if is_flat else ""


def _enqueue_design(
    search: optuna.Study, plan: Plan, space: SearchSpace | FrontSpace, known: Sequence[Observation]
) -> None:
    """Where the search goes on around the points of a warm start, begin near them and not at random."""
    if isinstance(space, SearchSpace):
        return
    n_given = sum(roles.trial_number(each.name) is None for each in known)
    n_missing = n_startup(plan.config.sampler, len(space.distributions)) - n_given
    for params in space.design(max(n_missing, 0), plan.config.seed):
        search.enqueue_trial(params, skip_if_exists=True)  # a study that goes on has some of them


def _known(searched: Searched, candidates: Candidates) -> list[Observation]:
    """Return the candidates that are points of the searched space, with what became of them."""
    points = {candidate.name: searched.point(candidate) for candidate in candidates.all}
    return [
        Observation(candidate.name, point, _outcome(candidates, candidate))
        for candidate in candidates.all
        if (point := points[candidate.name]) is not None
    ]


def _proposal(candidates: Candidates, searched: Searched, trial: Trial, name: str) -> Proposal | None:
    """Return a trial's point as a candidate; None where it has no recipe, such as where shares sum to 0."""
    try:
        recipe = searched.space.recipe(trial.params)
    except TrialError as error:
        candidates.progress.say(f"{name} failed: {error}")
        trial.set_user_attr(REFUSED, str(error))
        return None
    return Proposal("trial", name, recipe, trial.params, searched.kind)


def _trial_names(known: Sequence[Candidate], refused: Collection[str]) -> list[str]:
    """Return the names of the trials, those that have no recipe among them."""
    return [*(candidate.name for candidate in known if not candidate.is_baseline), *refused]


def _last_number(names: Sequence[str]) -> int:
    """Return the number of the last trial, which may be greater than how many there are."""
    return max([len(names), *filter(None, map(roles.trial_number, names))])


def _confirm(candidates: Candidates, finalists: tuple[str, ...], averages: Collection[str | None]) -> None:
    """Measure the finalists on the holdout split, with what they are compared to.

    They are written down before any is measured there.
    """
    if candidates.evaluator.count("holdout") == 0:
        return
    uses = candidates.run.holdout_uses()
    if finalists and (not uses or uses[-1].finalists != finalists):
        if uses:
            candidates.progress.say(
                f"warning: the holdout split is used again (use {len(uses) + 1}): whoever has seen "
                "the earlier numbers can no longer choose without them."
            )
        now = datetime.now(UTC).replace(microsecond=0)
        use = HoldoutUse(at=now, finalists=finalists, n_candidates=len(candidates.scores))
        candidates.run.add_holdout_use(use)
    compared = [name for name in candidates.scores if name == roles.BASE or roles.is_expert(name)]
    names = {*compared, *averages, *finalists}
    candidates.confirm_all(each for each in candidates.all if each.name in names and each.state == "complete")


def _write_best(candidates: Candidates, chosen: Recommendation | None) -> None:
    """Write the recommended merge as a model directory."""
    candidate = candidates.run.candidate(chosen.name) if chosen else None
    if chosen is None or candidate is None:
        return
    candidates.progress.at_work("writing the merged model …")
    results = candidates.run.scores(chosen.name, "holdout") or candidates.scores[chosen.name]
    best = candidates.run.path / "best"
    write_merged(best, candidate.recipe, candidates.inputs, results)
    candidates.share_replies(candidate.recipe, best)
    candidates.progress.say(f"Recommended: {chosen.name}. {chosen.reason}")
