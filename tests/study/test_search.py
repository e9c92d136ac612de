"""Samplers by name, and an Optuna study that catches up with the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.trial import TrialState

from mergetune.errors import MergetuneError
from mergetune.results.config import SamplerConfig
from mergetune.study.search import (
    CANDIDATE,
    FAILED,
    Observation,
    Outcome,
    catch_up,
    failure,
    make_sampler,
    open_search,
    success,
    tell,
    try_sampler,
)

SPACE: dict[str, BaseDistribution] = {"lambda.all.a": FloatDistribution(0, 2)}


def known(name: str, value: float, failed: bool = False) -> Observation:
    own = outcome(value)
    return Observation(name, {"lambda.all.a": value}, failure([own], ["maximize"] * 2) if failed else own)


def outcome(value: float) -> Outcome:
    return success([value, -value], {"guard": value - 1.5})


def search(folder: Path) -> optuna.Study:
    return open_search(
        folder / "study.journal", ["maximize", "maximize"], make_sampler(SamplerConfig(), 1, seed=0)
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


def told_anew(study: optuna.Study, folder: Path, *points: Observation) -> optuna.Study:
    return catch_up(study, folder / "study.journal", points, SPACE, failure([outcome(0.0)], ["maximize"] * 2))


def test_a_grid_that_was_searched_ends_the_search(tmp_path: Path) -> None:
    space = {"lambda.all.a": FloatDistribution(0, 1, step=0.5)}
    sampler = SamplerConfig.model_validate({"kind": "BruteForceSampler"})
    try_sampler(sampler, ["maximize", "maximize"], space)
    study = open_search(tmp_path / "study.journal", ["maximize"], make_sampler(sampler, 1, seed=0))
    done = success([1.0], {})
    outcomes = [done, failure([done], ["maximize"]), done]
    assert [tell(study, study.ask(dict(space)), each) for each in outcomes] == [True, True, False]


def test_what_is_known_is_told_once(tmp_path: Path) -> None:
    study = search(tmp_path)
    points = known("base", 0.0), known("trial-0001", 1.0), known("trial-0002", 1.9, failed=True)
    for _ in range(2):
        study = told_anew(study, tmp_path, *points)
    assert [trial.user_attrs[CANDIDATE] for trial in study.trials] == ["base", "trial-0001", "trial-0002"]
    assert study.trials[1].values == [1.0, -1.0]
    assert list(study.trials[1].constraints.values()) == [-0.5, -1.0]
    assert list(study.trials[2].constraints.values())[-1] > 0


def test_dashboards_find_names_and_constraints_where_they_look(tmp_path: Path) -> None:
    """Those of Optuna 5 in the list that optuna-dashboard reads, and by name among the user's attributes."""
    sampler = make_sampler(SamplerConfig(), 1, seed=0)
    study = open_search(tmp_path / "study.journal", ["maximize"] * 2, sampler, ["words", "parity"])
    trial = study.ask(SPACE)
    trial.set_user_attr(CANDIDATE, "trial-0001")
    tell(study, trial, outcome(2.0))
    told = Observation("trial-0001", trial.params, outcome(2.0))
    study = told_anew(study, tmp_path, told, known("base", 0.0))
    assert study.metric_names == ["words", "parity"]
    asked, added = study.trials
    assert asked.system_attrs["constraints"] == [0.5, -1.0]
    assert added.system_attrs["constraints"] == [-1.5, -1.0]
    assert added.user_attrs == {CANDIDATE: "base", "guard.guard": -1.5}


def test_a_failure_looks_like_the_worst_that_is_known() -> None:
    found = failure([outcome(0.5), outcome(1.0)], ["maximize", "minimize"])
    assert found.values == (0.5, -0.5)
    assert found.constraints == {"guard": -0.5, FAILED: 1.0}


def test_a_trial_cut_off_before_it_was_measured_is_tried_again(tmp_path: Path) -> None:
    study = search(tmp_path)
    lost = study.ask(SPACE)
    lost.set_user_attr(CANDIDATE, "trial-0001")
    again = told_anew(search(tmp_path), tmp_path)  # as a new process after kill -9
    assert again.trials[0].state == TrialState.FAIL
    assert again.ask(SPACE).params == lost.params


def test_a_trial_cut_off_between_disk_and_optuna_is_not_repeated(tmp_path: Path) -> None:
    study = search(tmp_path)
    trial = study.ask(SPACE)
    trial.set_user_attr(CANDIDATE, "trial-0001")
    again = told_anew(search(tmp_path), tmp_path, known("trial-0001", trial.params["lambda.all.a"]))
    assert [each.state for each in again.trials] == [TrialState.FAIL, TrialState.COMPLETE]
    assert again.trials[1].params == trial.params


def test_a_study_of_an_earlier_version_is_told_anew(tmp_path: Path) -> None:
    """Its trials lack a constraint, and the GP refuses trials that have different ones."""
    study = search(tmp_path)
    points = [known(f"trial-{i:04d}", i / 10, failed=i == 3) for i in range(12)]
    for each in points:
        study.add_trial(
            optuna.trial.create_trial(
                values=list(each.outcome.values),
                params=dict(each.params),
                distributions=SPACE,
                constraints={"guard": 0.0},
                user_attrs={CANDIDATE: each.name},
                system_attrs={"generation": 2},
            )
        )
    study = told_anew(search(tmp_path), tmp_path, *points)
    assert all(len(trial.system_attrs["constraints"]) == 2 for trial in study.trials)
    assert {trial.system_attrs["generation"] for trial in study.trials} == {2}
    study.ask(SPACE)


@pytest.mark.parametrize("kind", ["GPSampler", "TPESampler"])
def test_a_region_that_fails_is_left(tmp_path: Path, kind: str) -> None:
    """The better a point looks the nearer it lies to a region where nothing can be measured."""
    space: dict[str, BaseDistribution] = {f"lambda.all.{name}": FloatDistribution(0, 2) for name in "ab"}
    sampler = make_sampler(SamplerConfig(kind=kind), 2, seed=0)
    study = open_search(tmp_path / "study.journal", ["maximize", "maximize"], sampler)
    seen: list[Outcome] = []
    fails: list[bool] = []
    for a, b in [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (0.8, 0.8), (1.0, 1.0), (0.3, 0.6)]:
        study.enqueue_trial({"lambda.all.a": a, "lambda.all.b": b})
    for _ in range(35):
        trial = study.ask(space)
        a, b = trial.params["lambda.all.a"], trial.params["lambda.all.b"]
        fails.append(a + b > 2.2)
        if not fails[-1]:
            seen.append(success([a + b / 2, b + a / 2], {}))
        tell(study, trial, failure(seen, ["maximize"] * 2) if fails[-1] else seen[-1])
    assert sum(fails[-15:]) <= 7
    assert not all(fails[10:20])


@pytest.mark.parametrize("damage", [b'{"op_code": 4, "trial', b"\x00" * 40, b"nothing\n{}\n"])
def test_a_journal_that_was_cut_off_or_damaged_ends_no_study(tmp_path: Path, damage: bytes) -> None:
    study, file = search(tmp_path), tmp_path / "study.journal"
    study.add_trial(
        optuna.trial.create_trial(params={"lambda.all.a": 0.5}, distributions=SPACE, values=[0.0, 1.0])
    )
    is_cut_off = not damage.endswith(b"\n")
    file.write_bytes(file.read_bytes() + damage)
    for n_known in (1, 2):
        again = search(tmp_path)
        assert len(again.trials) == (n_known if is_cut_off else n_known - 1)
        again.add_trial(
            optuna.trial.create_trial(params={"lambda.all.a": 0.1}, distributions=SPACE, values=[0.0, 1.0])
        )
    assert (tmp_path / "study.journal.broken").exists() != is_cut_off
