"""The warm start in whole studies on tiny real models, and the space that a finer grain leads to."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml

from mergetune.errors import MergetuneError
from mergetune.merging.inputs import Inputs
from mergetune.results import roles
from mergetune.results.run_dir import RunDir
from mergetune.results.smoothing import search_points
from mergetune.slopes import descent, gradients
from mergetune.space.front_space import FrontSpace
from mergetune.space.recipe import LayerGroup, MergeRecipe, assign_groups
from mergetune.space.search_space import SearchSpace
from mergetune.space.search_space_config import SearchSpaceConfig, finer
from studies import run, write_study


def study_of(folder: Path, base: Path, experts: dict[str, Path], **changes: Any) -> Path:
    return write_study(folder, base, experts, **{"warm_start": "auto", "budget": {"trials": 4}, **changes})


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, tiny_experts: dict[str, Path]
) -> tuple[RunDir, str]:
    folder = tmp_path_factory.mktemp("warm")
    printed = run(study_of(folder, tiny_base, tiny_experts), folder / "run")
    return RunDir(folder / "run"), printed


def test_points_of_slopes_are_measured_first_and_told_to_the_sampler(finished: tuple[RunDir, str]) -> None:
    found, printed = finished
    start = found.warm_start()
    assert start is not None
    assert start.points
    trials = [candidate for candidate in found.candidates() if not candidate.is_baseline]
    first = trials[: len(start.points)]
    assert [candidate.name for candidate in first] == [f"gradient-{i + 1}" for i in range(len(first))]
    assert [candidate.params for candidate in first] == list(start.points)
    assert len(trials) == 4
    assert trials[-1].name == "trial-0004"
    assert f"warm start: {len(first)} points by slopes" in printed
    assert start.full_evaluations > 0
    assert start.seconds > 0
    page = " ".join((found.path / "report" / "index.html").read_text().split())
    assert f"slopes of the losses were followed to {len(first)} point" in page
    frame = found.sensitivity()
    assert frame is not None
    assert set(frame["point"]) == {"base", "average", "recommended"}
    best = MergeRecipe.read(found.path / "best" / "recipe.yaml")
    assert best.digest in set(frame["digest"])
    assert "<h2>Sensitivity</h2>" in page
    assert "warm start" not in run(found.path.parent / "study.yaml", found.path)  # it was done


def test_the_holdout_is_not_seen_by_the_descent(
    finished: tuple[RunDir, str], tmp_path: Path, tiny_base: Path, tiny_experts: dict[str, Path]
) -> None:
    found, _ = finished
    items = found.items()
    held_out = set(items[items["split"] == "holdout"]["prompt"])
    study = study_of(tmp_path, tiny_base, tiny_experts)
    n_changed = 0
    for file in tmp_path.glob("*.jsonl"):  # other answers to the same questions, where they are held out
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        for row in rows:
            if any(row["prompt"] in prompt for prompt in held_out):
                row |= {"answer": 1 - row["answer"]} if "answer" in row else {"patterns": ["zzz"]}
                n_changed += 1
        file.write_text("\n".join(json.dumps(row) for row in rows))
    run(study, tmp_path / "run")
    assert n_changed == len(held_out) < len(items["prompt"].unique())
    again, before = RunDir(tmp_path / "run").warm_start(), found.warm_start()
    assert again is not None
    assert before is not None
    assert again.points == before.points


@pytest.fixture(scope="module")
def finished_finer(
    tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, tiny_experts: dict[str, Path]
) -> RunDir:
    folder = tmp_path_factory.mktemp("finer")
    warm_start = {"kind": "gradient", "grain": "layers"}
    run(study_of(folder, tiny_base, tiny_experts, warm_start=warm_start), folder / "run")
    return RunDir(folder / "run")


def test_a_finer_grain_searches_around_what_it_found(finished_finer: RunDir, tmp_path: Path) -> None:
    found = finished_finer
    start = found.warm_start()
    assert start is not None
    assert {key.split(".")[1] for key in start.points[0]} == {"outside", "layer0", "layer1"}
    trials = [candidate for candidate in found.candidates() if not candidate.is_baseline]
    towards = {f"toward.{i}" for i in range(1, len(start.points))}
    for candidate in trials:
        assert candidate.params is not None
        assert candidate.params.keys() == towards | {"times.all.a", "times.all.b"}
    spaces = {c.name: (c.space, c.params is not None) for c in found.candidates()}
    assert spaces["average-0.5"] == ("search_space", True)  # a baseline keeps its own point
    assert {spaces[candidate.name] for candidate in trials} == {("front", True)}
    smoothed = search_points(found.candidates())
    assert set(smoothed.index) == {candidate.name for candidate in trials}
    study = optuna.load_study(study_name="mergetune", storage=f"sqlite:///{found.path / 'study.db'}")
    told = {trial.user_attrs.get("candidate") for trial in study.trials}
    assert {candidate.name for candidate in trials} <= told
    for candidate, point in zip(trials, start.points, strict=False):
        lambdas = {
            f"lambda.{group.name}.{expert}": value
            for group in candidate.recipe.groups
            for expert, value in group.per_expert("lambda").items()
        }
        assert lambdas == pytest.approx(point)
    shutil.copytree(found.path, tmp_path / "longer")
    longer = yaml.safe_load((found.path / "study.yaml").read_text()) | {"budget": {"trials": 5}}
    (tmp_path / "longer.yaml").write_text(yaml.safe_dump(longer))
    assert "trial-0005" in run(tmp_path / "longer.yaml", tmp_path / "longer")


def test_before_the_first_trial_the_sampler_is_told_nothing(
    tmp_path: Path, tiny_base: Path, tiny_experts: dict[str, Path]
) -> None:
    """The space around the points is not known then, and baselines in another one would confuse it."""
    changes: dict[str, Any] = {"warm_start": {"grain": "layers"}, "budget": {"trials": 0}}
    run(study_of(tmp_path, tiny_base, tiny_experts, **changes), tmp_path / "run")
    found = optuna.load_study(study_name="mergetune", storage=f"sqlite:///{tmp_path / 'run' / 'study.db'}")
    assert found.trials == []


def test_where_it_cannot_be_done_the_search_begins_without_and_says_why(
    tmp_path: Path, tiny_base: Path, tiny_experts: dict[str, Path]
) -> None:
    changes: dict[str, Any] = {"budget": {"trials": 1}}
    fixed = {"description": "test", "method": "ties", "lambda": 1.0, "groups": [{"name": "all"}]}
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(fixed))
    changes["search_space"] = str(tmp_path / "space.yaml")
    printed = run(study_of(tmp_path / "auto", tiny_base, tiny_experts, **changes), tmp_path / "run")
    assert "warm start: none; `ties` has no coefficient here that losses have a slope in" in printed
    assert "trial-0001" in printed
    asked = study_of(tmp_path / "asked", tiny_base, tiny_experts, warm_start="gradient", **changes)
    with pytest.raises(MergetuneError, match="`warm_start: gradient` cannot be done: `ties` has no"):
        run(asked, tmp_path / "other")
    assert not (tmp_path / "other").exists()  # before anything was measured


def test_a_sampler_that_could_not_search_around_the_points_is_refused_at_once(
    tmp_path: Path, tiny_base: Path, tiny_experts: dict[str, Path]
) -> None:
    keys = [f"lambda.all.{name}" for name in tiny_experts]
    study = study_of(
        tmp_path,
        tiny_base,
        tiny_experts,
        sampler={"kind": "GridSampler", "search_space": {key: [0.5, 1.0] for key in keys}},
        warm_start={"grain": "layers"},
    )
    with pytest.raises(MergetuneError, match="GridSampler cannot search this study"):
        run(study, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_points_that_are_all_worse_than_the_start_are_said_to_be(
    tmp_path: Path, tiny_base: Path, tiny_experts: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(descent, "_CLEARLY", -math.inf)
    printed = run(study_of(tmp_path, tiny_base, tiny_experts, budget={"trials": 1}), tmp_path / "run")
    words = "Every point that the slopes led to was clearly worse than the start on items kept apart."
    assert words in " ".join(printed.split())
    found = RunDir(tmp_path / "run")
    start = found.warm_start()
    assert start is not None
    assert start.full_evaluations > 0
    assert [each.name for each in found.candidates() if not each.is_baseline] == ["trial-0001"]
    assert words in " ".join((found.path / "report" / "index.html").read_text().split())


def test_slopes_that_overflow_cost_neither_report_nor_model(
    finished: tuple[RunDir, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, _ = finished
    shutil.copytree(found.path, tmp_path / "run")
    (tmp_path / "run" / "sensitivity.parquet").unlink()
    shutil.rmtree(tmp_path / "run" / "best")
    monkeypatch.setattr(gradients, "coefficient_slopes", lambda *_: {("lambda", "a"): math.nan})
    printed = run(tmp_path / "run" / "study.yaml", tmp_path / "run")
    assert "no sensitivity: the slopes of" in printed
    assert (tmp_path / "run" / "best" / "recipe.yaml").exists()
    assert not (tmp_path / "run" / "sensitivity.parquet").exists()


def test_a_study_cut_before_its_first_point_goes_on_around_it(finished_finer: RunDir, tmp_path: Path) -> None:
    """With a finer grain, what the sampler is told depends on what was found, not on when it was cut."""
    cut = RunDir(tmp_path / "cut")
    shutil.copytree(finished_finer.path, cut.path)
    for file in (cut.path / "candidates").glob("*"):
        if roles.role_of(file.name) in roles.SEARCHED:
            file.unlink()
    (cut.path / "study.db").unlink()
    average = cut.candidate("average-0.5")
    assert average is not None
    params = {"lambda.all.a": 0.5, "lambda.all.b": 0.5}  # as before the points were found
    cut.write_candidate(average.model_copy(update={"params": params}), None)
    run(cut.path / "study.yaml", cut.path)
    whole, again = (
        {each.name: (each.recipe.digest, each.params) for each in one.candidates()}
        for one in (finished_finer, cut)
    )
    assert list(again) == list(whole)
    points = [name for name in whole if not name.startswith("trial-")]
    assert any(roles.role_of(name) == "slopes" for name in points)
    assert [again[name] for name in points] == [whole[name] for name in points]


def test_points_that_are_lost_are_measured_again_and_no_more_than_the_budget_allows(
    finished: tuple[RunDir, str], tmp_path: Path
) -> None:
    found, _ = finished
    shutil.copytree(found.path, tmp_path / "run")
    for file in (tmp_path / "run" / "candidates").glob("trial-*"):
        file.unlink()
    for file in (tmp_path / "run" / "candidates").glob("gradient-2.*"):
        file.unlink()
    shorter = yaml.safe_load((tmp_path / "run" / "study.yaml").read_text()) | {"budget": {"trials": 2}}
    (tmp_path / "shorter.yaml").write_text(yaml.safe_dump(shorter))
    run(tmp_path / "shorter.yaml", tmp_path / "run")
    again, before = RunDir(tmp_path / "run").candidate("gradient-2"), found.candidate("gradient-2")
    assert again is not None
    assert before is not None
    assert again.recipe == before.recipe
    run(
        study_of(tmp_path / "one", Path(shorter["base"]), shorter["experts"], budget={"trials": 1}),
        tmp_path / "a",
    )
    names = [each.name for each in RunDir(tmp_path / "a").candidates() if not each.is_baseline]
    assert names == ["gradient-1"]


def test_a_finer_grain_needs_layer_groups(
    tmp_path: Path, tiny_base: Path, tiny_experts: dict[str, Path]
) -> None:
    grain = {"warm_start": {"grain": "layers"}, "search_space": "task_arithmetic_anchors"}
    with pytest.raises(MergetuneError, match="needs a search space of layer groups"):
        run(study_of(tmp_path, tiny_base, tiny_experts, **grain), tmp_path / "run")


def bound(config: SearchSpaceConfig, inputs: Inputs) -> SearchSpace:
    return SearchSpace(config, inputs.base_source, inputs.expert_sources, inputs.changed, inputs.base.names)


COARSE = SearchSpaceConfig.model_validate(
    {"description": "test", "method": "task_arithmetic", "groups": [{"name": "all"}]}
)


@pytest.mark.parametrize("grain", ["layers", "attention_mlp", "tensors"])
def test_a_finer_space_takes_each_tensor_once(inputs: Inputs, grain: Any) -> None:
    space = finer(COARSE, grain, inputs.base.names)
    groups = bound(space, inputs).groups
    assert set(assign_groups(groups, inputs.base.names)) == set(inputs.base.names)
    n_tensors = len(inputs.base.names)
    assert len(groups) == {"layers": 3, "attention_mlp": 5, "tensors": n_tensors}[grain]
    assert finer(COARSE, "search_space", inputs.base.names) == COARSE


def test_a_finer_space_keeps_the_ranges_of_single_groups(inputs: Inputs) -> None:
    groups = [
        {"name": "still", "match": r"^(?!.*layers\.)", "lambda": 0.0},
        {"name": "moved", "match": r"layers\.", "lambda": {"low": 0.0, "high": 1.0}},
    ]
    config = COARSE.model_validate({"description": "test", "method": "task_arithmetic", "groups": groups})
    space = bound(finer(config, "layers", inputs.base.names), inputs)
    assert {key.split(".")[1] for key in space.distributions} == {"layer0", "layer1"}
    assert {each.high for each in space.distributions.values()} == {1.0}


@pytest.mark.parametrize(("grain", "n_groups"), [("layers", 2 + 2 * 3), ("attention_mlp", 2 + 2 * 3)])
def test_a_layer_that_groups_cut_across_keeps_the_ranges_of_each(
    inputs: Inputs, grain: Any, n_groups: int
) -> None:
    """Attention in both layers, embeddings and MLPs by a pattern, and what is left."""
    groups: list[dict[str, Any]] = [
        {"name": "attention", "roles": ["attention"]},
        {"name": "large", "match": "embed|mlp"},
        {"name": "rest", "match": r"norm|head"},
    ]
    for high, each in enumerate(groups, start=1):
        each["lambda"] = {"low": 0.0, "high": high}
    config = COARSE.model_validate({"description": "test", "method": "task_arithmetic", "groups": groups})
    coarse, fine = bound(config, inputs), bound(finer(config, grain, inputs.base.names), inputs)
    of_coarse, of_fine = (assign_groups(each.groups, inputs.base.names) for each in (coarse, fine))
    for name, group in of_fine.items():
        wanted = coarse.distributions[f"lambda.{of_coarse[name].name}.a"]
        assert fine.distributions[f"lambda.{group.name}.a"] == wanted
    assert len(fine.groups) == n_groups
    origin = {key: 0.5 for key in fine.distributions}
    around = FrontSpace(fine, [origin], coarse.groups, inputs.base.names)
    recipe = around.recipe({**around.corner(0), "times.attention.a": 1.5})
    moved = {group.name for group in recipe.groups if group.per_expert("lambda")["a"] == 0.75}
    assert moved == {of_fine[name].name for name, group in of_coarse.items() if group.name == "attention"}


def test_what_lies_at_a_corner_is_found_there_and_nothing_else(inputs: Inputs) -> None:
    fine = bound(finer(COARSE, "layers", inputs.base.names), inputs)
    points = [dict.fromkeys(fine.distributions, 0.5), dict.fromkeys(fine.distributions, 0.9)]
    space = FrontSpace(fine, points, bound(COARSE, inputs).groups, inputs.base.names)
    for value, toward in ((0.4, 0.0), (0.75, 0.0), (1.2, 1.0)):
        wanted = dict.fromkeys(fine.distributions, value)
        place = space.place(wanted)
        assert place is not None
        assert place["toward.1"] == toward
        assert space.recipe(place) == fine.recipe(wanted)
    uneven = {key: 0.4 + 0.1 * ("layer0" in key) for key in fine.distributions}
    for outside in (dict.fromkeys(fine.distributions, 0.0), dict.fromkeys(fine.distributions, 1.5), uneven):
        assert space.place(outside) is None


def test_the_design_around_the_points_is_the_same_at_every_start(inputs: Inputs) -> None:
    fine = bound(finer(COARSE, "layers", inputs.base.names), inputs)
    points = [dict.fromkeys(fine.distributions, value) for value in (0.5, 0.9, 0.2)]
    space = FrontSpace(fine, points, bound(COARSE, inputs).groups, inputs.base.names)
    found = space.design(7, seed=0)
    assert found == space.design(7, seed=0)
    assert space.design(0, seed=0) == []
    assert len({tuple(params.values()) for params in found}) == 7
    for params in found:
        assert params["toward.1"] + params["toward.2"] <= 1
        assert all(0.75 <= value <= 1.25 for key, value in params.items() if key.startswith("times"))


def test_points_are_mixed_and_multiplied_within_their_ranges(inputs: Inputs) -> None:
    fine = bound(finer(COARSE, "layers", inputs.base.names), inputs)
    origin = {key: 0.4 for key in fine.distributions}
    points = [origin, {**origin, "lambda.layer0.a": 1.0}, {**origin, "lambda.layer1.b": 1.8}]
    coarse = [
        LayerGroup(name="first", match=r"layers\.0\."),
        LayerGroup(name="rest", match=r"^(?!.*layers\.0\.)"),
    ]
    space = FrontSpace(fine, points, coarse, inputs.base.names)
    assert list(space.distributions) == [
        *("toward.1", "toward.2"),
        *("times.rest.a", "times.rest.b", "times.first.a", "times.first.b"),
    ]
    for number, point in enumerate(points):
        assert space.recipe(space.corner(number)) == fine.recipe(point)
    params = {**space.corner(0), "toward.1": 0.5, "toward.2": 1.0, "times.first.a": 1.5, "times.rest.b": 1.5}
    expected = {**origin, "lambda.layer0.a": 0.7 * 1.5, "lambda.layer1.b": 2.0, "lambda.outside.b": 0.4 * 1.5}
    found, wanted = space.recipe(params), fine.recipe(expected)
    for one, other in zip(found.groups, wanted.groups, strict=True):
        assert one.per_expert("lambda") == pytest.approx(other.per_expert("lambda"))
