"""The Optuna side of a study: sampler, storage, and what a resumed study must be told."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.storages.journal import JournalFileBackend, JournalStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from mergetune.errors import MergetuneError
from mergetune.evaluation.suite import Direction, SuiteConfig
from mergetune.files.yaml_io import nearest
from mergetune.results import selection
from mergetune.results.config import SamplerConfig
from mergetune.results.selection import Scores

_NAME = "mergetune"  # of the Optuna study in its file

# User attributes of a trial: the name of its candidate, why there is none where its point has no recipe, and
# the name of the candidate that has the same recipe and was measured before.
CANDIDATE, REFUSED, REPEATED = "candidate", "refused", "repeated"

# The constraint that a point which cannot be measured breaks, and every other keeps. Samplers learn from it
# where they ignore a failed trial, which leaves such a region as promising as before; Optuna's GP wants the
# same constraints of all trials.
FAILED = "could not be measured"

# Where Optuna keeps constraints as a list, which is how optuna-dashboard reads them: their names stand in
# user attributes, one for each.
_CONSTRAINTS = "constraints"
_GUARD = "guard."

# A GP learns a smooth landscape from few trials; beyond this many dimensions it no longer does
# (Optuna's documentation gives its budget as 10 to 100 trials).
_GP_MAX_DIMENSIONS = 24


@dataclass(frozen=True)
class Outcome:
    """What Optuna is told of a point: the objectives' values in their order, and each constraint's excess.

    A constraint is kept at 0 and below.
    """

    values: tuple[float, ...]
    constraints: Mapping[str, float]

    @property
    def has_failed(self) -> bool:
        """Say whether the point could not be measured."""
        return self.constraints[FAILED] > 0


@dataclass(frozen=True)
class Observation:
    """A candidate that is a point of the searched space, and what became of it."""

    name: str
    params: Mapping[str, float]
    outcome: Outcome


def success(values: Sequence[float], guards: Mapping[str, float]) -> Outcome:
    """Return the outcome of a point that was measured.

    Args:
        values: of the objectives, in their order.
        guards: by how much each guard is broken.
    """
    return Outcome(tuple(values), {**guards, FAILED: -1.0})


def failure(known: Sequence[Outcome], directions: Sequence[Direction]) -> Outcome:
    """Return the outcome of a point that could not be measured: infeasible, and else like the worst known.

    Values far beyond those known would spoil what a sampler learns of all others.

    Args:
        known: the outcomes of what was measured; at least one.
        directions: of the objectives, in their order.
    """
    columns = zip(*(each.values for each in known), strict=True)
    worst = {"maximize": min, "minimize": max}
    values = tuple(worst[direction](column) for direction, column in zip(directions, columns, strict=True))
    constraints = {name: max(each.constraints[name] for each in known) for name in known[0].constraints}
    return Outcome(values, {**constraints, FAILED: 1.0})


def outcome(own: Scores | None, scores: Mapping[str, Scores], suite: SuiteConfig) -> Outcome:
    """Return what Optuna is told of a candidate.

    What a dropped one scored on part of its items is what it would score on all, with a larger error.

    Optuna adds the guards' excesses up, so that each is in the unit of `selection.guard_units`.

    Args:
        own: its scores; None: it failed, or its point has no recipe.
        scores: of all that was measured, by candidate name.
        suite: the suite's file.
    """
    if own is not None:
        return _success_of(own, scores, suite)
    directions = [objective.better for objective in suite.objectives.values()]
    return failure([_success_of(own, scores, suite) for own in scores.values()], directions)


def _success_of(own: Scores, scores: Mapping[str, Scores], suite: SuiteConfig) -> Outcome:
    values = [own[name].value for name in suite.objectives]
    return success(values, selection.relative_violations(own, scores, suite))


def check_sampler(config: SamplerConfig) -> None:
    """Check a sampler's name and options; raises as `make_sampler` does."""
    make_sampler(config, n_dimensions=1, seed=0)


def make_sampler(config: SamplerConfig, n_dimensions: int, seed: int) -> optuna.samplers.BaseSampler:
    """Build the sampler; TPE takes the coefficients as coupled (multivariate) unless told otherwise.

    Raises:
        MergetuneError: there is no such sampler, or it refuses its options.
    """
    found = _sampler_class(config, n_dimensions)
    options = dict(config.options)
    accepted = inspect.signature(found).parameters
    if "seed" in accepted:
        options.setdefault("seed", seed)
    if found is optuna.samplers.TPESampler:
        options.setdefault("multivariate", True)
    if unknown := [name for name in options if name not in accepted]:
        raise MergetuneError(
            f"`sampler`: {found.__name__} has no option `{unknown[0]}`.{nearest(unknown[0], accepted)}"
        )
    try:
        return found(**options)
    except (TypeError, ValueError) as error:
        raise MergetuneError(f"`sampler`: {found.__name__} refuses its options: {error}") from error


def n_startup(config: SamplerConfig, n_dimensions: int) -> int:
    """Return how many points the sampler wants to know before it proposes others than random ones."""
    parameter = inspect.signature(_sampler_class(config, n_dimensions)).parameters.get("n_startup_trials")
    return int(config.options.get("n_startup_trials", parameter.default)) if parameter else 0


def try_sampler(
    config: SamplerConfig, directions: Sequence[Direction], distributions: Mapping[str, BaseDistribution]
) -> None:
    """Ask a sampler for a trial after two others, in memory, before any work is done for it.

    Raises:
        MergetuneError: it cannot search so many objectives, or such ranges.
    """
    sampler = make_sampler(config, len(distributions), seed=0)
    quiet()
    search = optuna.create_study(directions=list(directions), sampler=sampler)
    for end in ("low", "high"):
        params = {name: getattr(each, end) for name, each in distributions.items()}
        search.add_trial(
            _trial(Observation("", params, success([0.0] * len(directions), {})), distributions, {}, {})
        )
    try:
        search.ask(dict(distributions))
    except Exception as error:  # samplers have many ways to say that they cannot
        raise MergetuneError(
            f"`sampler`: {type(sampler).__name__} cannot search this study ({error}). Take another one, or "
            "`auto`."
        ) from error


def open_search(
    storage: Path,
    directions: Sequence[Direction | StudyDirection],
    sampler: optuna.samplers.BaseSampler,
    objectives: Sequence[str] = (),
) -> optuna.Study:
    """Open the Optuna study in a journal, new or going on; unlike SQLite's, its locks hold on NFS.

    An entry that was being written when the process ended is cut off; a file that cannot be read is set
    aside, for all that it holds stands in the run directory, too.

    Args:
        storage: the journal.
        directions: of the objectives, in their order.
        sampler: what proposes trials.
        objectives: their names.
    """
    quiet()
    if storage.exists() and not (known := storage.read_bytes()).endswith(b"\n"):
        with storage.open("r+b") as file:
            file.truncate(known.rfind(b"\n") + 1)
    create = partial(
        optuna.create_study,
        study_name=_NAME,
        directions=list(directions),
        sampler=sampler,
        load_if_exists=True,
    )
    try:
        found = create(storage=journal(storage))
    except (ValueError, KeyError, TypeError):  # whatever a damaged journal leads to
        storage.replace(storage.with_name(f"{storage.name}.broken"))
        found = create(storage=journal(storage))
    name_objectives(found, objectives)
    return found


def name_objectives(search: optuna.Study, names: Sequence[str]) -> None:
    """Give the objectives of an Optuna study their names, unless it has them."""
    if names and search.metric_names != list(names):
        search.set_metric_names(list(names))


def random_point(distributions: Mapping[str, BaseDistribution], seed: int) -> dict[str, Any]:
    """Draw a point of a space at random."""
    search = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed))
    return search.ask(dict(distributions)).params


def tell(search: optuna.Study, trial: optuna.Trial, outcome: Outcome) -> bool:
    """Tell what became of a trial; returns False where that was the last of a grid."""
    for name, value in constraint_attributes(outcome.constraints).items():
        trial.set_user_attr(name, value)
    for name, values in listed(outcome.constraints).items():
        trial.storage.set_trial_system_attr(trial._trial_id, name, values)
    try:
        search.tell(trial, list(outcome.values))
    except RuntimeError as error:  # so a sampler that has proposed every point ends a loop of Optuna's own
        if "Study.stop" not in str(error):
            raise
        return False
    return True


def listed(constraints: Mapping[str, float]) -> dict[str, list[float]]:
    """Return constraints as a trial's system attributes."""
    return {_CONSTRAINTS: list(constraints.values())} if constraints else {}


def constraint_attributes(constraints: Mapping[str, float]) -> dict[str, float]:
    """Return constraints as a trial's user attributes: `guard.NAME`, broken where above 0."""
    return {f"{_GUARD}{name}": excess for name, excess in constraints.items() if name != FAILED}


def refused(search: optuna.Study) -> set[str]:
    """Return the names of the trials whose points have no recipe."""
    return {trial.user_attrs[CANDIDATE] for trial in search.get_trials() if REFUSED in trial.user_attrs}


def catch_up(
    search: optuna.Study,
    storage: Path,
    known: Sequence[Observation],
    distributions: Mapping[str, BaseDistribution],
    failure: Outcome,
) -> optuna.Study:
    """Make Optuna know what is on disk, and nothing else; returns the study to go on with.

    Candidates that it was never told (the process died in between, or they are baselines) are added. Where it
    holds something else than the disk does (another version told it otherwise), all is told anew. A trial
    that was asked for and never measured, or is no longer on disk, is enqueued again.

    Args:
        search: the Optuna study.
        storage: its file.
        known: what is on disk.
        distributions: of the space to search.
        failure: what to tell of points that have no recipe.
    """
    before = [trial for trial in search.get_trials() if REPEATED not in trial.user_attrs]
    no_recipe = [trial for trial in before if REFUSED in trial.user_attrs]
    wanted = {each.name: each for each in known}
    wanted |= {
        name: Observation(name, trial.params, failure)
        for trial in no_recipe
        if (name := trial.user_attrs[CANDIDATE])
    }
    told = {
        str(trial.user_attrs.get(CANDIDATE)): trial for trial in before if trial.state == TrialState.COMPLETE
    }
    if not all(_agrees(trial, wanted.get(name), distributions) for name, trial in told.items()):
        directions, sampler, names, told = search.directions, search.sampler, search.metric_names, {}
        optuna.delete_study(study_name=_NAME, storage=journal(storage))
        search = open_search(storage, directions, sampler, names or ())
    states = {trial.user_attrs.get(CANDIDATE): _sampler_state(trial) for trial in before}
    why = {trial.user_attrs[CANDIDATE]: trial.user_attrs[REFUSED] for trial in no_recipe}
    for name, each in wanted.items():
        if name not in told:
            attributes = {CANDIDATE: name} | ({REFUSED: why[name]} if name in why else {})
            search.add_trial(_trial(each, distributions, attributes, states.get(name, {})))
    for trial in search.get_trials(states=[TrialState.RUNNING]):
        search.tell(trial.number, state=TrialState.FAIL)
    for trial in before:
        was_asked = trial.state in (TrialState.RUNNING, TrialState.COMPLETE)
        is_lost = trial.user_attrs.get(CANDIDATE) not in wanted
        if was_asked and is_lost and trial.params.keys() == distributions.keys():
            search.enqueue_trial(trial.params)
    return search


def _agrees(
    trial: FrozenTrial, known: Observation | None, distributions: Mapping[str, BaseDistribution]
) -> bool:
    """Say whether Optuna holds what is known; the values of a failed point are those of when it was told."""
    if known is None or trial.distributions.keys() != distributions.keys() or trial.params != known.params:
        return False
    ours, theirs = known.outcome, trial.system_attrs.get(_CONSTRAINTS, ())
    if len(theirs) != len(ours.constraints) or theirs[-1] != ours.constraints[FAILED]:
        return False
    is_same = trial.values == list(ours.values) and theirs == list(ours.constraints.values())
    return ours.has_failed or is_same


def _trial(
    known: Observation,
    distributions: Mapping[str, BaseDistribution],
    attributes: Mapping[str, str],
    state: Mapping[str, Any],
) -> FrozenTrial:
    return optuna.trial.create_trial(
        values=list(known.outcome.values),
        params=dict(known.params),
        distributions=dict(distributions),
        user_attrs={**attributes, **constraint_attributes(known.outcome.constraints)},
        system_attrs={**state, **listed(known.outcome.constraints)},
    )


def _sampler_state(trial: FrozenTrial) -> dict[str, Any]:
    """Return what a sampler wrote down of a trial, such as the generation that it is of."""
    return {name: value for name, value in trial.system_attrs.items() if not name.startswith("constraints")}


def journal(file: Path) -> JournalStorage:
    """Return Optuna's storage in a file."""
    return JournalStorage(JournalFileBackend(str(file)))


def quiet() -> None:
    """Send Optuna's warnings to the run's log; of experimental parts it need not say that they are."""
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    optuna.logging.disable_default_handler()
    optuna.logging.enable_propagation()


def _sampler_class(config: SamplerConfig, n_dimensions: int) -> type[optuna.samplers.BaseSampler]:
    if config.kind == "auto":
        small = n_dimensions <= _GP_MAX_DIMENSIONS
        return optuna.samplers.GPSampler if small else optuna.samplers.TPESampler
    names = [name for name in optuna.samplers.__all__ if name.endswith("Sampler")]
    if config.kind not in names:
        raise MergetuneError(
            f"`sampler` must be `auto` or a class of optuna.samplers, but got `{config.kind}`."
            f"{nearest(config.kind, names)}"
        )
    found: type[optuna.samplers.BaseSampler] = getattr(optuna.samplers, config.kind)
    return found
