"""The Optuna side of a study: sampler, storage, and what a resumed study must be told."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import TrialState

from optimizer.config import SamplerConfig
from optimizer.errors import MergetuneError
from optimizer.run_dir import Candidate
from optimizer.suite import Direction
from optimizer.yaml_io import nearest

# User attributes of a trial: the name of its candidate, and why there is none where its point has no recipe.
CANDIDATE, REFUSED = "candidate", "refused"

# A GP learns a smooth landscape from few trials; beyond this many dimensions it no longer does
# (Optuna's documentation gives its budget as 10 to 100 trials).
_GP_MAX_DIMENSIONS = 24


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


def try_sampler(
    config: SamplerConfig, directions: Sequence[Direction], distributions: Mapping[str, BaseDistribution]
) -> None:
    """Ask a sampler for a trial after two others, in memory, before any work is done for it.

    Raises:
        MergetuneError: it cannot search so many objectives, or such ranges.
    """
    sampler = make_sampler(config, len(distributions), seed=0)
    _quiet()
    search = optuna.create_study(directions=list(directions), sampler=sampler)
    for end in ("low", "high"):
        params = {name: getattr(each, end) for name, each in distributions.items()}
        search.add_trial(
            optuna.trial.create_trial(
                values=[0.0] * len(directions), params=params, distributions=dict(distributions)
            )
        )
    try:
        search.ask(dict(distributions))
    except Exception as error:  # samplers have many ways to say that they cannot
        raise MergetuneError(
            f"`sampler`: {type(sampler).__name__} cannot search this study ({error}). Take another one, or "
            "`auto`."
        ) from error


def open_search(
    storage: Path, directions: Sequence[Direction], sampler: optuna.samplers.BaseSampler
) -> optuna.Study:
    """Open the Optuna study in an SQLite file, new or going on."""
    _quiet()
    return optuna.create_study(
        storage=f"sqlite:///{storage}",
        study_name="mergetune",
        directions=list(directions),
        sampler=sampler,
        load_if_exists=True,
    )


def tell(search: optuna.Study, trial: optuna.Trial | int, values: Sequence[float] | None) -> bool:
    """Tell a trial's values, None where it failed; returns False where that was the last of a grid."""
    try:
        search.tell(trial, values, TrialState.FAIL if values is None else None)
    except RuntimeError as error:  # so a sampler that has proposed every point ends a loop of Optuna's own
        if "Study.stop" not in str(error):
            raise
        return False
    return True


def refused(search: optuna.Study) -> set[str]:
    """Return the names of the trials whose points have no recipe."""
    return {trial.user_attrs[CANDIDATE] for trial in search.get_trials() if REFUSED in trial.user_attrs}


def catch_up(
    search: optuna.Study,
    candidates: Sequence[Candidate],
    distributions: Mapping[str, BaseDistribution],
    outcome: Callable[[Candidate], tuple[list[float], Mapping[str, float]]],
) -> None:
    """Tell Optuna what is on disk and it does not know, and take back what was cut off.

    A trial that was asked for and never measured is enqueued again; a candidate measured but never
    told (the process died in between, or it is a baseline) is added.

    Args:
        search: the Optuna study.
        candidates: those on disk.
        distributions: of the search space.
        outcome: gives a complete candidate's objective values and constraints.
    """
    on_disk = {candidate.name for candidate in candidates}
    for trial in search.get_trials(states=[TrialState.RUNNING]):
        tell(search, trial.number, None)
        if trial.user_attrs.get(CANDIDATE) not in on_disk and trial.params:
            search.enqueue_trial(trial.params)
    told = {trial.user_attrs.get(CANDIDATE) for trial in search.get_trials(states=[TrialState.COMPLETE])}
    for candidate in candidates:
        if candidate.params is None or candidate.state != "complete" or candidate.name in told:
            continue
        values, constraints = outcome(candidate)
        search.add_trial(
            optuna.trial.create_trial(
                values=values,
                params=candidate.params,
                distributions=dict(distributions),
                constraints=dict(constraints),
                user_attrs={CANDIDATE: candidate.name},
            )
        )


def _quiet() -> None:
    """Send Optuna's warnings to the run's log."""
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
