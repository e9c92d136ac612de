"""The warm start in whole studies on tiny real models, and the space that a finer grain leads to."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml

from mergetune.errors import MergetuneError, TrialError
from mergetune.measuring import pool
from mergetune.measuring.pool import Pool
from mergetune.merging.inputs import Inputs
from mergetune.results.run_dir import Candidate, RunDir
from mergetune.results.smoothing import search_points
from mergetune.slopes import descent, gradients
from mergetune.space.front_space import FrontSpace
from mergetune.space.recipe import MergeRecipe, assign_groups
from mergetune.space.search_space import SearchSpace
from mergetune.space.search_space_config import SearchSpaceConfig, finer
from mergetune.study import warm_start
from mergetune.study.search import journal
from studies import run, write_study


def study_of(folder: Path, base: Path, experts: dict[str, Path], **changes: Any) -> Path:
    return write_study(folder, base, experts, **{"warm_start": "auto", "budget": {"trials": 9}, **changes})


@pytest.fixture(scope="module", autouse=True)
def _short() -> Iterator[None]:
    """Descents that end soon."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(warm_start, "_PATIENCE", 2)
        patched.setattr(warm_start, "_N_EMPHASIZED", 1)
        yield


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, tiny_experts: dict[str, Path]
) -> tuple[RunDir, str]:
    folder = tmp_path_factory.mktemp("warm")
    printed = run(study_of(folder, tiny_base, tiny_experts), folder / "run")
    return RunDir(folder / "run"), printed


def of_role(run: RunDir, role: str) -> list[Candidate]:
    return [candidate for candidate in run.candidates() if candidate.role == role]


def test_points_of_slopes_are_measured_first_and_the_sampler_goes_on_around_them(
    finished: tuple[RunDir, str],
) -> None:
    found, printed = finished
    start, record = found.warm_start(), found.warm_start_record()
    assert start is not None
    assert record is not None
    by_slopes, trials = of_role(found, "slopes"), of_role(found, "trial")
    n_found = len(by_slopes)
    assert [each.name for each in by_slopes] == [f"gradient-{i + 1}" for i in range(n_found)]
    assert [each.name for each in trials] == [f"trial-{i:04d}" for i in range(n_found + 1, 10)]
    assert [each["trajectory"] for each in record["checkpoints"][-3:]] == ["", "parity", "words"]
    assert f"warm start: {n_found} points by slopes for the cost of" in printed
    assert 0 < start.seconds < found.spent_s()
    assert len(start.points) == 3
    best, *others = start.points
    assert others == [f"gradient-{n_found - 1}", f"gradient-{n_found}"]
    tensors = {key.split(".")[1] for key in start.points[best]}
    assert len(tensors) == len(json.loads((found.path / "model.json").read_text())["tensors"])
    for candidate in trials:
        assert candidate.space == "front"
        assert candidate.params is not None
        towards = {f"toward.{name}" for name in others}
        assert candidate.params.keys() == towards | {"times.all.a", "times.all.b"}
    study = optuna.load_study(study_name="mergetune", storage=journal(found.path / "study.journal"))
    told = {trial.user_attrs.get("candidate"): trial.params for trial in study.trials}
    assert {candidate.name for candidate in trials} <= told.keys()
    corners = [name for name in told if name and name.startswith("gradient")]
    assert len(corners) == 3
    assert {told[name]["times.all.a"] for name in corners} == {1.0}
    page = " ".join((found.path / "report" / "index.html").read_text().split())
    assert f"the slopes of the losses were followed to {n_found} points" in page
    frame = found.sensitivity()
    assert frame is not None
    assert set(frame["point"]) == {"base", "average", "recommended"}
    chosen = MergeRecipe.read(found.path / "best" / "recipe.yaml")
    assert chosen.digest in set(frame["digest"])
    assert "<h2>Sensitivity</h2>" in page
    assert "warm start" not in run(found.path.parent / "study.yaml", found.path)  # it was done


def test_the_holdout_is_not_seen_by_the_descent(
    finished: tuple[RunDir, str], tmp_path: Path, tiny_base: Path, tiny_experts: dict[str, Path]
) -> None:
    found, _ = finished
    items = found.items()
    held_out = set(items[items["split"] == "holdout"]["prompt"])
    study = study_of(tmp_path, tiny_base, tiny_experts, budget={"trials": 2})
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
    again, before = RunDir(tmp_path / "run").warm_start_record(), found.warm_start_record()
    assert again is not None
    assert before is not None
    assert again["checkpoints"] == before["checkpoints"][:2]


def recipes(run: RunDir) -> dict[str, tuple[str, dict[str, float] | None]]:
    return {each.name: (each.recipe.digest, each.params) for each in run.candidates()}


def test_a_study_cut_anywhere_goes_on_to_the_same_points(
    finished: tuple[RunDir, str], tmp_path: Path, tiny_base: Path, tiny_experts: dict[str, Path]
) -> None:
    """Ended after a checkpoint, and a longer budget; ended before a checkpoint was measured; lost files."""
    whole, study = finished[0], study_of(tmp_path, tiny_base, tiny_experts, budget={"trials": 1})
    cut = RunDir(tmp_path / "run")
    run(study, cut.path)
    assert [each.name for each in cut.candidates() if not each.is_baseline] == ["gradient-1"]
    for file in (cut.path / "candidates").glob("gradient-1*"):
        file.unlink()
    longer = yaml.safe_load(study.read_text()) | {"budget": {"trials": 9}}
    study.write_text(yaml.safe_dump(longer))
    run(study, cut.path)
    assert recipes(cut) == recipes(whole)
    for file in (cut.path / "candidates").glob("gradient-2.*"):
        file.unlink()
    run(study, cut.path)
    lost = cut.candidate("gradient-2")
    assert lost is not None
    assert lost.recipe == whole.candidate("gradient-2").recipe  # type: ignore[union-attr]


def test_slopes_may_be_followed_in_the_search_space_itself(
    tmp_path: Path, tiny_base: Path, tiny_experts: dict[str, Path]
) -> None:
    study = study_of(tmp_path, tiny_base, tiny_experts, warm_start={"grain": "search_space"})
    run(study, tmp_path / "run")
    found = RunDir(tmp_path / "run")
    for each in (*of_role(found, "slopes"), *of_role(found, "trial")):
        assert each.space == "search_space"
        assert each.params is not None
        assert each.params.keys() == {"lambda.all.a", "lambda.all.b"}
    smoothed = search_points(found.candidates())
    assert {"average-0.5", "gradient-1"} <= set(smoothed.index)


def test_before_the_first_trial_the_sampler_is_told_nothing(
    tmp_path: Path, tiny_base: Path, tiny_experts: dict[str, Path]
) -> None:
    """The space around the points is not known then, and baselines in another one would confuse it."""
    run(study_of(tmp_path, tiny_base, tiny_experts, budget={"trials": 0}), tmp_path / "run")
    found = optuna.load_study(study_name="mergetune", storage=journal(tmp_path / "run" / "study.journal"))
    assert found.trials == []
    assert RunDir(tmp_path / "run").warm_start() is None


def test_other_engines_make_room_for_several_checkpoints_at_once(
    tmp_path: Path, tiny_base: Path, tiny_experts: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As vLLM does, which takes long to start."""
    lent: list[int] = []
    plain = Pool.transformers

    def transformers(pool: Pool) -> Any:
        lent.append(1)
        pool.config = pool.config.model_copy(update={"kind": "vllm"})
        return plain(pool)

    monkeypatch.setattr(pool, "_AT_ONCE", 3)
    monkeypatch.setattr(Pool, "transformers", transformers)
    monkeypatch.setattr(Pool, "start", lambda pool: pool.config.model_copy(update={"kind": "vllm"}))
    run(study_of(tmp_path, tiny_base, tiny_experts, budget={"trials": 2}), tmp_path / "run")
    record = RunDir(tmp_path / "run").warm_start_record()
    assert record is not None
    assert len(record["checkpoints"]) == 1 + 3  # the first before the kind is known
    assert len(of_role(RunDir(tmp_path / "run"), "slopes")) == 2


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
    )
    with pytest.raises(MergetuneError, match="GridSampler cannot search this study"):
        run(study, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_steps_that_lead_nowhere_new_are_not_measured_again(
    tmp_path: Path, tiny_base: Path, tiny_experts: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    first: list[Any] = []

    def take_steps(*given: Any) -> Any:
        first.append(first[0] if first else plain(*given))
        return first[0]

    plain = descent.take_steps
    monkeypatch.setattr(warm_start, "take_steps", take_steps)
    run(study_of(tmp_path, tiny_base, tiny_experts, budget={"trials": 3}), tmp_path / "run")
    found = RunDir(tmp_path / "run")
    assert [each.name for each in of_role(found, "slopes")] == ["gradient-1"]
    assert len(of_role(found, "trial")) == 2


def test_slopes_that_break_off_leave_what_they_led_to(
    tmp_path: Path, tiny_base: Path, tiny_experts: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def take_steps(*given: Any) -> Any:
        found = plain(*given)
        if found.trajectory.n_steps > 5:
            raise TrialError("the slopes of `words` must be finite, but got nan")
        return found

    plain = descent.take_steps
    monkeypatch.setattr(warm_start, "take_steps", take_steps)
    printed = run(study_of(tmp_path, tiny_base, tiny_experts, budget={"trials": 2}), tmp_path / "run")
    words = "the slopes of `words` must be finite, but got nan"
    assert f"warm start: ended; {words}" in printed
    found = RunDir(tmp_path / "run")
    start = found.warm_start()
    assert start is not None
    assert len(start.points) == 1
    names = [each.name for each in found.candidates() if not each.is_baseline]
    assert names == ["gradient-1", "trial-0002"]
    assert "must be finite, but got nan" in (found.path / "report" / "index.html").read_text()


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


def test_a_finer_grain_needs_layer_groups(
    tmp_path: Path, tiny_base: Path, tiny_experts: dict[str, Path]
) -> None:
    grain = {"warm_start": {"grain": "layers"}, "search_space": "task_arithmetic_anchors"}
    with pytest.raises(MergetuneError, match="needs a search space of layer groups"):
        run(study_of(tmp_path, tiny_base, tiny_experts, **grain), tmp_path / "run")


def bound(config: SearchSpaceConfig, inputs: Inputs) -> SearchSpace:
    return SearchSpace(config, inputs.base_source, inputs.expert_sources, inputs.changed, inputs.base.names)


COARSE_TEXT: dict[str, Any] = {
    "description": "test",
    "method": "task_arithmetic",
    "groups": [{"name": "all"}],
}
COARSE = SearchSpaceConfig.model_validate(COARSE_TEXT)


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
    around = FrontSpace(fine, {"p": origin}, coarse, inputs.base.names)
    recipe = around.recipe({**around.corner("p"), "times.attention.a": 1.5})
    moved = {group.name for group in recipe.groups if group.per_expert("lambda")["a"] == 0.75}
    assert moved == {of_fine[name].name for name, group in of_coarse.items() if group.name == "attention"}


def test_what_lies_at_a_corner_is_found_there_and_nothing_else(inputs: Inputs) -> None:
    fine = bound(finer(COARSE, "layers", inputs.base.names), inputs)
    points = {name: dict.fromkeys(fine.distributions, value) for name, value in (("p", 0.5), ("q", 0.9))}
    space = FrontSpace(fine, points, bound(COARSE, inputs), inputs.base.names)
    for value, toward in ((0.4, 0.0), (0.75, 0.0), (1.2, 1.0)):
        wanted = dict.fromkeys(fine.distributions, value)
        place = space.place(wanted)
        assert place is not None
        assert place["toward.q"] == toward
        assert space.recipe(place) == fine.recipe(wanted)
    uneven = {key: 0.4 + 0.1 * ("layer0" in key) for key in fine.distributions}
    for outside in (dict.fromkeys(fine.distributions, 0.0), dict.fromkeys(fine.distributions, 1.5), uneven):
        assert space.place(outside) is None


def test_the_design_around_the_points_is_the_same_at_every_start(inputs: Inputs) -> None:
    fine = bound(finer(COARSE, "layers", inputs.base.names), inputs)
    values = {"p": 0.5, "q": 0.9, "r": 0.2}
    points = {name: dict.fromkeys(fine.distributions, value) for name, value in values.items()}
    space = FrontSpace(fine, points, bound(COARSE, inputs), inputs.base.names)
    found = space.design(7, seed=0)
    assert found == space.design(7, seed=0)
    assert space.design(0, seed=0) == []
    assert len({tuple(params.values()) for params in found}) == 7
    for params in found:
        assert params["toward.q"] + params["toward.r"] <= 1
        assert all(0.75 <= value <= 1.25 for key, value in params.items() if key.startswith("times"))


def test_densities_are_searched_around_the_points(inputs: Inputs) -> None:
    """They have no slopes; without this, nothing would move them in single tensors."""
    density = {"low": 0.1, "high": 1.0, "step": 0.1}
    groups = [
        {"name": "first", "match": r"layers\.0\."},
        {"name": "rest", "match": r"^(?!.*layers\.0\.)", "density": density},
    ]
    config = COARSE.model_validate({**COARSE_TEXT, "method": "ties", "density": 0.4, "groups": groups})
    coarse, fine = bound(config, inputs), bound(finer(config, "tensors", inputs.base.names), inputs)
    origin = {key: 0.4 for key in fine.distributions}
    points = {"p": origin, "q": {**origin, "lambda.lm_head-weight.a": 1.0}}
    space = FrontSpace(fine, points, coarse, inputs.base.names)
    assert set(space.distributions) == {
        *("toward.q", "times.first.a", "times.first.b", "times.rest.a", "times.rest.b"),
        *("density.rest.a", "density.rest.b"),
    }
    params = {**space.corner("p"), "density.rest.b": 0.7}
    assert space.corner("q")["density.rest.b"] == 0.4
    densities = {group.name: group.per_expert("density") for group in space.recipe(params).groups}
    of_coarse, of_fine = (assign_groups(each.groups, inputs.base.names) for each in (coarse, fine))
    for name, group in of_fine.items():
        is_moved = of_coarse[name].name == "rest"
        assert densities[group.name] == {"a": 0.4, "b": 0.7 if is_moved else 0.4}
    wanted = {**origin, **{key: 0.7 for key in origin if key.startswith("density") and key.endswith(".b")}}
    assert space.place(wanted) == params
    for found in space.design(8, seed=0):
        assert all(space.distributions[key]._contains(value) for key, value in found.items())


def test_points_are_mixed_and_multiplied_within_their_ranges(inputs: Inputs) -> None:
    fine = bound(finer(COARSE, "layers", inputs.base.names), inputs)
    origin = {key: 0.4 for key in fine.distributions}
    points = {
        "p": origin,
        "q": {**origin, "lambda.layer0.a": 1.0},
        "r": {**origin, "lambda.layer1.b": 1.8},
    }
    groups = [
        {"name": "first", "match": r"layers\.0\."},
        {"name": "rest", "match": r"^(?!.*layers\.0\.)"},
    ]
    coarse = bound(COARSE.model_validate({**COARSE_TEXT, "groups": groups}), inputs)
    space = FrontSpace(fine, points, coarse, inputs.base.names)
    assert list(space.distributions) == [
        *("toward.q", "toward.r"),
        *("times.rest.a", "times.rest.b", "times.first.a", "times.first.b"),
    ]
    for name, point in points.items():
        assert space.recipe(space.corner(name)) == fine.recipe(point)
    params = {
        **space.corner("p"),
        "toward.q": 0.5,
        "toward.r": 1.0,
        "times.first.a": 1.5,
        "times.rest.b": 1.5,
    }
    expected = {**origin, "lambda.layer0.a": 0.7 * 1.5, "lambda.layer1.b": 2.0, "lambda.outside.b": 0.4 * 1.5}
    found, wanted = space.recipe(params), fine.recipe(expected)
    for one, other in zip(found.groups, wanted.groups, strict=True):
        assert one.per_expert("lambda") == pytest.approx(other.per_expert("lambda"))
