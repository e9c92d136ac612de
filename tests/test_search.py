"""Samplers by name, and an Optuna study that catches up with the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.trial import TrialState

from optimizer.config import SamplerConfig
from optimizer.errors import MergetuneError
from optimizer.recipe import MergeRecipe
from optimizer.run_dir import Candidate
from optimizer.search import CANDIDATE, catch_up, make_sampler, open_search, tell, try_sampler

SPACE: dict[str, BaseDistribution] = {"lambda.all.a": FloatDistribution(0, 2)}


def candidate(name: str, value: float, **fields: Any) -> Candidate:
    recipe = MergeRecipe.model_validate(
        {
            "method": "task_arithmetic",
            "base": {"path": "base"},
            "experts": {"a": {"path": "a"}},
            "groups": [{"name": "all", "lambda": {"a": value}}],
        }
    )
    kind = "trial" if name.startswith("trial") else "baseline"
    data = {
        "name": name,
        "number": 0,
        "kind": kind,
        "recipe": recipe,
        "params": {"lambda.all.a": value},
        **fields,
    }
    return Candidate.model_validate(data)


def outcome(found: Candidate) -> tuple[list[float], dict[str, float]]:
    value = found.recipe.groups[0].per_expert("lambda")["a"]
    return [value, -value], {"guard": value - 1.5}


def search(folder: Path) -> optuna.Study:
    return open_search(
        folder / "study.db", ["maximize", "maximize"], make_sampler(SamplerConfig(), 1, seed=0)
    )


@pytest.mark.parametrize(
    ("config", "dimensions", "expected"),
    [
        ({}, 12, "GPSampler"),
        ({}, 60, "TPESampler"),
        ({"kind": "NSGAIISampler", "population_size": 20}, 12, "NSGAIISampler"),
        ({"kind": "RandomSampler"}, 3, "RandomSampler"),
    ],
)
def test_samplers_by_size_of_the_space_and_by_name(config: Any, dimensions: int, expected: str) -> None:
    sampler = make_sampler(SamplerConfig.model_validate(config), dimensions, seed=0)
    assert type(sampler).__name__ == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"kind": "GPSamplr"}, "Did you mean `GPSampler`"),
        ({"kind": "GPSampler", "n_startup": 3}, "Did you mean `n_startup_trials`"),
        ({"kind": "NSGAIISampler", "population_size": 1}, "refuses its options"),
    ],
)
def test_a_wrong_sampler_is_refused_with_the_remedy(config: Any, message: str) -> None:
    with pytest.raises(MergetuneError, match=message):
        make_sampler(SamplerConfig.model_validate(config), 2, seed=0)


@pytest.mark.parametrize(
    ("config", "n_objectives"),
    [
        ({"kind": "CmaEsSampler"}, 2),
        ({"kind": "BruteForceSampler"}, 1),
        ({"kind": "GridSampler", "search_space": {"another": [0.5]}}, 1),
    ],
)
def test_a_sampler_that_cannot_search_the_study_is_refused(config: Any, n_objectives: int) -> None:
    sampler = SamplerConfig.model_validate(config)
    with pytest.raises(MergetuneError, match=f"{config['kind']} cannot search this study .* Take another"):
        try_sampler(sampler, ["maximize"] * n_objectives, SPACE)


@pytest.mark.parametrize("kind", ["auto", "TPESampler", "NSGAIISampler", "QMCSampler"])
def test_samplers_that_can_are_not(kind: str) -> None:
    for space in (SPACE, {}):
        try_sampler(SamplerConfig(kind=kind), ["maximize"], space)


def test_a_grid_that_was_searched_ends_the_search(tmp_path: Path) -> None:
    space = {"lambda.all.a": FloatDistribution(0, 1, step=0.5)}
    sampler = SamplerConfig.model_validate({"kind": "BruteForceSampler"})
    try_sampler(sampler, ["maximize", "maximize"], space)
    study = open_search(tmp_path / "study.db", ["maximize"], make_sampler(sampler, 1, seed=0))
    assert [tell(study, study.ask(dict(space)), values) for values in ([1.0], None, [0.5])] == [
        *(True, True, False)
    ]
    assert [trial.state for trial in study.trials] == [
        *(TrialState.COMPLETE, TrialState.FAIL, TrialState.COMPLETE)
    ]


def test_measured_candidates_are_told_once(tmp_path: Path) -> None:
    study = search(tmp_path)
    measured = [candidate("base", 0.0), candidate("trial-0001", 1.0), candidate("outside", 0.5, params=None)]
    measured.append(candidate("trial-0002", 1.9, state="failed", reason="NaN"))
    for _ in range(2):
        catch_up(study, measured, SPACE, outcome)
    assert [trial.user_attrs[CANDIDATE] for trial in study.trials] == ["base", "trial-0001"]
    assert study.trials[1].values == [1.0, -1.0]
    assert study.trials[1].constraints == {"guard": -0.5}


def test_a_trial_cut_off_before_it_was_measured_is_tried_again(tmp_path: Path) -> None:
    study = search(tmp_path)
    lost = study.ask(SPACE)
    lost.set_user_attr(CANDIDATE, "trial-0001")
    again = search(tmp_path)  # as a new process after kill -9
    catch_up(again, [], SPACE, outcome)
    assert again.trials[0].state == TrialState.FAIL
    assert again.ask(SPACE).params == lost.params


def test_a_trial_cut_off_between_disk_and_optuna_is_not_repeated(tmp_path: Path) -> None:
    study = search(tmp_path)
    trial = study.ask(SPACE)
    trial.set_user_attr(CANDIDATE, "trial-0001")
    measured = candidate("trial-0001", trial.params["lambda.all.a"])
    again = search(tmp_path)
    catch_up(again, [measured], SPACE, outcome)
    states = [trial.state for trial in again.trials]
    assert states == [TrialState.FAIL, TrialState.COMPLETE]
    assert again.trials[1].params == trial.params
